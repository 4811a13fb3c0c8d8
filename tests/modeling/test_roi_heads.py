"""Denoising of regions in Faster R-CNN, Mask R-CNN and Cascade R-CNN."""

from itertools import pairwise
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from conftest import ROOT, TOY, make_batch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import BitMasks, Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from toy_training import CASCADE, MASKS, NARROW_RCNN

from dn_detr_d2 import ConfigError, DenoisingGenerator, add_dn_detr_config, setup_cfg
from dn_detr_d2.checkpoint.convert import convert
from dn_detr_d2.config import load_config
from dn_detr_d2.config.ranges import flatten
from dn_detr_d2.modeling.roi_heads import noised_regions

SMALL = [*TOY, *NARROW_RCNN, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
VARIANTS = {"faster": [], "mask": MASKS, "cascade": CASCADE, "cascade_mask": [*CASCADE, *MASKS]}
PLAIN = {name: "CascadeROIHeads" if "cascade" in name else "StandardROIHeads" for name in VARIANTS}


def make(variant="faster", *overrides):
    """A small model whose heads have left their start, where all deltas are about 0."""
    config = ROOT / "configs" / "faster_rcnn_dn_R50_FPN_12ep.yaml"
    model = build_model(setup_cfg(str(config), [*SMALL, *VARIANTS[variant], *overrides])).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "box_predictor" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(*counts):
    """Random images and boxes; masks fill the left half of their box."""
    batch = make_batch(*counts)
    for image in batch:
        height, width = image["instances"].image_size
        masks = torch.zeros(len(image["instances"]), height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(
            masks, image["instances"].gt_boxes.tensor.round().int().tolist(), strict=True
        ):
            mask[y0:y1, x0 : (x0 + x1) // 2] = True
        image["instances"].gt_masks = BitMasks(masks)
    return batch


def losses_of(model, batch, seed=3):
    torch.manual_seed(seed)
    with EventStorage():
        return model(batch)


def fix_noise(patch, generator, u):
    """The uniform draws of box noise are ``u``, whatever is asked for."""
    draws = torch.tensor(u)
    patch.setattr(torch, "rand_like", lambda x: draws.expand(x.shape))
    return generator


def one_object(box, label, size=(80, 100)):
    return Instances(size, gt_boxes=Boxes(torch.tensor([box])), gt_classes=torch.tensor([label]))


def test_the_worked_example(monkeypatch):
    """Image 100 x 80, object (20, 10, 60, 50), lambda 0.4, u = (0, 1, .25, .75); numbers worked out by hand."""
    generator = fix_noise(monkeypatch, DenoisingGenerator(num_classes=3, num_groups=1), [0.0, 1.0, 0.25, 0.75])
    (regions,) = noised_regions([one_object([20.0, 10.0, 60.0, 50.0], 1)], generator)
    torch.testing.assert_close(regions.proposal_boxes.tensor, torch.tensor([[16.0, 14.0, 48.0, 62.0]]))
    deltas = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).get_deltas(regions.proposal_boxes.tensor, regions.gt_boxes.tensor)
    torch.testing.assert_close(deltas, torch.tensor([[2.5, -1.66667, 1.11572, -0.91161]]), atol=1e-5, rtol=0)
    assert regions.gt_classes.tolist() == [1]
    assert pairwise_iou(regions.proposal_boxes, regions.gt_boxes).item() == pytest.approx(0.47368, abs=1e-5)


def test_the_worked_example_at_the_border(monkeypatch):
    generator = fix_noise(monkeypatch, DenoisingGenerator(num_classes=3, num_groups=1), [1.0, 1.0, 1.0, 1.0])
    (regions,) = noised_regions([one_object([70.0, 20.0, 100.0, 80.0], 0)], generator)
    torch.testing.assert_close(regions.proposal_boxes.tensor, torch.tensor([[70.0, 22.0, 100.0, 80.0]]))
    deltas = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).get_deltas(regions.proposal_boxes.tensor, regions.gt_boxes.tensor)
    torch.testing.assert_close(deltas, torch.tensor([[0.0, -0.17241, 0.0, 0.16951]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("deltas", "expected"), [([0.0, 0.0, 0.0, 0.0], 6.19399), ([1.0, -1.0, 0.5, 0.0], 3.69399)])
def test_the_loss_of_the_worked_example(monkeypatch, deltas, expected):
    """Of class-specific deltas those of the object's class count; divided by 512 regions the loss is .0072148."""
    model = make("faster", "MODEL.DN_DETR.NUM_CLASSES", 3)
    heads = model.roi_heads
    fix_noise(monkeypatch, heads.generator, [0.0, 1.0, 0.25, 0.75])
    heads.generator.num_groups = 1
    regions = noised_regions([one_object([20.0, 10.0, 60.0, 50.0], 1)], heads.generator)
    predicted = torch.full((1, 12), 99.0)
    predicted[:, 4:8] = torch.tensor(deltas)
    losses = heads.sums(heads.box_predictor, (torch.zeros(1, 4), predicted), regions)
    assert losses["dn/box_reg"].item() == pytest.approx(expected, abs=2e-5)
    assert losses["dn/box_reg"].item() / 512 == pytest.approx(expected / 512, abs=1e-7)
    assert losses.keys() == {"dn/box_reg"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0, 70)] * 2, *[st.floats(1, 60)] * 2), max_size=4),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_noised_regions_lie_in_their_image_and_keep_their_object(boxes, groups, scale, seed):
    torch.manual_seed(seed)
    corners = torch.tensor([[x, y, min(x + w, 100.0), min(y + h, 80.0)] for x, y, w, h in boxes]).reshape(-1, 4)
    image = Instances((80, 100), gt_boxes=Boxes(corners), gt_classes=torch.arange(len(corners)))
    generator = DenoisingGenerator(num_classes=5, num_groups=groups, center_noise_scale=scale, size_noise_scale=scale)
    (regions,) = noised_regions([image], generator)
    found = regions.proposal_boxes.tensor
    assert len(found) <= groups * len(corners)
    assert ((found[:, 2:] > found[:, :2]) & (found >= 0).all()).all() if len(found) else True
    assert (found <= found.new_tensor([100, 80, 100, 80])).all()
    torch.testing.assert_close(
        regions.gt_boxes.tensor, corners[regions.gt_classes]
    )  # the class says which object it is
    reach = (corners[:, 2:] - corners[:, :2])[regions.gt_classes] * scale / 2 + 1e-3
    moved = (found - corners[regions.gt_classes]).abs()
    assert (moved <= 2 * reach.tile(2) + 1e-3).all()  # half the size for the centre, half of it for the size


