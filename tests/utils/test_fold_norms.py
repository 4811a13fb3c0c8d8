"""Folded norms against the networks as they were."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from naming import naming
from torch import nn

from dn_detr_d2.utils.fold_norms import fold_norms


def conv(norm, bias=False):
    """A convolution of 3 to 4 channels with a norm whose numbers are not those of the start."""
    if norm is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (x := getattr(norm, name)) is not None:
                x.data.copy_(torch.rand(4) + 0.5)
    return Conv2d(3, 4, 3, bias=bias, norm=norm, activation=torch.relu)


NORMS = {
    "frozen": (lambda: FrozenBatchNorm2d(4), 1),
    "batch": (lambda: nn.BatchNorm2d(4), 1),
    "without weights": (lambda: nn.BatchNorm2d(4, affine=False), 1),
    "without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), 0),
    "group": (lambda: nn.GroupNorm(2, 4), 0),
    "none": (lambda: None, 0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_what_comes_out_is_the_same(kind, bias):
    make, folds = NORMS[kind]
    norm = make()
    model = nn.Sequential(conv(norm if folds else None, bias)).eval()
    if not folds:
        model[0].norm = norm
    x, before = torch.randn(2, 3, 6, 6), copy.deepcopy(model)
    assert fold_norms(model) == folds
    assert (model[0].norm is None) == (folds == 1 or norm is None)
    torch.testing.assert_close(model(x), before(x))
    assert fold_norms(model) == 0  # there is nothing left


def test_a_whole_detector_finds_the_same(toy_model):
    model = toy_model("dn_deformable_detr").eval()
    for module in model.backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in (module.weight, module.running_var):
                buffer.copy_(torch.rand_like(buffer) * 0.5 + 0.5)
    folded = copy.deepcopy(model)
    convolutions = sum(isinstance(x, FrozenBatchNorm2d) for x in model.modules())
    assert fold_norms(folded) == convolutions > 10
    images, sizes = torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96], [50, 70]])
    with torch.no_grad():
        for ours, theirs in zip(
            folded.forward_tensors(images, sizes), model.forward_tensors(images, sizes), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_is_refused():
    model = nn.Sequential(conv(nn.BatchNorm2d(4))).train()
    with pytest.raises(ValueError, match=naming("training mode", "eval()")):
        fold_norms(model)
    assert model[0].norm is not None
