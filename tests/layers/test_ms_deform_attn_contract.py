"""What the operator must refuse, by the name of the argument: the functions, and the operators themselves."""

import numpy as np
import pytest
import torch
from naming import naming
from op_cases import make_fused_inputs, make_inputs

from dn_detr_d2.layers import MultiScaleDeformableAttention, missing_kernel, ms_deform_attn, ms_deform_attn_fused

needs_kernel = pytest.mark.skipif(bool(missing_kernel("cpu")), reason=missing_kernel("cpu") or "-")

# What is done to one argument of (value, spatial_shapes, points, weights), and the name that the message must hold. The last
# two are called differently in the two forms.
TENSOR_FAULTS = {
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "one dimension less": lambda x: x[0],
    "one dimension more": lambda x: x[None],
    "a scalar": lambda x: x.flatten()[0],
}
NOT_TENSORS = {"a list": lambda x: x.tolist(), "an array": lambda x: x.numpy(), "nothing": lambda x: None}
VALUE_FAULTS = {
    "more images": lambda x: torch.cat([x, x]),
    "more cells": lambda x: torch.cat([x, x[:, :1]], 1),
    "fewer cells": lambda x: x[:, 1:],
    "fewer heads": lambda x: x[:, :, :1],
}
POINT_FAULTS = {
    "more images": lambda x: torch.cat([x, x]),
    "fewer queries": lambda x: x[:, :-1],
    "more heads": lambda x: torch.cat([x, x], 2),
    "fewer levels": lambda x: x[:, :, :, :1],
    "fewer points": lambda x: x[:, :, :, :, :-1],
}
SHAPE_FAULTS = {
    "one level less": lambda s: s[:1],
    "one level more": lambda s: [*s, (1, 1)],
    "a larger level": lambda s: [(s[0][0] + 1, s[0][1]), s[1]],
    "a smaller level": lambda s: [(s[0][0] - 1, s[0][1]), s[1]],
    "a negative size": lambda s: [(-s[0][0], -s[0][1]), s[1]],
    "a huge size": lambda s: [(2**40, 2**40), s[1]],
}
PYTHON_SHAPE_FAULTS = {
    "a tensor": lambda s: torch.tensor(s),
    "an array": lambda s: np.array(s),
    "flat": lambda s: [x for pair in s for x in pair],
    "floats": lambda s: [(float(a), b) for a, b in s],
    "bools": lambda s: [(True, b) for _, b in s],
    "triples": lambda s: [(a, b, 1) for a, b in s],
    "nothing": lambda s: None,
    "a number": lambda s: 30,
}
REFERENCE_FAULTS = {
    **TENSOR_FAULTS,
    "three numbers": lambda x: x[..., :3],
    "fewer queries": lambda x: x[:, :1],
    "more images": lambda x: torch.cat([x, x]),
    "fewer levels": lambda x: x[:, :, :1],
}

PLAIN_NAMES = ("value", "spatial_shapes", "sampling_locations", "attention_weights")
FUSED_NAMES = ("value", "spatial_shapes", "reference", "sampling_offsets", "attention_logits")


def violations(names, python):
    """(argument, fault, change) for all arguments of one form."""
    for name in names:
        if name == "spatial_shapes":
            faults = {**SHAPE_FAULTS, **(PYTHON_SHAPE_FAULTS if python else {})}
        elif name == "reference":
            faults = {**REFERENCE_FAULTS, **(NOT_TENSORS if python else {})}
        else:
            own = VALUE_FAULTS if name == "value" else POINT_FAULTS
            faults = {**TENSOR_FAULTS, **own, **(NOT_TENSORS if python else {})}
        yield from ((name, fault, change) for fault, change in faults.items())