@pytest.mark.parametrize("variant", VARIANTS)
def test_ordinary_losses_are_bitwise_those_without_denoising(variant):
    """RPN, sampling, box head and mask head do not notice the noised regions, which are drawn after them."""
    model, batch = make(variant), batch_of(3, 2)
    with_denoising = losses_of(model, batch)
    model.roi_heads.generator = None
    without = losses_of(model, batch)
    stages = [f"_stage{i}" for i in range(3)] if "cascade" in variant else [""]
    assert with_denoising.keys() - without.keys() == {f"dn/box_reg{stage}" for stage in stages}
    assert all(torch.equal(with_denoising[name], value) for name, value in without.items())
    assert ("loss_mask" in without) == ("mask" in variant)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant, counts):
    model = make(variant)
    losses = losses_of(model, batch_of(*counts))
    sum(losses.values()).backward()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []
    assert all(value.isfinite() for value in losses.values())
    assert (sum(value for name, value in losses.items() if name.startswith("dn/")) > 0) == any(counts)
    model.zero_grad()
    noised = [value for name, value in losses_of(model, batch_of(*counts)).items() if name.startswith("dn/")]
    sum(noised).backward()  # alone: it reaches the box head, and not the mask head
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert any("box_head" in name for name in trained)
    assert not any("mask_head" in name for name in trained)


def test_the_loss_against_a_slow_reference():
    """Every noised region by itself: pooled alone, L1 of the four deltas of its class, summed, over the sampled regions."""
    model, batch = make(), batch_of(2, 1)
    heads, seen = model.roi_heads, {}
    inner = heads.restoration_losses

    def spy(features, noised):
        seen.update(features=features, noised=noised)
        return inner(features, noised)

    heads.restoration_losses = spy
    found = losses_of(model, batch)["dn/box_reg"]
    total, transform = 0.0, Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    with torch.no_grad():
        for i, image in enumerate(seen["noised"]):
            for box, target, label in zip(
                image.proposal_boxes.tensor, image.gt_boxes.tensor, image.gt_classes, strict=True
            ):
                maps = [x[i : i + 1] for x in seen["features"]]
                hidden = heads.box_head(heads.box_pooler(maps, [Boxes(box[None])]))
                predicted = heads.box_predictor.bbox_pred(hidden)[0, 4 * label : 4 * label + 4]
                total += (predicted - transform.get_deltas(box[None], target[None])[0]).abs().sum()
    assert len(seen["noised"][0]) <= 20 and sum(map(len, seen["noised"])) > 25  # noqa: PT018
    torch.testing.assert_close(found.detach(), total / 32, atol=1e-5, rtol=1e-5)  # 16 sampled regions of each image


