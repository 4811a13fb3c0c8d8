"""Mask2Former and Mask DINO: what passes between the parts, and what denoising must not change."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import MASK_SYSTEMS, make_batch
from detectron2.structures import BitMasks, PolygonMasks
from naming import naming

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.boxes import cxcywh_to_xyxy
from dn_detr_d2.denoising.mask_noise import NoisedMasks
from dn_detr_d2.losses import SoftmaxCriterion
from dn_detr_d2.modeling.batch import make_targets
from dn_detr_d2.modeling.build import build_criterion, build_matcher
from dn_detr_d2.modeling.decoder import MaskedDecoder
from dn_detr_d2.modeling.pixel_decoder import padded_size
from dn_detr_d2.structures import Memory, Predictions, Targets, join_queries

ROOT_KEY, DENOISING = "MODEL.DN_DETR.", "MODEL.DN_DETR.DENOISING."
every_system = pytest.mark.parametrize("system", MASK_SYSTEMS)


def batch_of(*counts, **arguments):
    return make_batch(*counts, masks=True, **arguments)


@every_system
def test_without_objects_denoising_costs_nothing(toy_model, system):
    losses = toy_model(system).train()(batch_of(0, 0))
    assert sum(value.item() for name, value in losses.items() if name.startswith("dn/")) == 0


@every_system
def test_losses_come_in_groups(toy_model, system):
    losses = toy_model(system).train()(batch_of(2))
    terms = {"class", "mask", "dice"} | (set() if system == "mask2former" else {"l1", "giou"})
    groups = {"main", "aux", "dn"} | ({"proposal"} if system == "mask_dino" else set())
    assert {name.split("/")[0] for name in losses} == groups
    for group in groups - {"aux"}:
        assert {name for name in losses if name.startswith(group) and "_" not in name} == {
            f"{group}/{term}" for term in terms
        }
    # Three layers and the set before them.
    assert {name for name in losses if name.startswith("aux/mask")} == {f"aux/mask_{i}" for i in range(3)}


@pytest.fixture(params=MASK_SYSTEMS)
def parts(toy_model, request):
    """(noised targets, a function from noised targets to predictions, predictions of the matching queries alone)."""
    keys = [DENOISING + "NUM_GROUPS", 3, DENOISING + "NUM_QUERIES", 0, DENOISING + "MASK_LAYERS", 2]
    model = toy_model(request.param, *keys).train()
    batch = batch_of(3, 2)
    with torch.no_grad():
        memory = model.encode(batch)
    targets = make_targets([x["instances"] for x in batch], model.device, padded_size=padded_size(memory))
    noised = model.denoising.generator(targets)
    matching = model.query_source(memory)

    @torch.no_grad()
    def decode(z):
        mask = z.attention_mask(matching.content.shape[1])
        return model.decoder(join_queries(model.query_source.embed(z), matching, mask), memory)

    with torch.no_grad():
        return noised, decode, model.decoder(matching, memory)


def changed(noised, slots):
    """The same with other labels, boxes and masks in ``slots``."""
    labels, boxes, offsets = noised.labels.clone(), noised.boxes.clone(), noised.masks.offsets.clone()
    labels[:, slots] = (labels[:, slots] + 1) % 5
    boxes[:, slots] = 1 - boxes[:, slots]
    offsets[:, slots] += 24
    return dataclasses.replace(
        noised, labels=labels, boxes=boxes, masks=dataclasses.replace(noised.masks, offsets=offsets)
    )


def outputs(predictions):
    """Logits, mask logits and, where there are any, boxes: (K, N, Q, ...)."""
    masks = torch.stack([predictions.mask_logits(k) for k in range(len(predictions.logits))])
    return [predictions.logits, masks, *([predictions.boxes] if predictions.boxes is not None else [])]


def test_matching_queries_do_not_see_denoising_queries(parts):
    """Whatever the noised labels, boxes and masks are, and whether there are any."""
    noised, decode, alone = parts
    d = noised.num_queries
    before, after = (outputs(decode(z)) for z in (noised, changed(noised, slice(0, d))))
    for a, b, c in zip(before, after, outputs(alone), strict=True):
        torch.testing.assert_close(a[:, :, d:], b[:, :, d:], atol=1e-5, rtol=0)
        torch.testing.assert_close(a[:, :, d:], c, atol=1e-4, rtol=0)
        assert (a[:, :, :d] - b[:, :, :d]).abs().max() > 1e-3


@pytest.mark.parametrize("group", [0, 1, 2])
def test_groups_do_not_see_each_other(parts, group):
    noised, decode, _ = parts
    width = noised.num_queries // 3
    mine = torch.arange(group * width, (group + 1) * width)
    others = torch.tensor([i for i in range(3 * width) if i not in mine])
    before, after = (outputs(decode(z)) for z in (noised, changed(noised, mine)))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, :, others], b[:, :, others], atol=1e-5, rtol=0)
        assert (a[:, :, mine] - b[:, :, mine]).abs().max() > 1e-3


def test_a_noised_mask_alone_changes_its_own_query_of_mask2former(toy_model):
    """And only that: a mask is a place to look at, not a target."""
    model = toy_model("mask2former", DENOISING + "NUM_GROUPS", 1).eval()
    batch = batch_of(3, 3)
    with torch.no_grad():
        memory = model.encode(batch)
        targets = make_targets([x["instances"] for x in batch], model.device, padded_size=padded_size(memory))
        noised = model.denoising.generator(targets)
        offsets = torch.zeros_like(noised.masks.offsets)
        noised = dataclasses.replace(noised, masks=dataclasses.replace(noised.masks, offsets=offsets))
        far = offsets.clone()
        far[:, 1] = 32
        moved = dataclasses.replace(noised, masks=dataclasses.replace(noised.masks, offsets=far))
        matching = model.query_source(memory)
        mask = noised.attention_mask(9)
        mask[:, :] = ~torch.eye(12, dtype=torch.bool)  # nobody sees another query
        first, second = (
            outputs(model.decoder(join_queries(model.query_source.embed(z), matching, mask), memory))[0]
            for z in (noised, moved)
        )
    difference = (first - second).abs().amax((0, 1, 3))
    assert difference[1] > 1e-3
    assert difference[[0, 2, *range(3, 12)]].max() < 1e-6


class FourCells:
    """What MaskedDecoder.blocked_cells needs: one level of 2 x 2 cells and embeddings that are the masks themselves."""

    view = Memory(
        torch.zeros(1, 4, 4),
        torch.zeros(1, 4, 4),
        torch.zeros(1, 4, dtype=torch.bool),
        [(2, 2)],
        torch.ones(1, 1, 2),
        mask_features=torch.eye(4).view(1, 4, 2, 2),
    )


def test_cells_outside_of_the_last_mask_are_blocked_and_a_row_without_any_is_opened(toy_model):
    decoder = toy_model("mask2former", DENOISING + "MASK_LAYERS", 2).decoder
    logits = torch.tensor([[[1.0, -1, -1, 1], [-1, -1, -1, -1], [0.5, 1, 1, 1], [-1, -1, 2, -1]]])
    queries = type("Queries", (), {"noised_cells": None})
    sets = [type("Set", (), {"mask_embeddings": logits})]
    blocked = decoder.blocked_cells(sets, FourCells.view, queries, 0)
    assert blocked[0].tolist() == [[False, True, True, False], [False] * 4, [False] * 4, [True, True, False, True]]
    # Two denoising queries: the cells of the noised masks in the first MASK_LAYERS layers, then their own predictions.
    cells = torch.tensor([[[[False, True], [False, True]], [[False, False], [False, False]]]])
    queries.noised_cells = lambda shape: cells if shape == (2, 2) else None
    for layer in (0, 1):
        noised = decoder.blocked_cells(sets, FourCells.view, queries, layer)
        assert noised[0].tolist() == [[True, False, True, False], [False] * 4, *blocked[0, 2:].tolist()]
    assert torch.equal(decoder.blocked_cells(sets, FourCells.view, queries, 2), blocked)


def test_resized_features_give_resized_masks(toy_model):
    """The attention mask is made of small features; it is that of the whole mask logits, resized as the authors do."""
    model = toy_model("mask2former").eval()
    with torch.no_grad():
        memory = model.encode(batch_of(0, 0))
        embeddings = torch.randn(2, 7, 64)
        whole = torch.einsum("nqc,nchw->nqhw", embeddings, memory.mask_features)
        for view, shape in zip(model.decoder.views(memory), memory.shapes, strict=True):
            resized = F.interpolate(whole, shape, mode="bilinear", align_corners=False).flatten(2)
            small = torch.einsum("nqc,nchw->nqhw", embeddings, view.mask_features).flatten(2)
            torch.testing.assert_close(small, resized, atol=1e-4, rtol=1e-4)
            clear = resized.abs() > 1e-3
            assert torch.equal(model.decoder.outside(embeddings, view)[clear], (resized < 0)[clear])


def test_levels_are_seen_in_turn_coarsest_first(toy_model):
    model = toy_model("mask2former").eval()
    memory = model.encode(batch_of(0))
    assert memory.shapes == [(2, 3), (4, 6), (8, 12)]  # strides 32, 16 and 8 of 64 x 96 pixels
    assert isinstance(model.decoder, MaskedDecoder)
    assert [view.shapes for view in model.decoder.views(memory)] == [[shape] for shape in memory.shapes]
    assert memory.mask_features.shape == (1, 64, 16, 24)


@pytest.mark.parametrize("names", [["res3", "res4", "res5"], ["res5", "res4", "res3"]])
def test_extra_levels_stand_at_the_coarse_end(toy_model, names):
    model = toy_model("mask_dino", ROOT_KEY + "IN_FEATURES", names, ROOT_KEY + "NUM_FEATURE_LEVELS", 5).eval()
    batch = batch_of(0, sizes=((128, 256),))
    with torch.no_grad():
        memory = model.encode(batch)
        model(batch)
    fine_first = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    assert memory.shapes == (fine_first if names[0] == "res3" else fine_first[::-1])
    assert model.neck.projections[3][0].in_channels == model.backbone.output_shape()["res5"].channels
    back = memory.reversed_levels()
    assert back.shapes == memory.shapes[::-1]
    assert torch.equal(back.reversed_levels().tokens, memory.tokens)
    assert torch.equal(
        back.tokens[:, : 2 if names[0] == "res3" else 512], memory.tokens[:, -(2 if names[0] == "res3" else 512) :]
    )


def test_padding_is_a_part_of_the_image(toy_model):
    """Boxes of targets are relative to the padded image, masks are padded with nothing, and detections are scaled back."""
    model = toy_model("mask_dino").eval()
    batch = batch_of(2, 1, sizes=((40, 50), (60, 70)))
    memory = model.encode(batch)
    assert padded_size(memory) == (64, 96)
    assert not memory.padding.any()
    targets = make_targets([x["instances"] for x in batch], "cpu", padded_size=(64, 96))
    for i, x in enumerate(batch):
        n = len(x["instances"])
        pixels = cxcywh_to_xyxy(targets.boxes[i, :n]) * torch.tensor([96, 64, 96, 64])
        torch.testing.assert_close(pixels, x["instances"].gt_boxes.tensor)
        h, w = x["image"].shape[1:]
        assert torch.equal(targets.masks[i, :n, :h, :w], x["instances"].gt_masks.tensor)
        assert not targets.masks[i, :, h:].any()
        assert not targets.masks[i, :, :, w:].any()


@every_system
def test_a_batch_gives_what_its_images_give_alone(toy_model, system):
    model = toy_model(system).eval()
    batch = batch_of(0, 0, 0, sizes=((70, 90), (90, 70), (70, 90)))
    with torch.no_grad():
        together, alone = model(batch), [model([x])[0] for x in batch]
    for a, b in zip(together, alone, strict=True):
        assert a.keys() == b.keys()
        if "instances" in a:
            torch.testing.assert_close(a["instances"].scores, b["instances"].scores, atol=1e-5, rtol=0)
            assert (a["instances"].pred_masks != b["instances"].pred_masks).float().mean() < 1e-3
        if "sem_seg" in a:
            torch.testing.assert_close(a["sem_seg"], b["sem_seg"], atol=1e-4, rtol=0)


@every_system
def test_the_order_of_objects_does_not_change_the_matching_losses(toy_model, system, monkeypatch):
    """With points that are the same for all masks."""
    grid = torch.stack(torch.meshgrid(*[(torch.arange(14) + 0.5) / 14] * 2, indexing="xy"), -1).view(1, -1, 2)
    monkeypatch.setattr(
        "dn_detr_d2.modeling.points.random_points",
        lambda kind, sets, count, device: grid[:, :count].expand(sets, -1, -1),
    )
    model = toy_model(system, DENOISING + "NAME", "").train()
    batch = batch_of(4, 3)
    shuffled = copy.deepcopy(batch)
    for x in shuffled:
        x["instances"] = x["instances"][torch.randperm(len(x["instances"]))]
    with torch.no_grad():
        expected, found = model(batch), model(shuffled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_polygons_are_masks_too():
    (record,) = batch_of(2, sizes=((40, 50),))
    square = [[[8.0, 8, 30, 8, 30, 30, 8, 30]], [[10.0, 20, 40, 20, 40, 35, 10, 35]]]
    record["instances"].gt_masks = PolygonMasks(square)
    polygons = make_targets([record["instances"]], "cpu", padded_size=(64, 64)).masks
    record["instances"].gt_masks = BitMasks.from_polygon_masks(square, 40, 50).tensor  # as authors' mappers give them
    bits = make_targets([record["instances"]], "cpu", padded_size=(64, 64)).masks
    assert torch.equal(polygons, bits)
    assert bits.sum() == pytest.approx(22 * 22 + 30 * 15, rel=0.12)


def test_masks_that_are_missing_or_of_another_image_are_told(toy_model):
    model = toy_model("mask2former").train()
    with pytest.raises(DatasetError, match=naming("gt_masks", "image_0.png", "MODEL.DN_DETR.MASK.ENABLED")):
        model(make_batch(2))
    batch = batch_of(1, sizes=((64, 64),))
    batch[0]["instances"].gt_masks = BitMasks(torch.ones(1, 65, 64, dtype=torch.bool))
    with pytest.raises(DatasetError, match=naming("64x65", "64x64")):
        model(batch)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["MASK.ENABLED", False], ["MASK.ENABLED"]),
        (["DECODER.LAYER", "PlainDecoderLayer"], ["DECODER.LAYER", "PlainDecoderLayer"]),
        (["LOSS.GIOU_WEIGHT", 2.0], ["LOSS.GIOU_WEIGHT", "MaskedDecoder"]),
        (["MATCHER.L1_COST", 5.0], ["MATCHER.L1_COST", "MaskedDecoder"]),
        (["MASK.FEATURE", "res3"], ["MASK.FEATURE", "res3", "4"]),
        (["SIZE_DIVISIBILITY", 0], ["SIZE_DIVISIBILITY"]),
        (["SIZE_DIVISIBILITY", 6], ["SIZE_DIVISIBILITY", "6"]),
        (["MASK.OUTPUTS", ["masks"]], ["MASK.OUTPUTS", "masks"]),
        (["QUERY_SOURCE.NUM_PATTERNS", 3], ["QUERY_SOURCE.NUM_PATTERNS"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(toy_model, keys, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_model("mask2former", ROOT_KEY + keys[0], keys[1])


def test_a_way_from_masks_to_boxes_that_is_not_known_is_refused(toy_model):
    with pytest.raises(ConfigError, match=naming("QUERY_SOURCE.BOXES_FROM_MASKS", "mask2boxes", "bitmask")):
        toy_model("mask_dino", ROOT_KEY + "QUERY_SOURCE.BOXES_FROM_MASKS", "mask2boxes")


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        # (cx, cy, w, h) of an empty mask, of one pixel at row 3, column 5, and of rows 2 to 5, columns 1 to 6, of 16 x 24.
        ("mask2box", [(1, 1, 0, 0), (5 / 24, 3 / 16, 0, 0), (3.5 / 24, 3.5 / 16, 5 / 24, 3 / 16)]),
        ("bitmask", [(0, 0, 0, 0), (5.5 / 24, 3.5 / 16, 1 / 24, 1 / 16), (4 / 24, 4 / 16, 6 / 24, 4 / 16)]),
    ],
)
def test_first_boxes_are_those_of_the_masks(toy_model, way, expected):
    source = toy_model("mask_dino", ROOT_KEY + "QUERY_SOURCE.BOXES_FROM_MASKS", way).query_source
    masks = torch.full((1, 3, 16, 24), -1.0)
    masks[0, 1, 3, 5] = 1
    masks[0, 2, 2:6, 1:7] = 1
    proposals = type("Proposals", (), {"mask_embeddings": torch.eye(3)[None, None], "mask_features": masks})
    found = source.first_boxes(proposals)[0]
    # The logit's clamp moves what is nearer than 1e-5 to 0 or 1.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=2e-5, rtol=0)


@every_system
def test_half_precision_trains_with_float32_losses(toy_model, system):
    model = toy_model(system).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch_of(3, 0))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_system
def test_activation_checkpointing_changes_nothing(toy_model, system):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        keys = [f"{ROOT_KEY}{part}.ACTIVATION_CHECKPOINTING" for part in ("ENCODER", "DECODER")]
        model = toy_model(system, keys[0], checkpointing, keys[1], checkpointing).train()
        torch.manual_seed(4)
        sum(model(batch_of(2, 1)).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_masks_of_a_generator_are_moved_copies(toy_model):
    """With noise of 0 every slot has the mask of its object; with noise they differ from group to group."""
    model = toy_model("mask2former")
    targets = make_targets([x["instances"] for x in batch_of(3, 1)], "cpu", padded_size=(96, 96))
    clean = model.denoising.generator.clean()(targets)
    assert isinstance(clean.masks, NoisedMasks)
    assert torch.equal(clean.masks.cells((96, 96)), targets.masks)
    noised = model.denoising.generator(targets)
    first, second = noised.masks.offsets[:, :3], noised.masks.offsets[:, 3:6]
    assert (first != second).any()


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "detr", "anchor_detr"])
def test_other_detectors_get_masks_by_keys_alone(toy_model, system):
    """A mask head beside the others; the proposals of two stages have none, and so no loss of masks."""
    keys = [ROOT_KEY + "MASK.ENABLED", True, ROOT_KEY + "SIZE_DIVISIBILITY", 32]
    keys += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    model = toy_model(system, *keys).train()
    losses = model(batch_of(3, 0))
    assert {"main/mask", "main/dice", "main/l1", "aux/mask_0"} <= set(losses)
    assert ("dn/dice" in losses) == (model.denoising is not None)
    assert "proposal/mask" not in losses
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        found = model.eval()(batch_of(0))[0]["instances"]
    assert found.pred_masks.shape == (len(found), 64, 96)


@pytest.mark.parametrize("system", ["mask2former", "mask_dino"])
def test_heads_of_their_own_for_each_layer_all_learn(toy_model, system):
    model = toy_model(system, ROOT_KEY + "DECODER.SHARE_HEADS", False).train()
    assert len(model.decoder.heads.mask_heads) == 3
    sum(model(batch_of(2, 1)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_semantic_mask_dino_has_the_focal_cost_beside_the_softmax_loss(toy_model, toy_cfg):
    """As the authors match whatever the loss; against the formula of the cost, alpha 0.25 and gamma 2."""
    costs = {cost.name: cost for cost in build_matcher(toy_cfg("mask_dino_semantic")).costs}
    logits = torch.tensor([[[[-1.0, 2.0, 0.5]]]])
    targets = Targets(torch.tensor([[1]]), torch.full((1, 1, 4), 0.5), torch.ones(1, 1, dtype=torch.bool), counts=[1])
    p = torch.tensor(2.0).sigmoid()
    expected = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    assert costs["class"](Predictions(logits), targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(build_criterion(toy_cfg("mask_dino_semantic")), SoftmaxCriterion)
    with pytest.raises(ConfigError, match=naming("MATCHER.CLASS_COST_KIND", "softmax", "'focal'")):
        toy_model("dn_detr", ROOT_KEY + "MATCHER.CLASS_COST_KIND", "softmax")


@pytest.mark.parametrize(("system", "first"), [("mask_dino_semantic", 1), ("mask_dino", 0), ("mask2former", 0)])
def test_sets_that_have_denoising_losses(toy_model, system, first):
    """Without two stages the boxes of the first set of Mask DINO are the noised ones: the authors' criterion begins at 1."""
    model = toy_model(system).train()
    losses = model(batch_of(2, 1))
    numbers = {int(name.rsplit("_", 1)[1]) for name in losses if re.fullmatch(r"dn/class_\d+", name)}
    assert numbers == set(range(first, 3))
    assert "aux/class_0" in losses
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
