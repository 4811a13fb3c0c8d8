"""Weights that are cast and folded for many layers at once give what the layers give by themselves."""

import contextlib
import copy
import pickle

import pytest
import torch
from conftest import SYSTEMS, make_batch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from dn_detr_d2.modeling.prepared_weights import PreparedWeights, affine


class Block(nn.Module):
    """Two convolutions with frozen norms, the first frozen itself, one with a bias, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = Conv2d(3, 8, 3, bias=False, norm=FrozenBatchNorm2d(8), activation=torch.relu)
        self.body = Conv2d(8, 6, 3, stride=2, bias=False, norm=FrozenBatchNorm2d(6))
        self.last = nn.Sequential(nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.stem.weight.requires_grad_(False)
        for name, buffer in self.named_buffers():
            buffer.copy_(torch.rand(buffer.shape) + (0.5 if "var" in name or "weight" in name else -0.5))

    def forward(self, x):
        return self.last(self.body(self.stem(x)))


def run(block, images, prepared, autocast=None):
    """Output and gradients of one pass."""
    block.zero_grad()
    images = images.clone().requires_grad_()
    context = PreparedWeights(block).in_use() if prepared else contextlib.nullcontext()
    with torch.autocast("cpu", autocast, enabled=autocast is not None), context:
        output = block(images)
    (output.float() ** 2).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    return output.detach().float(), gradients | {"images": images.grad}


def test_a_folded_norm_gives_output_and_gradients_of_convolution_and_norm():
    torch.manual_seed(0)
    block, images = Block(), torch.randn(2, 3, 9, 11)
    state = {name: x.clone() for name, x in block.state_dict().items()}
    (expected, theirs), (found, ours) = (run(block, images, x) for x in (False, True))
    torch.testing.assert_close(found, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert block.stem.weight.grad is None
    assert state.keys() == block.state_dict().keys()
    assert all(torch.equal(state[name], x) for name, x in block.state_dict().items())
    assert type(block.body.norm) is FrozenBatchNorm2d
    assert block.body.bias is None


def test_under_autocast_folding_costs_no_precision():
    """Against float32, gradients err no more than those of convolution and norm under autocast."""
    torch.manual_seed(0)
    block, images = Block(), torch.randn(8, 3, 17, 17)
    _, exact = run(block, images, prepared=False)
    _, plain = run(block, images, prepared=False, autocast=torch.bfloat16)
    _, ours = run(block, images, prepared=True, autocast=torch.bfloat16)
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() < 1.5 * (plain[name] - gradient).norm() + 0.005 * gradient.norm(), name


def test_the_cast_alone_is_equal_to_the_bit():
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)
    (expected, theirs), (found, ours) = (run(block, x, prepared, torch.bfloat16) for prepared in (False, True))
    assert torch.equal(found, expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_passes_before_the_backward_pass():
    torch.manual_seed(0)
    block, x, sums = nn.Linear(4, 4), torch.randn(3, 4), []
    prepared = PreparedWeights(block)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), prepared.in_use():
            sums.append(block(x).sum())
    sums[0].backward()
    once = block.weight.grad.clone()
    sums[1].backward()
    torch.testing.assert_close(block.weight.grad, 2 * once)


def test_a_weight_that_is_not_used_has_no_gradient():
    pair = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with torch.autocast("cpu", torch.bfloat16), PreparedWeights(pair).in_use():
        pair[0](torch.randn(3, 4)).sum().backward()
    assert pair[0].weight.grad is not None
    assert pair[1].weight.grad is None


def test_after_an_error_the_layers_have_their_own_weights():
    block = Block()
    with pytest.raises(RuntimeError), PreparedWeights(block).in_use():
        block(torch.randn(1, 5, 9, 9))
    assert isinstance(block.body.weight, nn.Parameter)
    assert type(block.body.norm) is FrozenBatchNorm2d


def test_what_is_left_alone():
    """Without gradients nothing is prepared; layers named in FLOAT32, subclasses and float64 keep their weights."""

    class Standardised(nn.Conv2d):
        """Does something else with its weight."""

    block = nn.Module()
    block.FLOAT32 = ("wide",)
    block.wide, block.other, block.linear = nn.Linear(2, 2), Standardised(2, 2, 1), nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16), PreparedWeights(block).in_use():
        assert [block.wide.weight.dtype, block.other.weight.dtype] == [torch.float32] * 2
        assert block.linear.weight.dtype == block.linear.bias.dtype == torch.bfloat16
        with torch.no_grad(), PreparedWeights(block.wide).in_use():
            assert block.wide.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), PreparedWeights(block.double()).in_use():
        assert block.linear.weight.dtype == torch.float64


def test_norms_as_factor_and_summand():
    """(x - mean) / sqrt(var + eps) * weight + bias with mean 3, var 4 - eps, weight 10, bias 1: 5 x - 14."""
    norm = FrozenBatchNorm2d(1)
    for name, value in (("running_mean", 3.0), ("running_var", 4 - norm.eps), ("weight", 10.0), ("bias", 1.0)):
        getattr(norm, name).fill_(value)
    other = FrozenBatchNorm2d(1, eps=0.5)
    factors, summands = affine([norm, other])
    assert factors[norm].shape == (1, 1, 1, 1)
    torch.testing.assert_close(torch.stack([factors[norm].flatten(), summands[norm]]), torch.tensor([[5.0], [-14.0]]))
    assert other not in factors


def test_copies_and_pickles_make_their_own_blanks():
    block = nn.Linear(3, 3)
    prepared = PreparedWeights(block)
    with torch.autocast("cpu", torch.bfloat16), prepared.in_use():
        block(torch.randn(2, 3))
    assert prepared._blanks
    assert not copy.deepcopy(prepared)._blanks
    assert not pickle.loads(pickle.dumps(prepared))._blanks


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_pass_of_every_system_is_that_without_preparation(toy_model, system, monkeypatch):
    torch.set_num_threads(1)
    model, batch, results = toy_model(system).train(), make_batch(2, 0), []
    for used in (True, False):
        if not used:
            monkeypatch.setattr(PreparedWeights, "_prepare", lambda self: [])
        model.zero_grad()
        torch.manual_seed(3)
        losses = model(batch)
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert our_gradients.keys() == their_gradients.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    for name, gradient in their_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(our_gradients[name] / scale, gradient / scale, rtol=0, atol=5e-3)
