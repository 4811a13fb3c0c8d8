"""How models run at inference: without what autograd needs, in the wanted precision."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype | None:
    """What autocast computes in by the value of ``TEST.AMP``; None for "", which means float32."""
    return DTYPES[name] if name else None


@contextmanager
def inference(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype`` unless that is None; and inference mode, unless gradients are wanted (no ``torch.no_grad``).

    Inference mode drops the counters of versions that autograd checks, a part of what each operator costs the host.
    """
    mode = nullcontext() if torch.is_grad_enabled() else torch.inference_mode()
    with mode, nullcontext() if dtype is None else torch.autocast(device_type, dtype):
        yield


@contextmanager
def after_inference(device_type: str) -> Iterator[None]:
    """Inside :func:`inference`: without autocast, and new tensors are ordinary ones, which may be changed in place."""
    if not torch.is_inference_mode_enabled():
        with torch.autocast(device_type, enabled=False):
            yield
        return
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield
