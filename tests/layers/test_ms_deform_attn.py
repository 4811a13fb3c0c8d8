"""The operator on every backend of this machine: slow loops, the specification's fixture, gradients, sizes, dtypes, NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import fixture, loop_reference, make_fused_inputs, make_inputs

from dn_detr_d2.layers import missing_kernel, ms_deform_attn, ms_deform_attn_fused
from dn_detr_d2.layers.ms_deform_attn import locations_from_boxes, locations_from_points

needs_kernel = pytest.mark.skipif(bool(missing_kernel("cpu")), reason=missing_kernel("cpu") or "-")
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]
backends = pytest.mark.parametrize("backend", BACKENDS)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gradients(out, tensors):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    upstream = upstream.bfloat16().to(out)  # the same number in every dtype
    return torch.autograd.grad(out, tensors, upstream)


@backends
def test_fixture_of_the_specification_to_the_digit(backend):
    value, shapes, loc, weights = fixture()
    tensors = [x.requires_grad_() for x in (value, loc, weights)]
    out = ms_deform_attn(value, shapes, loc, weights, backend)
    expected = [-0.25296, -0.4214, -0.06286, -0.11409, -0.23941, -0.47266]
    torch.testing.assert_close(out[0, 0], torch.tensor(expected, dtype=torch.float64), atol=5e-6, rtol=0)
    expected = [0.4207, -0.24519, 0.51727, 0.34767, -0.17034, -0.04521]
    torch.testing.assert_close(out[1, 3], torch.tensor(expected, dtype=torch.float64), atol=5e-6, rtol=0)
    assert out.sum().item() == pytest.approx(-1.275461, abs=1e-6)
    gv, gl, gw = torch.autograd.grad(out.sum(), tensors)
    assert gv.sum().item() == pytest.approx(30.027612, abs=1e-6)
    assert (gl.sum().item(), gl.abs().sum().item()) == pytest.approx((-29.649384, 122.290195), abs=1e-6)
    assert (gw.sum().item(), gw.abs().sum().item()) == pytest.approx((-5.496715, 46.141837), abs=1e-6)


@backends
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "n": st.integers(0, 3),
            "q": st.integers(0, 4),
            "h": st.integers(0, 3),
            "d": st.integers(0, 9),
            "k": st.integers(0, 3),
            "shapes": st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3),
            "seed": st.integers(0, 1000),
        }
    )
)
def test_equals_a_loop_over_every_corner(backend, sizes):
    value, shapes, loc, weights = make_inputs(**sizes)
    out = ms_deform_attn(value, shapes, loc, weights, backend)
    torch.testing.assert_close(out, loop_reference(value, shapes, loc, weights), atol=1e-12, rtol=1e-12)


ONE = [(3, 4)]
TWO = [(4, 6), (2, 3)]
# Channels around and beyond the widths of vectors, then points, levels, heads, images, queries, and zeros of each.
GRADCHECK = [
    *({"d": d, "shapes": ONE, "q": 2} for d in (*range(1, 18), 23, 24, 30, 31, 32, 33, 47, 48, 63, 64, 65, 71)),
    *({"d": d, "shapes": ONE, "q": 1, "h": 1, "k": 1} for d in (128, 256, 1025)),
    *({"k": k, "shapes": TWO} for k in (1, 3, 4, 5, 8, 9)),
    *({"shapes": [(2, 2)] * levels} for levels in (1, 3, 5, 9)),
    *({"h": h, "shapes": TWO} for h in (1, 3, 8)),
    *({"n": n, "shapes": TWO} for n in (2, 3)),
    *({"q": q, "shapes": ONE} for q in (1, 13)),
    {"shapes": [(1, 1)]},
    {"shapes": [(1, 7), (7, 1)]},
    {"shapes": [(0, 3), (2, 2)]},
    *({"shapes": TWO, name: 0} for name in ("n", "q", "h", "d", "k")),
    {"shapes": []},
]
assert len(GRADCHECK) >= 50


@needs_kernel
@pytest.mark.parametrize("sizes", GRADCHECK, ids=str)
def test_gradcheck(sizes):
    value, shapes, loc, weights = make_inputs(**sizes)
    inputs = [x.requires_grad_() for x in (value, loc, weights)]
    # The full Jacobian where it is small, random projections of it where it is not.
    fast = value.numel() > 400
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w, "cpu"), inputs, fast_mode=fast)


@backends
@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize(
    "sizes", [{}, {"k": 4, "d": 8, "n": 2}, {"k": 0}, {"q": 0}, {"shapes": []}, {"k": 5, "h": 3}], ids=str
)
def test_gradcheck_of_the_fused_form(backend, dims, sizes):
    value, shapes, reference, offsets, logits = make_fused_inputs(dims, **sizes)
    inputs = [x.requires_grad_() for x in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(lambda v, r, o, x: ms_deform_attn_fused(v, shapes, r, o, x, backend), inputs)


@backends
@pytest.mark.parametrize("dims", [2, 4])
def test_fused_form_is_softmax_and_locations_and_the_operator(backend, dims):
    value, shapes, reference, offsets, logits = make_fused_inputs(dims, n=2, q=5, k=3)
    inputs = [x.requires_grad_() for x in (value, reference, offsets, logits)]
    locate = locations_from_boxes if dims == 4 else locations_from_points
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    separate = ms_deform_attn(value, shapes, locate(reference, offsets, shapes), weights, "torch")
    fused = ms_deform_attn_fused(value, shapes, reference, offsets, logits, backend)
    torch.testing.assert_close(fused, separate, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(fused, inputs), gradients(separate, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@needs_kernel
@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
def test_softmax_in_float32_is_as_exact_as_pytorchs(spread):
    """A point on a single cell of value 1: the output is the sum of the weights of one point, for every point."""
    count = 37
    logits = torch.randn(64, 1, 1, 1, count, generator=torch.Generator().manual_seed(1)) * spread
    exact = logits.double().flatten(3).softmax(-1).flatten()
    value = torch.ones(64, count, 1, 1)
    shapes = [(1, count)]
    # Point k sits on the centre of cell k; the gradient of cell k is then the weight of point k.
    offsets = torch.stack([torch.arange(count) - (count - 1) / 2, torch.zeros(count)], -1).expand(64, 1, 1, 1, count, 2)
    reference = torch.full((64, 1, 1, 2), 0.5)
    value.requires_grad_()
    ms_deform_attn_fused(value, shapes, reference, offsets, logits, "cpu").sum().backward()
    # Locations are rounded too, so a neighbour gets up to count * 2^-24 of a weight.
    torch.testing.assert_close(value.grad.flatten().double(), exact, atol=4e-6, rtol=4e-6)


@backends
def test_any_batch(backend):
    value, shapes, loc, weights = make_inputs(n=257, q=2, d=3)
    everything = ms_deform_attn(value, shapes, loc, weights, backend)
    for n in range(258):
        torch.testing.assert_close(
            ms_deform_attn(value[:n], shapes, loc[:n], weights[:n], backend), everything[:n], atol=1e-12, rtol=0
        )


@backends
def test_points_far_outside_contribute_nothing(backend):
    value, shapes, loc, weights = (x.float() if isinstance(x, torch.Tensor) else x for x in fixture())
    for far in (-1.0, 2.0, 1e30, -1e30, 3e38):
        assert ms_deform_attn(value, shapes, torch.full_like(loc, far), weights, backend).abs().max() == 0


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_location_that_is_not_finite_shows_in_its_query_and_head_only(backend, bad, dtype):
    for axis in (0, 1):
        value, shapes, loc, weights = make_inputs(n=2, q=3, dtype=dtype)
        loc[1, 2, 0, 1, 1, axis] = bad
        out = ms_deform_attn(value, shapes, loc, weights, backend).unflatten(-1, (2, -1))
        assert out[1, 2, 0].isnan().all()
        out[1, 2, 0] = 0
        assert out.isfinite().all()


@backends
@pytest.mark.parametrize("place", ["value", "weight", "logit", "offset", "reference"])
def test_nan_elsewhere_is_not_hidden(backend, place):
    value, shapes, reference, offsets, logits = make_fused_inputs(4)
    weights = logits.clone()
    tensors = {"value": value, "weight": weights, "logit": logits, "offset": offsets, "reference": reference}
    tensors[place].view(-1)[0] = float("nan")
    if place == "weight":
        out = ms_deform_attn(value, shapes, torch.full((*weights.shape, 2), 0.5, dtype=value.dtype), weights, backend)
    elif place == "value":
        loc = torch.full((*weights.shape, 2), 1e-3, dtype=value.dtype)  # next to the first cell
        out = ms_deform_attn(value, shapes, loc, weights, backend)
    else:
        out = ms_deform_attn_fused(value, shapes, reference, offsets, logits, backend)
    assert out.isnan().any()


@backends
@pytest.mark.parametrize("shapes", [[(2, 2), (0, 0)], [(2, 2), (0, 3)]], ids=str)
def test_a_weight_that_is_nan_shows_on_an_empty_level_too(backend, shapes):
    value, places = torch.ones(1, 4, 1, 4), torch.full((1, 1, 1, 2, 1, 2), 0.5)
    weights = torch.tensor([1.0, float("nan")]).view(1, 1, 1, 2, 1)
    assert ms_deform_attn(value, shapes, places, weights, backend).isnan().all()
    assert ms_deform_attn(value, shapes, places, weights.nan_to_num(7.0), backend).tolist() == [[[1.0] * 4]]


@backends
def test_a_location_outside_has_no_gradient_whatever_its_weight(backend):
    value, places = torch.ones(1, 4, 1, 4), torch.full((1, 1, 1, 1, 1, 2), 5.0, requires_grad=True)
    for weight in (1.0, float("nan"), float("inf")):
        out = ms_deform_attn(value, [(2, 2)], places, torch.full((1, 1, 1, 1, 1), weight), backend)
        (gradient,) = torch.autograd.grad(out.sum(), places)
        assert gradient.tolist() == [[[[[[0.0, 0.0]]]]]]


@backends
def test_gradients_of_a_location_that_is_nan_are_nan(backend):
    value, shapes, loc, weights = make_inputs()
    loc[0, 1, 1, 0, 1, 0] = float("nan")
    inputs = [x.requires_grad_() for x in (loc, weights)]
    grad_loc, grad_weights = gradients(ms_deform_attn(value, shapes, loc, weights, backend), inputs)
    assert grad_loc[0, 1, 1, 0, 1, 0].isnan() or grad_weights[0, 1, 1, 0, 1].isnan()
    assert grad_loc[0, 0].isfinite().all()
    assert grad_weights[0, 0].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("point_dtype", FLOATS)
@pytest.mark.parametrize("sizes", [{"d": 32}, {"d": 7, "q": 60}, {"d": 48, "n": 2}], ids=str)
def test_every_mixture_of_dtypes(backend, dtype, point_dtype, sizes):
    value, shapes, loc, weights = make_inputs(dtype=dtype, point_dtype=point_dtype, **sizes)
    inputs = [x.requires_grad_() for x in (value, loc, weights)]
    out = ms_deform_attn(value, shapes, loc, weights, backend)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = ms_deform_attn(exact_inputs[0], shapes, *exact_inputs[1:], "torch")
    assert out.dtype == dtype
    # Rounding of the result, and of sums in float32 unless everything is float64.
    tolerance = torch.finfo(dtype).eps + (1e-5 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    for ours, theirs, x in zip(gradients(out, inputs), gradients(exact, exact_inputs), inputs, strict=True):
        assert ours.dtype == x.dtype
        tolerance = 2 * torch.finfo(x.dtype).eps + (2e-4 if dtype != torch.float64 else 1e-11)
        if point_dtype in (torch.bfloat16, torch.float16) and backend == "torch" and dtype != torch.float64:
            tolerance *= 4
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * theirs.abs().max().item(), rtol=tolerance)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_equals_the_reference_at_the_size_of_an_encoder(dtype):
    shapes = [(25, 42), (13, 21), (7, 11), (4, 6)]
    value, shapes, loc, weights = make_inputs(n=2, q=300, h=8, d=32, k=4, shapes=shapes, dtype=dtype)
    inputs = [x.requires_grad_() for x in (value, loc, weights)]
    ours, theirs = (ms_deform_attn(value, shapes, loc, weights, backend) for backend in ("cpu", "torch"))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@backends
def test_non_contiguous_inputs_give_the_same(backend):
    value, shapes, loc, weights = make_inputs(n=2, q=4, d=8)
    expected = ms_deform_attn(value, shapes, loc, weights, backend)
    strided = [torch.stack([x, x], -1)[..., 0] for x in (value, loc, weights)]
    torch.testing.assert_close(ms_deform_attn(strided[0], shapes, *strided[1:], backend), expected)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, loc, weights)]
    torch.testing.assert_close(ms_deform_attn(turned[0], shapes, *turned[1:], backend), expected)
    inputs = [x.detach().requires_grad_() for x in turned]
    ours = gradients(ms_deform_attn(inputs[0], shapes, *inputs[1:], backend), inputs)
    plain = [x.requires_grad_() for x in (value, loc, weights)]
    for a, b in zip(ours, gradients(ms_deform_attn(value, shapes, loc, weights, backend), plain), strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_images_heads_and_queries_do_not_mix(backend):
    value, shapes, loc, weights = make_inputs(n=3, q=5, h=4)
    out = ms_deform_attn(value, shapes, loc, weights, backend).unflatten(-1, (4, -1))
    order = torch.tensor([2, 0, 1]), torch.tensor([4, 2, 0, 1, 3]), torch.tensor([3, 1, 0, 2])
    images, queries, heads = order
    moved = ms_deform_attn(
        value[images][:, :, heads], shapes, *(x[images][:, queries][:, :, heads] for x in (loc, weights)), backend
    ).unflatten(-1, (4, -1))
    torch.testing.assert_close(moved, out[images][:, queries][:, :, heads])


@backends
def test_linear_in_values_and_in_weights(backend):
    value, shapes, loc, weights = make_inputs()
    out = ms_deform_attn(value, shapes, loc, weights, backend)
    torch.testing.assert_close(ms_deform_attn(3 * value, shapes, loc, -2 * weights, backend), -6 * out)


@backends
def test_a_constant_map_gives_the_sum_of_the_weights_inside(backend):
    _, shapes, loc, weights = make_inputs(d=5)
    inside = loc.clamp(0.2, 0.8)
    out = ms_deform_attn(torch.full((1, 30, 2, 5), 2.5, dtype=torch.float64), shapes, inside, weights, backend)
    expected = 2.5 * weights.sum((-2, -1))[..., None].expand(-1, -1, -1, 5).flatten(2)
    deep = [(40, 60), (20, 30)]
    flat = torch.full((1, 3000, 2, 5), 2.5, dtype=torch.float64)
    torch.testing.assert_close(ms_deform_attn(flat, deep, inside, weights, backend), expected)
    assert (out <= expected + 1e-12).all()
