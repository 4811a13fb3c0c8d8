"""Names that a config may put together, but no detector can be made of, are refused when the model is built."""

import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from naming import naming
from torch import nn

from dn_detr_d2 import ConfigError
from dn_detr_d2.modeling import DECODER_REGISTRY, ENCODER_REGISTRY
from dn_detr_d2.modeling.encoder import PlainEncoder

ROOT = "MODEL.DN_DETR."
TWO_STAGE = "deformable_detr_two_stage_dn_R50_50ep"


@pytest.mark.parametrize(
    ("system", "keys", "named"),
    [
        ("dino", {"LOSS.CLASS_LOSS": "softmax"}, ["LOSS.CLASS_LOSS", "softmax", "focal"]),
        ("dino_like", {"LOSS.CLASS_LOSS": "softmax"}, ["LOSS.CLASS_LOSS", "softmax", "focal"]),
        (TWO_STAGE, {"LOSS.CLASS_LOSS": "softmax"}, ["LOSS.CLASS_LOSS", "softmax", "focal"]),
        ("mask_dino", {"LOSS.CLASS_LOSS": "softmax"}, ["LOSS.CLASS_LOSS", "softmax", "focal"]),
        (
            "mask2former",
            {"DENOISING.NAME": "ContrastiveDenoisingGenerator"},
            ["DENOISING.NAME", "ContrastiveDenoisingGenerator", "LearnedMaskQueries"],
        ),
        ("dn_detr", {"DECODER.LAYER": "PlainDecoderLayer"}, ["DECODER.LAYER", "PlainDecoderLayer", "LearnedAnchors"]),
        ("dn_detr", {"DECODER.LAYER": "MaskedDecoderLayer"}, ["DECODER.LAYER", "MaskedDecoderLayer"]),
        ("detr", {"DECODER.LAYER": "MaskedDecoderLayer"}, ["DECODER.LAYER", "MaskedDecoderLayer", "MaskedDecoder"]),
        ("dn_detr", {"DECODER.LAYER": "RowColumnDecoderLayer"}, ["RowColumnEncoder", "RowColumnDecoderLayer"]),
        ("anchor_detr", {"DECODER.LAYER": "ConditionalDecoderLayer"}, ["RowColumnEncoder", "ConditionalDecoderLayer"]),
        ("dn_detr", {"QUERY_SOURCE.NAME": "LearnedPositions"}, ["LearnedPositions", "ConditionalDecoderLayer"]),
        ("dn_deformable_detr", {"QUERY_SOURCE.NAME": "LearnedQueries"}, ["LearnedQueries", "DeformableDecoderLayer"]),
        ("dn_deformable_detr", {"QUERY_SOURCE.NAME": "MaskDinoQueries"}, ["MaskDinoQueries", "MASK.ENABLED"]),
        ("mask_dino", {"DECODER.NAME": "RefiningDecoder"}, ["MaskDinoQueries", "RefiningDecoder"]),
        (
            "dn_detr",
            {"DENOISING.ATTENTION_MASK": False, "DENOISING.KNOWN_FRACTION": 0.5, "DENOISING.NUM_GROUPS": 1},
            ["DENOISING.ATTENTION_MASK", "KNOWN_FRACTION 0.5"],
        ),
        (
            "dn_detr",
            {"DENOISING.ATTENTION_MASK": False, "DENOISING.MASK_PADDING": True},
            ["DENOISING.ATTENTION_MASK", "MASK_PADDING True"],
        ),
        ("mask2former", {"NUM_FEATURE_LEVELS": 4}, ["SIZE_DIVISIBILITY", 32, 64]),
        ("mask2former", {"SIZE_DIVISIBILITY": 4}, ["SIZE_DIVISIBILITY", 4, 32]),
    ],
)
def test_parts_that_do_not_go_together_are_refused(toy_model, system, keys, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_model(system, *(x for key, value in keys.items() for x in (ROOT + key, value)))


class Wrapped(nn.Module):
    """A decoder of one's own around another: it has the registry's interface, and no layers."""

    BOXES = True

    def __init__(self, decoder):
        super().__init__()
        self.inner = decoder

    def forward(self, queries, memory):
        return self.inner(queries, memory)


class OwnEncoder(PlainEncoder):
    """An encoder of one's own that gives what Anchor DETR's layers take."""

    def forward(self, pyramid):
        return super().forward(pyramid)


def test_parts_of_ones_own_pass(toy_cfg, monkeypatch):
    """What they need and give is not known here."""
    monkeypatch.setitem(
        DECODER_REGISTRY._obj_map, "Own", lambda cfg: Wrapped(DECODER_REGISTRY.get("RefiningDecoder")(cfg))
    )
    model = build_model(toy_cfg("dn_deformable_detr", ROOT + "DECODER.NAME", "Own")).train()
    assert all(torch.isfinite(x) for x in model(make_batch(2, 1)).values())
    monkeypatch.setitem(ENCODER_REGISTRY._obj_map, "OwnEncoder", OwnEncoder)
    layer = [ROOT + "DECODER.LAYER", "RowColumnDecoderLayer", ROOT + "QUERY_SOURCE.NAME", "LearnedPoints"]
    build_model(toy_cfg("anchor_detr", ROOT + "ENCODER.NAME", "OwnEncoder", *layer))


@pytest.mark.parametrize("size", [(104, 100), (160, 96), (65, 130)])
@pytest.mark.parametrize(("levels", "divisibility"), [(3, 32), (4, 64)])
def test_noised_masks_fall_on_whole_cells_whatever_the_size(toy_model, size, levels, divisibility):
    keys = [ROOT + "NUM_FEATURE_LEVELS", levels, ROOT + "SIZE_DIVISIBILITY", divisibility]
    model = toy_model("mask2former", *keys).train()
    losses = model(make_batch(2, 1, sizes=(size,), masks=True))
    assert all(torch.isfinite(x) for x in losses.values())


def test_without_denoising_masks_may_have_any_size(toy_model):
    """Nothing is noised there, so a size that denoising refuses is fine."""
    keys = [ROOT + "DENOISING.NAME", "", ROOT + "SIZE_DIVISIBILITY", 4]
    model = toy_model("mask2former", *keys).train()
    losses = model(make_batch(2, 1, sizes=((104, 100),), masks=True))
    assert all(torch.isfinite(x) for x in losses.values())


def test_the_sides_of_a_batch_are_multiples_of_both(toy_model):
    """Of SIZE_DIVISIBILITY 40 and of an FPN's 32: of 160, not of the larger one."""
    fpn = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", ROOT + "IN_FEATURES", ["p3", "p4", "p5"]]
    fpn += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    model = toy_model("dn_deformable_detr", *fpn, ROOT + "NUM_FEATURE_LEVELS", 4, ROOT + "SIZE_DIVISIBILITY", 40).eval()
    assert model.preprocess(make_batch(0, sizes=((80, 81),))).tensor.shape[-2:] == (160, 160)
    assert torch.isfinite(model(make_batch(0, sizes=((80, 81),)))[0]["instances"].scores).all()


def test_a_model_that_learns_from_masks_alone_leaves_no_parameter_without_a_gradient(toy_model):
    keys = ["LOSS.L1_WEIGHT", "LOSS.GIOU_WEIGHT", "MATCHER.L1_COST", "MATCHER.GIOU_COST"]
    model = toy_model("mask_dino", *(x for key in keys for x in (ROOT + key, 0.0))).train()
    losses = model(make_batch(2, 1, masks=True, sizes=((64, 64),)))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    boxes = [name for name in losses if "l1" in name or "giou" in name]
    assert all(losses[name].item() == 0 for name in boxes)
    gradients = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if "box_heads" in name}
    assert gradients
    assert set(gradients.values()) == {0.0}