def test_a_region_weighs_the_same_whatever_the_number_of_groups():
    """Without noise all copies are the object itself: the sum grows with their number, the divisor does not."""
    quiet = ["MODEL.DN_DETR.DENOISING.CENTER_NOISE_SCALE", 0.0, "MODEL.DN_DETR.DENOISING.SIZE_NOISE_SCALE", 0.0]
    model, batch = make("faster", *quiet), batch_of(3, 2)
    values = {}
    for groups in (1, 4):
        model.roi_heads.generator.num_groups = groups
        values[groups] = losses_of(model, batch)["dn/box_reg"]
    torch.testing.assert_close(values[4], 4 * values[1], rtol=1e-5, atol=1e-6)
    model.roi_heads.denoising_weight = 0.5
    torch.testing.assert_close(losses_of(model, batch)["dn/box_reg"], values[4] / 2)


def test_stages_of_a_cascade_refine_what_the_one_before_made_of_a_region():
    """The second stage sees the first one's boxes, without a gradient, and still the object they came from."""
    model, batch = make("cascade"), batch_of(2, 1)
    heads, stages = model.roi_heads, []
    inner = heads.sums

    def spy(predictor, predictions, regions):
        stages.append((predictor, predictions, regions))
        return inner(predictor, predictions, regions)

    heads.sums = spy
    losses_of(model, batch)
    assert len(stages) == 3
    for (predictor, predictions, before), (_, _, after) in pairwise(stages):
        boxes = torch.cat([image.proposal_boxes.tensor for image in before])
        made = predictor.box2box_transform.apply_deltas(predictions[1], boxes).split([len(image) for image in before])
        for image, expected, was in zip(after, made, before, strict=True):
            kept = Boxes(expected.detach().clone())
            kept.clip(image.image_size)
            assert torch.equal(image.proposal_boxes.tensor, kept.tensor[kept.nonempty()])
            assert torch.equal(image.gt_classes, was.gt_classes[kept.nonempty()])
            assert torch.equal(image.gt_boxes.tensor, was.gt_boxes.tensor[kept.nonempty()])
            assert not image.proposal_boxes.tensor.requires_grad


def test_a_class_loss_of_regions_only_if_it_is_asked_for():
    """Cross-entropy of the object's class, over the sampled regions."""
    model, batch = make("faster", "MODEL.DN_DETR.DENOISING.REGION_CLASS_LOSS", True), batch_of(2, 1)
    scores = {}
    inner = model.roi_heads.sums

    def spy(predictor, predictions, regions):
        scores.update(scores=predictions[0], classes=torch.cat([x.gt_classes for x in regions]))
        return inner(predictor, predictions, regions)

    model.roi_heads.sums = spy
    found = losses_of(model, batch)["dn/cls"]
    log_probability = scores["scores"].log_softmax(-1)
    expected = -sum(row[label] for row, label in zip(log_probability, scores["classes"], strict=True)) / 32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_the_baseline_give_its_detections(variant):
    """Denoising adds no weight, and in evaluation nothing is noised."""
    denoising = make(variant).eval()
    plain = make(variant, "MODEL.ROI_HEADS.NAME", PLAIN[variant], "MODEL.DN_DETR.DENOISING.NAME", "").eval()
    denoising.load_state_dict(plain.state_dict(), strict=True)
    batch = batch_of(0, 0)
    with torch.no_grad():
        for a, b in zip(plain(batch), denoising(batch), strict=True):
            assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
            assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_without_a_name_the_heads_are_the_baseline():
    model = make("faster", "MODEL.DN_DETR.DENOISING.NAME", "")
    assert model.roi_heads.generator is None
    assert not any(name.startswith("dn/") for name in losses_of(model, batch_of(2)))


