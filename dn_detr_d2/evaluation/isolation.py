"""Looking at a model in training without leaving a trace: mode, gradients and random streams stay as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def untouched(model: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """The model itself, out of DistributedDataParallel, in evaluation mode, without gradients, under a seed of its own.

    Afterwards every module has the mode that it had, and the random streams of Python, NumPy and PyTorch go on from where
    they stood: a training with instruments gives the same weights as one without, to the bit.

    Args:
        model: with or without the wrapper.
        seed: of the three streams inside.
    """
    bare = unwrap(model)
    modes = [(module, module.training) for module in bare.modules()]
    try:
        with own_randomness(seed, next(bare.parameters()).device), torch.no_grad():
            yield bare.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def own_randomness(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Random streams of Python, NumPy and PyTorch (CPU and ``device``) that start at ``seed`` and end without a trace."""
    python, numpy, device = random.getstate(), np.random.get_state(), torch.device(device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            reseed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def reseed(seed: int) -> None:
    """Starts the streams of Python, NumPy and PyTorch anew; only inside :func:`own_randomness`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def gather(items: list) -> list:
    """What all ranks have, joined in the order of the ranks, on rank 0; [] elsewhere."""
    return [item for part in comm.gather(items) for item in part]
