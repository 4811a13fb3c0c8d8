"""The operator against a slow loop, the fixture of the specification, and its own contract."""

import math

import numpy as np
import pytest
import torch

from dn_detr_d2.layers import ms_deform_attn


def loop_reference(value, shapes, locations, weights):
    """Bilinear sampling written out: one corner at a time, straight from the definition."""
    n, _, h, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    out = torch.zeros(n, q, h, d, dtype=value.dtype)
    for i in np.ndindex(n, q, h, levels, points):
        image, query, head, level, _ = i
        height, width = shapes[level]
        start = sum(a * b for a, b in shapes[:level])
        x = float(locations[i][0]) * width - 0.5
        y = float(locations[i][1]) * height - 0.5
        for cy in (math.floor(y), math.floor(y) + 1):
            for cx in (math.floor(x), math.floor(x) + 1):
                if 0 <= cy < height and 0 <= cx < width:
                    share = (1 - abs(x - cx)) * (1 - abs(y - cy))
                    out[image, query, head] += weights[i] * share * value[image, start + cy * width + cx, head]
    return out.flatten(2)


def fixture():
    """Spec section 1.4, float64."""
    rs = np.random.RandomState(7)
    value, loc = rs.standard_normal((2, 30, 2, 3)), rs.uniform(-0.1, 1.1, (2, 4, 2, 2, 2, 2))
    w = rs.uniform(0, 1, (2, 4, 2, 2, 2))
    w /= w.sum((-1, -2), keepdims=True)
    return torch.tensor(value), [(6, 4), (3, 2)], torch.tensor(loc), torch.tensor(w)


def test_fixture_of_the_specification_to_the_digit():
    value, shapes, loc, weights = fixture()
    tensors = [x.requires_grad_() for x in (value, loc, weights)]
    out = ms_deform_attn(value, shapes, loc, weights)
    expected = [-0.25296, -0.4214, -0.06286, -0.11409, -0.23941, -0.47266]
    torch.testing.assert_close(out[0, 0], torch.tensor(expected, dtype=torch.float64), atol=5e-6, rtol=0)
    assert out.sum().item() == pytest.approx(-1.275461, abs=1e-6)
    gv, gl, gw = torch.autograd.grad(out.sum(), tensors)
    assert gv.sum().item() == pytest.approx(30.027612, abs=1e-6)
    assert (gl.sum().item(), gl.abs().sum().item()) == pytest.approx((-29.649384, 122.290195), abs=1e-6)
    assert (gw.sum().item(), gw.abs().sum().item()) == pytest.approx((-5.496715, 46.141837), abs=1e-6)


@pytest.mark.parametrize(
    ("n", "q", "h", "d", "k", "shapes"),
    [
        (1, 3, 1, 1, 1, [(1, 1)]),
        (2, 5, 2, 3, 2, [(4, 6), (2, 3)]),
        (1, 2, 3, 5, 4, [(5, 1), (1, 7), (2, 2)]),
        (3, 1, 2, 2, 1, [(9, 8)]),
    ],
)
def test_equals_a_loop_over_every_corner_and_passes_gradcheck(n, q, h, d, k, shapes):
    s, levels = sum(a * b for a, b in shapes), len(shapes)
    value = torch.randn(n, s, h, d, dtype=torch.float64, requires_grad=True)
    loc = (torch.rand(n, q, h, levels, k, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(n, q, h, levels, k, dtype=torch.float64, requires_grad=True)
    expected = loop_reference(value.detach(), shapes, loc.detach(), weights.detach())
    torch.testing.assert_close(ms_deform_attn(value, shapes, loc, weights), expected)
    assert torch.autograd.gradcheck(lambda *x: ms_deform_attn(x[0], shapes, x[1], x[2]), (value, loc, weights))


def test_points_far_outside_contribute_nothing():
    value, shapes, loc, weights = fixture()
    assert ms_deform_attn(value, shapes, torch.full_like(loc, 1e30), weights).abs().max() == 0


def test_zero_queries_and_zero_images():
    value, shapes, loc, weights = fixture()
    assert ms_deform_attn(value, shapes, loc[:, :0], weights[:, :0]).shape == (2, 0, 6)
    assert ms_deform_attn(value[:0], shapes, loc[:0], weights[:0]).shape == (0, 4, 6)


def test_non_contiguous_inputs_give_the_same():
    value, shapes, loc, weights = fixture()
    strided = (torch.stack([x, x], -1)[..., 0] for x in (value, loc, weights))
    v, l_, w = strided
    torch.testing.assert_close(ms_deform_attn(v, shapes, l_, w), ms_deform_attn(value, shapes, loc, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_are_sampled_in_float32(dtype):
    value, shapes, loc, weights = (x.float() if isinstance(x, torch.Tensor) else x for x in fixture())
    half = value.to(dtype)
    out = ms_deform_attn(half, shapes, loc, weights)
    assert out.dtype == dtype
    torch.testing.assert_close(out, ms_deform_attn(half.float(), shapes, loc, weights).to(dtype), atol=0, rtol=0)


def test_autocast_does_not_lower_the_precision():
    value, shapes, loc, weights = (x.float() if isinstance(x, torch.Tensor) else x for x in fixture())
    with torch.autocast("cpu", torch.bfloat16):
        inside = ms_deform_attn(value, shapes, loc, weights)
    torch.testing.assert_close(inside, ms_deform_attn(value, shapes, loc, weights), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"value must be \(N, S, H, D\)"),
        (lambda v, s, x, w: (v, [(6, 4), (3, 3)], x, w), "hold 33 cells, but value has S = 30"),
        (lambda v, s, x, w: (v, s, x[..., 0], w), r"sampling_locations must be"),
        (lambda v, s, x, w: (v, s, x, w[:, :1]), "attention_weights must be"),
        (lambda v, s, x, w: (v[:1], s, x, w), "sampling_locations has N = 2 and H = 2, but value has N = 1"),
        (lambda v, s, x, w: (v, [(30, 1)], x, w), "L = 2 levels, but spatial_shapes lists 1"),
    ],
)
def test_wrong_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(*fixture()))
