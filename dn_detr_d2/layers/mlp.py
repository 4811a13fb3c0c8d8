"""Small stacks of linear layers."""

from itertools import pairwise

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
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """A transformer's feed-forward block with residual and post-norm: norm(x + W2 act(W1 x)).

    Args:
        dim: channels C.
        hidden_dim: channels between the two linear layers.
        dropout: probability in [0, 1), after the activation and before the sum.
        activation: "relu", or "prelu" with one learnt slope per block (DAB-DETR, DN-DETR).
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
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))