PLAIN, FUSED = list(violations(PLAIN_NAMES, True)), list(violations(FUSED_NAMES, True))
# The dispatcher itself refuses or reroutes mixed devices and layouts before an operator is asked.
PLAIN_OP, FUSED_OP = (
    [x for x in violations(names, False) if x[1] not in ("another device", "sparse")]
    for names in (PLAIN_NAMES, FUSED_NAMES)
)
assert len(PLAIN) + len(FUSED) >= 80
assert len(PLAIN_OP) + len(FUSED_OP) >= 80


def spoil(arguments, names, name, change):
    changed = list(arguments)
    changed[names.index(name)] = change(changed[names.index(name)])
    return changed


def flat(arguments):
    return [[size for shape in x for size in shape] if isinstance(x, list) else x for x in arguments]


def assert_named(error, name, names, fault):
    """The message holds the argument's name, or that of one it no longer fits; of what is no tensor it begins with it."""
    text = str(error.value)
    if (fault in TENSOR_FAULTS or fault in NOT_TENSORS) and (name, fault) != ("value", "another device"):
        assert text.removeprefix("ms_deform_attn: ").startswith(name), text
    assert any(other in text for other in (names if name in names else (name,))), text
    partners = {"value": names, "spatial_shapes": ("spatial_shapes", "value"), "reference": ("reference",)}
    assert any(partner in text for partner in partners.get(name, (name, names[-1], names[-2], "spatial_shapes"))), text


@pytest.mark.parametrize(("name", "fault", "change"), PLAIN, ids=[f"{n}: {f}" for n, f, _ in PLAIN])
def test_function_refuses(name, fault, change):
    arguments = make_inputs(n=1, q=3, dtype=torch.float32)
    with pytest.raises((TypeError, ValueError)) as error:
        ms_deform_attn(*spoil(arguments, PLAIN_NAMES, name, change))
    assert_named(error, name, PLAIN_NAMES, fault)


@pytest.mark.parametrize(("name", "fault", "change"), FUSED, ids=[f"{n}: {f}" for n, f, _ in FUSED])
def test_fused_function_refuses(name, fault, change):
    arguments = make_fused_inputs(4, n=1, q=3)
    with pytest.raises((TypeError, ValueError)) as error:
        ms_deform_attn_fused(*spoil(arguments, FUSED_NAMES, name, change))
    assert_named(error, name, FUSED_NAMES, fault)


@needs_kernel
@pytest.mark.parametrize(("name", "fault", "change"), PLAIN_OP, ids=[f"{n}: {f}" for n, f, _ in PLAIN_OP])
def test_registered_operator_refuses(name, fault, change):
    arguments = flat(spoil(make_inputs(n=1, q=3), PLAIN_NAMES, name, change))
    with pytest.raises(RuntimeError) as error:
        torch.ops.dn_detr_d2.ms_deform_attn(*arguments)
    assert_named(error, name, PLAIN_NAMES, fault)
    with pytest.raises(RuntimeError):
        torch.ops.dn_detr_d2.ms_deform_attn_backward(torch.zeros(1, 3, 8, dtype=torch.float64), *arguments)


@needs_kernel
@pytest.mark.parametrize(("name", "fault", "change"), FUSED_OP, ids=[f"{n}: {f}" for n, f, _ in FUSED_OP])
def test_registered_fused_operator_refuses(name, fault, change):
    arguments = flat(spoil(make_fused_inputs(4, n=1, q=3), FUSED_NAMES, name, change))
    with pytest.raises(RuntimeError) as error:
        torch.ops.dn_detr_d2.ms_deform_attn_fused(*arguments)
    assert_named(error, name, FUSED_NAMES, fault)


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [lambda g: g[:, :1], lambda g: g[..., :-1], lambda g: g.float(), lambda g: g[0]],
    ids=["fewer queries", "fewer channels", "float32", "no batch"],
)
def test_backward_refuses_a_gradient_that_does_not_fit(change):
    value, shapes, loc, weights = make_inputs()
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.dn_detr_d2.ms_deform_attn_backward(
            change(torch.zeros(1, 3, 8, dtype=torch.float64)), value, flat([shapes])[0], loc, weights
        )


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_a_level_without_cells_adds_nothing(backend):
    """Offsets in cells of a level of size 0 were divided by it: all of the output was NaN."""
    shapes = [(6, 5), (0, 4), (3, 2)]
    torch.manual_seed(0)
    value, reference = torch.randn(1, 36, 2, 4), torch.rand(1, 3, 3, 2)
    offsets, logits = torch.randn(1, 3, 2, 3, 2, 2), torch.randn(1, 3, 2, 3, 2)

    def run(*tensors):
        return ms_deform_attn_fused(tensors[0], shapes, *tensors[1:], backend=backend)

    expected = run(value, reference, offsets, logits)
    assert expected.isfinite().all()
    compiled = torch.compile(run, backend="eager", fullgraph=True)(value, reference, offsets, logits)
    torch.testing.assert_close(compiled, expected)


