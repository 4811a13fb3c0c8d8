"""What autocast makes of the inputs of linear maps, where it is better done once than by each of them."""

from contextlib import nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What linear maps cast a tensor to, None where they take it as it is: without autocast, and tensors of float64."""
    kind = x.device.type
    if (
        not _available(kind)
        or not torch.is_autocast_enabled(kind)
        or x.dtype in (torch.float64, torch.get_autocast_dtype(kind))
    ):
        return None
    return torch.get_autocast_dtype(kind)


def lowered(x: Tensor) -> Tensor:
    """``x`` as linear maps take it."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def without_autocast(kind: str):
    """A context without autocast on a kind of device; the meta device, which has shapes alone, has none to begin with."""
    return torch.autocast(kind, enabled=False) if _available(kind) else nullcontext()


def _available(kind: str) -> bool:
    return kind != "meta" and torch.amp.is_autocast_available(kind)
