"""Batch norms that do not change any more, folded into the convolutions before them."""

import torch
from torch import Tensor, nn

BUFFERS = {"weight", "bias", "running_mean", "running_var"}


@torch.no_grad()
def fold_norms(model: nn.Module) -> int:
    """Folds fixed batch norms into Detectron2's convolutions, in place, and stores all convolutions channels last.

    A batch norm of fixed statistics is a factor and a summand a channel: the factor goes into the weights, the summand into
    the bias, and the norm is gone. Outputs are the same but for rounding. For inference alone: afterwards the parameters
    have other names, so a checkpoint can be neither read nor written.

    Args:
        model: in evaluation mode.

    Returns:
        int: how many norms are gone. Those of networks that do not use ``detectron2.layers.Conv2d`` stay.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("fold_norms() needs a model in evaluation mode, got one in training mode; call model.eval()")
    folded = 0
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if _is_fixed(getattr(module, "norm", None)):
            factor, summand = _affine(module.norm)
            bias = summand if module.bias is None else summand + factor * module.bias
            module.weight = nn.Parameter(module.weight * factor[:, None, None, None], requires_grad=False)
            module.bias = nn.Parameter(bias, requires_grad=False)
            module.norm = None
            folded += 1
        module.to(memory_format=torch.channels_last)
    return folded


def _is_fixed(norm: nn.Module | None) -> bool:
    """Whether a norm uses statistics of its own: a batch norm, or Detectron2's FrozenBatchNorm2d, all of whose numbers are
    buffers."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm.track_running_stats and not norm.training
    return norm is not None and {name for name, _ in norm.named_buffers(recurse=False)} == BUFFERS


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(C,) factor and summand of a fixed batch norm."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is None:  # BatchNorm2d(affine=False)
        return factor, -norm.running_mean * factor
    factor = factor * norm.weight
    return factor, norm.bias - norm.running_mean * factor