@needs_kernel
@pytest.mark.parametrize("fused", [True, False])
def test_forward_mode_is_refused_where_it_would_be_zero(fused):
    value = torch.randn(1, 4, 1, 4)
    places, weights = torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)

    def run(x):
        if fused:
            return ms_deform_attn_fused(x, [(2, 2)], torch.rand(1, 3, 1, 2), places, weights)
        return ms_deform_attn(x, [(2, 2)], places, weights)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(run, (value,), (torch.ones_like(value),))
    with torch.autograd.forward_ad.dual_level():
        assert run(value).shape == (1, 3, 4)  # what carries no gradient is taken


@needs_kernel
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_torch_func_are_refused_with_a_way_out_that_works(fused):
    places, weights = torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
    value, reference = torch.randn(2, 1, 4, 1, 4), torch.rand(1, 3, 1, 2)

    def run(x, backend):
        if fused:
            return ms_deform_attn_fused(x, [(2, 2)], reference, places, weights, backend).sum()
        return ms_deform_attn(x, [(2, 2)], places, weights, backend).sum()

    for transformed in (torch.func.grad(run), torch.vmap(torch.func.grad(run), in_dims=(0, None))):
        x = value[0] if transformed.__wrapped__ is run else value
        with pytest.raises(NotImplementedError, match=naming("torch.func", "backend 'torch'", "torch.autograd.grad")):
            transformed(x, "auto")
        assert transformed(x, "torch").shape == x.shape
    one = value[0].requires_grad_()
    (expected,) = torch.autograd.grad(run(one, "auto"), one)
    torch.testing.assert_close(torch.func.grad(run)(value[0].detach(), "torch"), expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_shapes_are_found_on_the_meta_device(backend):
    made = [torch.empty(shape, device="meta") for shape in ((2, 36, 2, 4), (2, 5, 2, 3, 2, 2), (2, 5, 2, 3, 2))]
    reference = torch.empty(2, 5, 3, 4, device="meta")
    shapes = [(6, 5), (2, 2), (1, 2)]
    found = ms_deform_attn_fused(made[0], shapes, reference, *made[1:], backend=backend)
    assert (found.shape, found.device.type) == ((2, 5, 8), "meta")


def test_attention_runs_on_the_meta_device(toy_model):
    """To find shapes without computing anything."""
    model = toy_model("dn_deformable_detr").eval()
    layer = model.encoder.layers[0].to("meta")
    attention = next(x for x in layer.modules() if isinstance(x, MultiScaleDeformableAttention))
    dim, levels = attention.value_proj.in_features, attention.num_levels
    shapes = [(4, 6), (2, 3), (1, 2), (1, 1)][:levels]
    cells = sum(height * width for height, width in shapes)
    value = torch.empty(1, cells, dim, device="meta")
    reference = torch.empty(1, cells, levels, 2, device="meta")
    padding = torch.zeros(1, cells, dtype=torch.bool, device="meta")
    assert attention(value, reference, value, padding, shapes).shape == value.shape