def test_a_config_of_detectron2_gets_denoising_by_the_name_of_its_heads():
    """Without setup_cfg(): Detectron2's own keys, one name, and the keys of denoising."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Base-Faster-RCNN.yaml"))
    cfg.merge_from_list([*SMALL, "MODEL.ROI_HEADS.NAME", "DenoisingROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 5])
    cfg.MODEL.DN_DETR.DENOISING.NAME, cfg.MODEL.DN_DETR.DENOISING.NUM_GROUPS = "DenoisingGenerator", 7
    model = build_model(cfg).train()
    assert model.roi_heads.generator.num_groups == 7
    assert "dn/box_reg" in losses_of(model, batch_of(1, 2))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["MODEL.DN_DETR.DENOISING.NAME", "ContrastiveDenoisingGenerator"], "ContrastiveDenoisingGenerator"),
        (["MODEL.DN_DETR.DENOISING.MAX_QUERIES", 100], "MAX_QUERIES"),
        (["MODEL.DN_DETR.DENOISING.NUM_GROUPS", 0], "DENOISING"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "RetinaNet"),
        (["MODEL.ROI_BOX_HEAD.NAME", ""], "MODEL.ROI_BOX_HEAD.NAME"),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "StandardROIHeads"),
        (["MODEL.META_ARCHITECTURE", "FasterRCNN"], "FasterRCNN"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "ProposalNetwork"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "PanopticFPN"),
        (["MODEL.KEYPOINT_ON", True], "KEYPOINT_ON"),
        (["MODEL.LOAD_PROPOSALS", True], "LOAD_PROPOSALS"),
        (["MODEL.ROI_HEADS.NAME", "DenoisingCascadeROIHeads"], "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
        (["MODEL.DN_DETR.DENOISING.KNOWN_FRACTION", 0.5], "KNOWN_FRACTION"),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(overrides, named):
    with pytest.raises(ConfigError, match=naming(named)):
        make("faster", *overrides)


def test_the_number_of_classes_is_that_of_the_data_set():
    config = str(ROOT / "configs" / "faster_rcnn_dn_R50_FPN_12ep.yaml")
    cfg = setup_cfg(config, ["DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)])
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    for again in (["MODEL.DN_DETR.NUM_CLASSES", 7], ["MODEL.DN_DETR.NUM_CLASSES", 7, "MODEL.ROI_HEADS.NUM_CLASSES", 3]):
        assert setup_cfg(config, again, splits=()).MODEL.ROI_HEADS.NUM_CLASSES == 7
    assert setup_cfg(config, ["MODEL.ROI_HEADS.NUM_CLASSES", 9], splits=()).MODEL.ROI_HEADS.NUM_CLASSES == 9


DETECTRON2S = Path(detectron2.__file__).parent / "model_zoo" / "configs"
BASE = ROOT / "configs" / "Base-Detectron2-Defaults.yaml"


def test_the_defaults_of_detectron2_are_its_own():
    """Each value of the file is what Detectron2 has without this project."""
    given, theirs = dict(flatten(yaml.safe_load(BASE.read_text()))), dict(flatten(get_cfg()))
    ours = {key: value for key, value in given.items() if key not in theirs}
    assert ours == {"SOLVER.OPTIMIZER": "SGD", "SOLVER.BACKBONE_MULTIPLIER": 1.0}
    for key in given.keys() - ours.keys():
        assert given[key] == pytest.approx(theirs[key]), key
    loaded = dict(flatten(load_config(str(BASE), [])))
    differing = {key for key, value in theirs.items() if as_list(loaded[key]) != as_list(value)}
    assert differing == {"MODEL.DEVICE", "MODEL.META_ARCHITECTURE", "DATALOADER.ASPECT_RATIO_GROUPING"}


def as_list(x):
    return list(x) if isinstance(x, list | tuple) else x


@pytest.mark.parametrize(
    ("file", "heads", "losses"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "DenoisingROIHeads", ["dn/box_reg"]),
        ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", "DenoisingROIHeads", ["dn/box_reg"]),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "DenoisingROIHeads", ["dn/box_reg", "loss_mask"]),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "DenoisingCascadeROIHeads", ["dn/box_reg_stage2", "loss_mask"]),
    ],
)
def test_config_files_of_detectron2_train_with_denoising(tmp_path, file, heads, losses):
    (tmp_path / "mine.yaml").write_text(
        f"_BASE_: [{BASE}, {DETECTRON2S / file}]\nMODEL: {{ROI_HEADS: {{NAME: {heads}}}, RESNETS: {{NORM: FrozenBN}}}}\n"
    )
    dc5 = ["MODEL.RESNETS.RES5_DILATION", 2] if "DC5" in file else []
    small = [x for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if "ANCHOR" not in pair[0] for x in pair]
    small += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
    model = build_model(setup_cfg(str(tmp_path / "mine.yaml"), [*small, *dc5])).train()
    assert {*losses} <= losses_of(model, batch_of(2, 1)).keys()
    assert model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])


def test_ordinary_heads_and_weights_of_another_colour_order_are_told(caplog):
    """Detectron2's own file without the defaults below it."""
    file = DETECTRON2S / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml"
    cfg = setup_cfg(str(file), ["MODEL.DN_DETR.NUM_CLASSES", 3], splits=())
    assert cfg.INPUT.FORMAT == "RGB"
    said = [record.getMessage() for record in caplog.records]
    assert any("StandardROIHeads" in line and "without denoising" in line for line in said)
    assert any("MSRA" in line and "BGR" in line for line in said)


def test_anchors_of_older_checkpoints_are_left_out():
    state = make().state_dict()
    old = {**state, "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    assert convert(old, state).state.keys() == state.keys()
