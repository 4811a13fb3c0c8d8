"""Runs a model in the middle of a training and preserves its state: mode, gradients and random streams."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from torch import nn

from ..data.interruption import agree
from ..errors import ConfigError
from ..utils.distributed import device_of, unwrap
from ..utils.rng import isolated_rng


@contextmanager
def preserve_state(model: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """The model itself, out of DistributedDataParallel, in evaluation mode, without gradients, under a seed of its own.

    Afterwards every module has the mode that it had, and the random streams of Python, NumPy and PyTorch go on from where
    they stood: a training with diagnostics and one without give bitwise identical weights.

    Args:
        model: with or without the wrapper.
        seed: of the three streams inside.
    """
    bare = unwrap(model)
    modes = [(module, module.training) for module in bare.modules()]
    try:
        with isolated_rng(seed, device_of(bare)), torch.no_grad():
            yield bare.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def require_queries(model: nn.Module | type) -> nn.Module | type:
    """The model out of DistributedDataParallel, or its class; raises ConfigError if it has no queries to look at."""
    bare = unwrap(model)
    if not hasattr(bare, "forward_outputs"):
        name = (bare if isinstance(bare, type) else type(bare)).__name__
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE = {name!r} has no object queries, which the diagnostics and pictures of "
            "queries look at; take a config of DenoisingDETR, and leave TEST.INSTABILITY, TEST.VALIDATION_LOSS and "
            "DEBUG.CHECK_DENOISING off"
        )
    return bare


def gather(items: list) -> list:
    """What all ranks have, joined in the order of the ranks, on rank 0; [] elsewhere.

    Raises:
        Interrupted: on all ranks, because the training is asked to stop.
    """
    agree()
    return [item for part in comm.gather(items) for item in part]
