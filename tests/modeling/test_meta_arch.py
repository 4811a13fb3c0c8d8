import copy

import pytest
import torch
from conftest import DENOISING_SYSTEMS, MASK_SYSTEMS, SYSTEMS, make_batch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from naming import naming

from dn_detr_d2 import CheckpointError, ConfigError
from dn_detr_d2.losses import mean_over_ranks, name_layers
from dn_detr_d2.structures import HostCopy, Pyramid

EMPTY = [(3, 1), (0, 2), (0, 0)]


@pytest.mark.parametrize("counts", EMPTY)
@pytest.mark.parametrize("system", [*SYSTEMS, *MASK_SYSTEMS])
def test_images_without_objects_train_with_the_same_losses_and_parameters(toy_model, system, counts):
    model, masks = toy_model(system).train(), system in MASK_SYSTEMS
    losses = model(make_batch(*counts, masks=masks))
    assert set(losses) == set(toy_model(system).train()(make_batch(2, 2, masks=masks)))
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_come_in_groups(toy_model, system):
    losses = toy_model(system).train()(make_batch(2))
    groups = {"main", "aux"} | ({"dn"} if system in DENOISING_SYSTEMS else set())
    groups |= {"proposal"} if system.startswith("dino") else set()
    assert {name.split("/")[0] for name in losses} == groups
    assert {name for name in losses if name.startswith("main/")} == {"main/class", "main/l1", "main/giou"}
    assert "aux/giou_1" in losses
    assert "aux/giou_2" not in losses


def test_denoising_losses_are_launched_before_the_host_waits_for_the_costs(toy_model, monkeypatch):
    model, calls = toy_model("dn_detr").train(), []

    def recorded(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: calls.append(name) or original(*given, **named))

    for owner, name in ((model.matcher, "start"), (model.matcher, "finish"), (HostCopy, "wait")):
        recorded(owner, name)
    recorded(type(model.criterion), "__call__")
    losses = model(make_batch(2, 1))
    assert any(name.startswith("dn/") for name in losses)
    assert calls == ["start", "__call__", "finish", "wait", "__call__"]


def test_layers_are_named_last_and_others():
    assert name_layers({"l1": torch.tensor([1.0, 2, 3])}, "main", "aux") == {"main/l1": 3, "aux/l1_0": 1, "aux/l1_1": 2}


def test_the_normalizer_is_at_least_one():
    assert mean_over_ranks([0, 7], torch.device("cpu")).tolist() == [1, 7]


def test_without_objects_denoising_costs_nothing(toy_model):
    losses = toy_model("dn_detr").train()(make_batch(0, 0))
    assert sum(value.item() for name, value in losses.items() if name.startswith("dn/")) == 0


def test_the_batch_stays_as_it_was(toy_model):
    batch = make_batch(3, 2)
    before = copy.deepcopy(batch)
    toy_model("dn_deformable_detr").train()(batch)
    for ours, theirs in zip(batch, before, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
        assert torch.equal(ours["instances"].gt_classes, theirs["instances"].gt_classes)


def test_the_order_of_objects_does_not_change_the_matching_losses(toy_model):
    model = toy_model("dab_deformable_detr").train()
    batch, shuffled = make_batch(4, 3), make_batch(4, 3)
    for x in shuffled:
        x["instances"] = x["instances"][torch.randperm(len(x["instances"]))]
    for name, value in model(batch).items():
        torch.testing.assert_close(model(shuffled)[name], value, atol=1e-4, rtol=1e-4)


def test_denoising_without_ground_truth_is_refused(toy_model):
    model = toy_model("dn_detr")
    with pytest.raises(ValueError, match=naming("annotated", "denoising")):
        model.forward_outputs(make_batch(1), model.denoising, annotated=False)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_batch_gives_what_its_images_give_alone(toy_model, system):
    """Images of other sizes, other numbers of each size, in any order."""
    model = toy_model(system).eval()
    batch = make_batch(0, 0, 0, 0, 0, sizes=((70, 90), (90, 70), (70, 90)))
    with torch.no_grad():
        together = model(batch)
        alone = [model([x])[0] for x in batch]
        model.pad_to_largest = True
        padded = model(batch)
    for x, a, b in zip(batch, together, alone, strict=True):
        assert a["instances"].image_size == x["image"].shape[-2:]
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor, atol=1e-3, rtol=0
        )
    changes = [(a["instances"].scores - b["instances"].scores).abs().max() for a, b in zip(padded, alone, strict=True)]
    assert max(changes) > 1e-5  # the comparison sees what padding does


