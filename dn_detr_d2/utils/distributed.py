"""Models that may be wrapped for several processes: the model inside, and where it is."""

from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are, or its buffers; the CPU if it has neither."""
    return next((x.device for x in chain(model.parameters(), model.buffers())), torch.device("cpu"))
