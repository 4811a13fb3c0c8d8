"""Small stacks of linear layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, none after the last.

    Args:
        widths: channels from input to output; ``MLP(512, 256, 256)`` has two linear layers.
    """

    def __init__(self, *widths: int):
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"an MLP needs an input and an output width, got {widths}")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) -> (..., widths[-1])."""
        return in_rows(self._map_rows, x)

    def _map_rows(self, rows: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            rows = layer(rows).relu()
        return self.layers[-1](rows)


class FeedForward(nn.Module):
    """A transformer's feed-forward block with residual and post-norm: norm(x + W2 act(W1 x)).

    Args:
        dim: channels C.
        hidden_dim: channels between the two linear layers.
        dropout: probability in [0, 1), after the activation and before the sum.
        activation: "relu", or "prelu" with one learned slope per block (DAB-DETR, DN-DETR).
    """

    ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU}

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, activation: str = "relu"):
        super().__init__()
        if activation not in self.ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(self.ACTIVATIONS)}, got {activation!r}")
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.activation = self.ACTIVATIONS[activation]()
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.norm(x + self.dropout(in_rows(self._map_rows, x)))

    def _map_rows(self, rows: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(rows))))


def map_together(layers: Sequence[nn.Linear], rows: Tensor) -> Tensor:
    """What K linear layers of one size make of K sets of rows, by one batched product: (K, rows, C) -> (K, rows, D)."""
    weights, biases = (torch.stack([getattr(x, name) for x in layers]) for name in ("weight", "bias"))
    return torch.baddbmm(biases[:, None], rows, weights.transpose(1, 2))


def in_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of the rows of a (..., C) tensor, a function of (rows, C): between several linear layers nothing is
    reshaped then, in the forward and in the backward pass."""
    if x.dim() <= 2:
        return function(x)
    return function(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