@pytest.mark.parametrize("system", sorted(SYSTEMS.keys() - {"anchor_detr"}))  # whose keys are means over padding, too
def test_transformer_does_not_see_padding(toy_model, system):
    """Whatever stands in padded cells, and however many there are, the image's cells become what they become alone.

    So do the predictions of the dense family. The deformable family embeds reference boxes as parts of the *padded* image
    (spec section 1.6), and every backbone's convolutions see the zeros beyond the image.
    """
    model = toy_model(system).eval()
    dense = system in ("dab_detr", "dn_detr", "encoder_only", "detr")
    levels = [(8, 6), (4, 3), (4, 6), (2, 2)][: len(model.neck.projections)]
    alone, padded, inside = [], [], []
    for h, w in levels:
        tight = torch.zeros(1, h, w, dtype=torch.bool)
        loose = torch.ones(1, 2 * h, 2 * w, dtype=torch.bool)
        loose[:, :h, :w] = False
        features, garbage = torch.randn(1, 64, h, w), 9 * torch.randn(1, 64, 2 * h, 2 * w)
        garbage[:, :, :h, :w] = features
        alone.append((features, model.neck.position_encoding(tight), tight))
        padded.append((garbage, model.neck.position_encoding(loose), loose))
        inside.append(~loose.flatten())
    with torch.no_grad():
        small, large = (model.encoder(Pyramid(*map(list, zip(*x, strict=True)))) for x in (alone, padded))
        torch.testing.assert_close(large.tokens[:, torch.cat(inside)], small.tokens, atol=1e-5, rtol=1e-5)
        if dense:
            results = [model.decoder(model.query_source(memory), memory) for memory in (small, large)]
            torch.testing.assert_close(results[0].logits, results[1].logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(results[0].boxes, results[1].boxes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 200), (200, 40), (33, 57), (8, 8), (1, 1)])
def test_non_square_and_tiny_images_give_boxes_inside_the_wanted_size(toy_model, size):
    model = toy_model("dn_deformable_detr").eval()
    batch = make_batch(0, sizes=(size,))
    batch[0].update(height=300, width=500)
    with torch.no_grad():
        result = model(batch)[0]["instances"]
    assert result.image_size == (300, 500)
    boxes = result.pred_boxes.tensor
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([500, 300, 500, 300])).all()


def test_detections_are_sorted_and_limited(toy_model):
    model = toy_model("dn_detr", "TEST.DETECTIONS_PER_IMAGE", 7).eval()
    with torch.no_grad():
        scores = model(make_batch(0))[0]["instances"].scores
    assert len(scores) <= 7
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_nan_weights_are_an_error_not_a_result(toy_model):
    model = toy_model("dn_detr").eval()
    model.decoder.heads.class_heads[0].bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=naming("image_0.png")), torch.no_grad():
        model(make_batch(0))


def load_with_detectron2(model, state, folder):
    """As DefaultPredictor loads."""
    torch.save({"model": state}, folder / "weights.pth")
    return DetectionCheckpointer(model).load(str(folder / "weights.pth"))


def test_weights_with_another_number_of_classes_are_refused_with_the_key(toy_model, tmp_path):
    model = toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 7)
    with pytest.raises(CheckpointError, match=naming("class_heads", "NUM_CLASSES", 7)):
        load_with_detectron2(model, toy_model("dn_detr").state_dict(), tmp_path)


def test_weights_of_a_backbone_alone_are_a_start_for_training_only(toy_model, tmp_path):
    model = toy_model("dn_detr").train()
    backbone = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
    load_with_detectron2(model, backbone, tmp_path)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in backbone.items())
    with pytest.raises(CheckpointError, match=r"decoder\.heads\."):
        load_with_detectron2(model.eval(), backbone, tmp_path)


def test_weights_that_fit_nowhere_are_no_start(toy_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"decoder\.heads\."):
        load_with_detectron2(toy_model("dn_detr").train(), {"other.weight": torch.zeros(3)}, tmp_path)


