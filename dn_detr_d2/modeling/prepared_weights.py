"""Weights as a training step needs them, made for many layers at once instead of layer by layer.

Under autocast every linear layer and convolution casts its weight and its bias, and their gradients back; every frozen batch
norm makes a factor and a summand of its four buffers and applies them to a map: ten to twenty small operators a layer. Here
the weights of a part are cast together, after the factors of frozen norms have been multiplied into them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..layers import autocast_dtype, lowered

# Layers that use their weight and bias for one linear map and nothing else; a subclass might standardise them before.
LINEAR_MAPS = (nn.Linear, nn.Conv2d, Conv2d)


class PreparedWeights:
    """What the layers of a part are given in the place of their weights while it runs.

    Parameters, buffers and their names stay as they are, and gradients arrive at the parameters. Casting gives the very
    numbers of autocast. A frozen batch norm becomes a part of the convolution before it: the same but for rounding, as it is
    between Detectron2's two forms of that norm.

    Args:
        part: whose linear layers and convolutions are prepared. Modules inside it that switch autocast off for some of their
            children must name these in an attribute ``FLOAT32``; their weights stay as they are, and so do those of modules
            that are compiled: a compiler joins casts and norms with what is around them.
    """

    def __init__(self, part: nn.Module):
        self.part = part
        self._blanks: dict[tuple, list[Tensor]] = {}

    def __getstate__(self) -> dict:
        """Without the blanks: copies and pickles make their own."""
        return {**self.__dict__, "_blanks": {}}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers of the part use prepared weights inside the context, where gradients are wanted; elsewhere and under
        tracers and compilers, which see through the operators themselves, nothing is changed."""
        swapped: list[tuple[dict, str, object]] = []
        if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            for entries, name, value in self._prepare():
                swapped.append((entries, name, entries[name]))
                entries[name] = value
        try:
            yield
        finally:
            for entries, name, value in reversed(swapped):
                entries[name] = value

    def _prepare(self) -> list[tuple[dict, str, Tensor | None]]:
        """What to put into the dicts of the modules: (dict, name, value)."""
        apart = [getattr(x, name) for x in self.part.modules() for name in getattr(x, "FLOAT32", ())]
        apart += [x for x in self.part.modules() if x._compiled_call_impl is not None]
        left_out = {inner for module in apart for inner in module.modules()}
        layers = {n: m for n, m in self.part.named_modules() if type(m) in LINEAR_MAPS and m not in left_out}
        found, groups, prepared = [], {}, {}
        factors, summands = affine([x.norm for x in layers.values() if _has_frozen_norm(x)])
        for name, layer in layers.items():
            factor = None
            if _has_frozen_norm(layer) and layer.norm in factors:
                factor = factors[layer.norm]
                found += [(layer._modules, "norm", None), (layer._parameters, "bias", summands[layer.norm])]
            for key, x in layer._parameters.items():
                if x is not None:
                    found.append((layer._parameters, key, x))
                    # A group for each child, so that gradients of the last ones can be all-reduced while earlier ones run.
                    group = groups.setdefault((name.split(".")[0], x.requires_grad, x.dtype, factor is not None), {})
                    group[x] = factor
        for key, group in groups.items():
            prepared |= self._group(key, group)
        return [(entries, name, prepared.get(x, x)) for entries, name, x in found]

    def _group(self, key: tuple, factors: dict[nn.Parameter, Tensor | None]) -> dict[nn.Parameter, Tensor]:
        """The prepared form of parameters, by parameter; those that need none are left out."""
        weights, dtype = list(factors), autocast_dtype(next(iter(factors)))
        blanks = None
        if dtype is not None:
            blanks = self._blanks.get(key, [])
            shapes = [(x.shape, x.device, dtype) for x in weights]
            if [(x.shape, x.device, x.dtype) for x in blanks] != shapes:
                blanks = self._blanks[key] = [torch.empty_like(x, dtype=dtype, requires_grad=False) for x in weights]
        scales = [x for x in factors.values() if x is not None]
        if not scales and blanks is None:
            return {}
        return dict(zip(weights, _Prepare.apply(scales, blanks, *weights), strict=True))


class _Prepare(torch.autograd.Function):
    """Weights times factors, if there are any, in the dtype of blank tensors of the same shapes, if there are any."""

    @staticmethod
    def forward(ctx, factors: list[Tensor], blanks: list[Tensor] | None, *weights: Tensor) -> tuple[Tensor, ...]:
        """The prepared weights; ``factors`` is empty, or one a weight."""
        ctx.set_materialize_grads(False)  # a weight that was not used has no gradient
        ctx.factors, ctx.weights = factors, None if blanks is None else weights
        result = torch._foreach_mul(weights, factors) if factors else weights
        return tuple(result if blanks is None else _copies(blanks, result))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Their gradients as those of the weights."""
        used = [i for i, x in enumerate(gradients) if x is not None]
        found = [gradients[i] for i in used]
        if found and ctx.weights is not None:
            found = _copies([ctx.weights[i] for i in used], found)
        if found and ctx.factors:
            found = torch._foreach_mul(found, [ctx.factors[i] for i in used])
        result = [None] * len(gradients)
        for i, x in zip(used, found, strict=True):
            result[i] = x
        return None, None, *result


def _copies(like: Sequence[Tensor], content: Sequence[Tensor]) -> Sequence[Tensor]:
    """Fresh tensors like the first ones, filled with the numbers of the second: what casts many tensors in two operators."""
    fresh = torch._foreach_clone(like)
    torch._foreach_copy_(fresh, content)
    return fresh


def affine(norms: list[FrozenBatchNorm2d]) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """By norm: the factor (C, 1, 1, 1) and the summand (C,) that it comes to.

    The summands are in the dtype that convolutions take. Norms whose ``eps``, dtype or device are not those of the first are
    left out.
    """
    kind = [(x.eps, x.weight.dtype, x.weight.device) for x in norms]
    norms = [norm for norm, own in zip(norms, kind, strict=True) if own == kind[0]]
    if not norms:
        return {}, {}
    with torch.no_grad():
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (torch.cat([getattr(x, name) for x in norms]) for name in names)
        factor = weight * (variance + norms[0].eps).rsqrt()
        summand = bias - mean * factor
        summand = lowered(summand)
        sizes = [len(x.weight) for x in norms]
        factors, summands = factor.view(-1, 1, 1, 1).split(sizes), summand.split(sizes)
    return dict(zip(norms, factors, strict=True)), dict(zip(norms, summands, strict=True))


def _has_frozen_norm(layer: nn.Module) -> bool:
    """Whether the layer is a convolution without bias before a frozen batch norm."""
    return type(layer) is Conv2d and layer.bias is None and type(layer.norm) is FrozenBatchNorm2d
