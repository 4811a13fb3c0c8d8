"""Activation checkpointing: layers whose activations are recomputed in the backward pass instead of kept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LayerStack(nn.Module):
    """Base of encoders and decoders: layers of which autograd keeps everything, or the inputs alone.

    Args:
        activation_checkpointing: keep the inputs alone (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    def __init__(self, activation_checkpointing: bool = False):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing

    def checkpointed(self, step: Callable[..., Tensor], *args) -> Tensor:
        """``step(*args)``; with activation checkpointing, in training, it will be repeated in the backward pass.

        The repetition has the same random numbers and the same autocast, so gradients are those without it.
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(step, *args, use_reentrant=False)
        return step(*args)