def not_made_up(names):
    """Without statistics: Detectron2's FrozenBatchNorm2d fills in those that a state dict lacks, as old files do."""
    return {name for name in names if not name.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kept", ["backbone.", "encoder.", "query_source.", "decoder.heads.", "nothing"])
def test_a_part_is_loaded_as_into_every_module(toy_model, training, kept):
    model = toy_model("dn_detr").train(training)
    state = model.state_dict()
    part = {name: x + 1 for name, x in state.items() if name.startswith(kept)} | {"other.weight": torch.zeros(3)}
    found = model.load_state_dict(part, strict=False)
    assert not_made_up(found.missing_keys) == not_made_up(state.keys() - part.keys())
    assert found.unexpected_keys == ["other.weight"]
    assert all(torch.equal(model.state_dict()[name], x) for name, x in part.items() if name in state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)


@pytest.mark.parametrize("training", [True, False])
def test_names_of_another_code_that_do_not_fit_are_unexpected_as_in_every_module(toy_model, training):
    model = toy_model("dn_detr").train(training)
    foreign = {"transformer.encoder.layers.0.linear1.weight": torch.zeros(3), "query_embed.weight": torch.zeros(3)}
    found = model.load_state_dict(foreign, strict=False)
    assert set(found.unexpected_keys) == foreign.keys()
    assert not_made_up(found.missing_keys) == not_made_up(model.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(foreign)


@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_without_heads_can_be_loaded(toy_model, training, tmp_path):
    model = toy_model("dn_detr").train(training)
    model.decoder = torch.nn.Linear(2, 3)
    part = {"decoder.weight": torch.ones(3, 2)}
    assert "decoder.bias" in model.load_state_dict(part, strict=False).missing_keys
    with pytest.raises(CheckpointError, match=naming("decoder.bias")):
        load_with_detectron2(model, part, tmp_path)


def test_embeddings_start_from_a_normal_distribution(toy_cfg):
    """Spec sections 1.5 and 1.6: anchors, labels, content and levels N(0, 1); matrices of the transformer Xavier."""
    model = build_model(toy_cfg("dn_deformable_detr", "MODEL.DN_DETR.NUM_QUERIES", 200))
    source = model.query_source
    for embedding in (source.anchors, source.content, source.label_encoder.embed, model.encoder.level_embed):
        assert embedding.weight.std().item() == pytest.approx(1, abs=0.12)
    linear = model.encoder.layers[0].ffn.linear1.weight
    assert linear.abs().max().item() == pytest.approx((6 / sum(linear.shape)) ** 0.5, rel=0.02)
    biases = [head.layers[-1].bias.tolist() for head in model.decoder.heads.box_heads]
    assert biases == [[0, 0, -2, -2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert all(head.layers[-1].weight.abs().sum() == 0 for head in model.decoder.heads.box_heads)
    assert model.decoder.heads.class_heads[0].bias[0].item() == pytest.approx(-4.59512, abs=1e-5)


def test_both_normalizers_agree_with_one_process(toy_model):
    key = "MODEL.DN_DETR.DENOISING.NORMALIZER"
    losses = []
    for value in ("global", "local"):
        torch.manual_seed(3)
        model = toy_model("dn_detr", key, value).train()
        losses.append(sum(model(make_batch(2, 1)).values()))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ("MODEL.DN_DETR.HIDDEN_DIM", 36, "MODEL.DN_DETR.ENCODER.NUM_HEADS", 8),
            ["HIDDEN_DIM", 36, "ENCODER.NUM_HEADS", 8],
        ),
        (("MODEL.DN_DETR.HIDDEN_DIM", 30), ["HIDDEN_DIM", 30, 4]),
        (("MODEL.DN_DETR.IN_FEATURES", ["res9"]), ["IN_FEATURES", "'res9'"]),
        (("MODEL.DN_DETR.NUM_FEATURE_LEVELS", 0), ["NUM_FEATURE_LEVELS", 0]),
        (
            ("MODEL.DN_DETR.NECK.NORM", "GN", "MODEL.DN_DETR.HIDDEN_DIM", 32),
            ["HIDDEN_DIM", 32, "NECK.NORM"],
        ),
        (("MODEL.DN_DETR.NECK.NORM", "BN"), ["NECK.NORM", "'BN'", "'GN'"]),
        (("MODEL.DN_DETR.QUERY_SOURCE.CONTENT", "zero"), ["DENOISING.NAME", "'DenoisingGenerator'"]),
        (("MODEL.DN_DETR.QUERY_SOURCE.CONTENT", "full"), ["QUERY_SOURCE.CONTENT", "full"]),
        (
            ("MODEL.DN_DETR.DECODER.NAME", "Decoder"),
            ["DECODER.NAME", "'Decoder'", "LookForwardTwiceDecoder"],
        ),
        (("MODEL.DN_DETR.DECODER.LAYER", "Layer"), ["DECODER.LAYER", "'Layer'"]),
        (("MODEL.DN_DETR.ENCODER.NAME", "X"), ["ENCODER.NAME", "'X'"]),
        (("MODEL.DN_DETR.QUERY_SOURCE.NAME", "X"), ["QUERY_SOURCE.NAME", "'X'"]),
        (("MODEL.DN_DETR.DENOISING.NAME", "X"), ["DENOISING.NAME", "'X'"]),
        (("MODEL.DN_DETR.DENOISING.NUM_GROUPS", 0), ["MODEL.DN_DETR.DENOISING", "num_groups", 0]),
        (("MODEL.DN_DETR.DENOISING.NORMALIZER", "x"), ["NORMALIZER", "'x'", "'global'", "'local'"]),
        (("MODEL.DN_DETR.NUM_QUERIES", 0), ["NUM_QUERIES", 0]),
        (("MODEL.DN_DETR.DECODER.NUM_LAYERS", 0), ["DECODER.NUM_LAYERS", 0]),
        (("MODEL.DN_DETR.ENCODER.DROPOUT", 2.0), ["ENCODER.DROPOUT", 2.0]),
        (("MODEL.DN_DETR.MATCHER.L1_COST", -1.0), ["MODEL.DN_DETR.MATCHER", "cost 'l1'", -1.0]),
        (("MODEL.DN_DETR.LOSS.L1_WEIGHT", -1.0), ["MODEL.DN_DETR.MATCHER / LOSS", "term 'l1'", -1.0]),
        (("MODEL.BACKBONE.NAME", "X"), ["MODEL.BACKBONE", "X"]),
        (("MODEL.RESNETS.DEPTH", 19), ["MODEL.RESNETS"]),
    ],
)
def test_wrong_combinations_are_refused_by_key(toy_cfg, overrides, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        build_model(toy_cfg("dn_detr", *overrides))


def test_classes_must_be_known_when_the_model_is_built(toy_cfg):
    cfg = toy_cfg("dn_detr")
    cfg.MODEL.DN_DETR.NUM_CLASSES = None
    with pytest.raises(ConfigError, match=naming("NUM_CLASSES", None)):
        build_model(cfg)


def test_patterns_multiply_the_queries(toy_model):
    model = toy_model("dn_detr", "MODEL.DN_DETR.QUERY_SOURCE.NUM_PATTERNS", 3).train()
    batch = make_batch(1)
    queries = model.query_source(model.encode(batch))
    assert queries.boxes.shape == (1, 27, 4)
    assert torch.equal(queries.boxes[0, :9], queries.boxes[0, 9:18])
    unknown = model.query_source.label_encoder.unknown()
    torch.testing.assert_close(queries.content[0, 10] - unknown, model.query_source.patterns.weight[1])
    sum(model(batch).values()).backward()


def test_detectron2s_fpn_serves_as_the_pyramid(toy_cfg):
    overrides = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    overrides += ["MODEL.DN_DETR.IN_FEATURES", ["p3", "p4", "p5"], "MODEL.FPN.OUT_CHANNELS", 32]
    model = build_model(toy_cfg("dn_deformable_detr", *overrides)).train()
    sum(model(make_batch(2, 1)).values()).backward()
    with torch.no_grad():
        assert len(model.eval()(make_batch(0))) == 1


BASE_SYSTEMS = [
    "dab_detr",
    "dn_detr",
    "dab_deformable_detr",
    "encoder_only",
    "dino",
    "dino_like",
    "detr",
    "anchor_detr",
]


@pytest.mark.parametrize("system", BASE_SYSTEMS)
def test_no_parameter_waits_for_a_gradient_with_one_decoder_layer(toy_model, system):
    """DistributedDataParallel waits for the gradient of each parameter that is to be trained."""
    model = toy_model(system, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 1).train()
    sum(model(make_batch(2, 1)).values()).backward()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []


def test_a_matcher_of_ones_own_needs_no_stages(toy_model):
    """What is documented is a call; ``start`` and ``finish`` are for those who let the device work on."""
    model, batch = toy_model("dino").train(), make_batch(2, 1)
    torch.manual_seed(0)
    expected = model(batch)
    matcher = model.matcher
    model.matcher = lambda predictions, targets: matcher(predictions, targets)
    torch.manual_seed(0)
    losses = model(batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], msg=name)


def test_proposals_of_ones_own_need_no_targets_of_their_own(toy_model, monkeypatch):
    model, batch = toy_model("dino").train(), make_batch(2, 1)
    torch.manual_seed(0)
    expected = model(batch)
    for kind in type(model.query_source).__mro__:
        if "proposal_targets" in vars(kind):
            monkeypatch.delattr(kind, "proposal_targets")
    torch.manual_seed(0)
    assert {name: x.item() for name, x in model(batch).items()} == {name: x.item() for name, x in expected.items()}
