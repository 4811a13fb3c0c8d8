"""Other backbones under the same detectors, chosen by name and IN_FEATURES alone."""

import importlib.util

import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from naming import naming

from dn_detr_d2 import ConfigError
from dn_detr_d2.diagnostics import check_denoising

SWIN = ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.DN_DETR.IN_FEATURES", ["p1", "p2", "p3"]]
VIT = ["MODEL.BACKBONE.NAME", "build_vitdet_backbone", "MODEL.DN_DETR.IN_FEATURES", ["p3", "p4", "p5"]]
FPN = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DN_DETR.IN_FEATURES", ["p3", "p4", "p5"]]
FPN += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]

# Detectron2's usual FPN, with a level that no detector here asks for.
WIDE_FPN = [*FPN[:2], "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
WIDE_FPN += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
HRNET = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "hrnet_w18_small", "MODEL.TIMM.NORM", ""]


@pytest.mark.parametrize("backbone", [SWIN, VIT, FPN], ids=["Swin-T", "ViTDet-B", "FPN"])
@pytest.mark.parametrize("system", ["dino", "dn_deformable_detr"])
def test_other_backbones_train_a_step_without_a_leak_and_predict(toy_cfg, system, backbone):
    model = build_model(toy_cfg(system, *backbone)).train()
    check_denoising(model, make_batch(2, 1))
    losses = model(make_batch(2, 1))
    assert {"main/class", "dn/class", "dn/l1", "dn/giou"} <= losses.keys()
    sum(losses.values()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # distributed training stops at a parameter without gradient
    found = model.eval()(make_batch(0, 0))
    assert all(torch.isfinite(x["instances"].scores).all() for x in found)


def test_sizes_and_strides_of_swin(toy_cfg):
    model = build_model(toy_cfg("dino", *SWIN, "MODEL.SWIN.SIZE", "S"))
    maps = model.backbone(torch.zeros(1, 3, 64, 96))
    assert [(name, *maps[name].shape[1:]) for name in sorted(maps)] == [
        ("p1", 192, 8, 12), ("p2", 384, 4, 6), ("p3", 768, 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(("backbone", "size"), [(SWIN, (111, 159)), (VIT, (111, 159)), (VIT, (97, 130))])
def test_every_pixel_of_an_image_is_seen(toy_cfg, backbone, size):
    """Whatever its size: the last rows and columns change features, and all levels have cells for the whole image.

    ViTDet needs whole cells; Swin pads by itself, and its images are as large as the authors'.
    """
    model = build_model(toy_cfg("dn_deformable_detr", *backbone)).eval()
    batch = make_batch(0, sizes=(size,))
    images = model.preprocess(batch).tensor
    coarsest = max(shape.stride for shape in model.backbone.output_shape().values())
    whole = [side for side in images.shape[-2:] if side % coarsest == 0]
    assert len(whole) == 2 if backbone is VIT else images.shape[-2:] == size
    changed = images.clone()
    changed[..., size[0] - 3 : size[0], : size[1]] += 1
    changed[..., : size[0], size[1] - 3 : size[1]] += 1
    before, after = model.backbone(images), model.backbone(changed)
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)
    for name, shape in model.backbone.output_shape().items():
        assert before[name].shape[-2:] == tuple(-(-side // shape.stride) for side in images.shape[-2:])


@pytest.mark.parametrize(("backbone", "maps"), [
    (SWIN, ["p1"]), (SWIN, ["p1", "p2"]), (SWIN, ["p0", "p3"]), ([], ["res4"]), ([], ["res3", "res4"]),
    (WIDE_FPN, ["p3", "p4", "p5"]), (WIDE_FPN, ["p4"]), (HRNET, ["res3", "res4"]),
])  # fmt: skip
def test_what_no_map_depends_on_is_not_trained(toy_cfg, backbone, maps):
    """Or distributed training would wait for its gradients: stages behind the last map, other levels of an FPN, branches."""
    levels = ["MODEL.DN_DETR.IN_FEATURES", maps, "MODEL.DN_DETR.NUM_FEATURE_LEVELS", 3]
    model = build_model(toy_cfg("dn_deformable_detr", *backbone, *levels)).train()
    sum(model(make_batch(2, 1)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("overrides", "named"), [
    ([*SWIN, "MODEL.SWIN.SIZE", "XL"], ["MODEL.SWIN.SIZE", "T, S, B, L", "'XL'"]),
    ([*VIT, "MODEL.VIT.SIZE", "g"], ["MODEL.VIT.SIZE", "B, L", "'g'"]),
    (["MODEL.BACKBONE.NAME", "build_dc5_resnet_backbone"], ["MODEL.RESNETS.RES5_DILATION 2"]),
    ([*SWIN[:2]], ["IN_FEATURES", "build_swin_backbone", "p1"]),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(toy_cfg, overrides, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        build_model(toy_cfg("dino", *overrides))


@pytest.mark.parametrize("backbone", [SWIN, VIT], ids=["Swin-T", "ViTDet-B"])
def test_a_missing_timm_is_named(toy_cfg, monkeypatch, backbone):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=naming("pip install timm")):
        build_model(toy_cfg("dino", *backbone))
