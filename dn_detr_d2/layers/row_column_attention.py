"""Row-column decoupled attention of Anchor DETR (Wang et al., AAAI 2022, Sec. 3.4): rows and columns are weighed apart.

Shapes: N images, Q queries, C channels, H heads, (h, w) the map, D = C / H. Masks are True where blocked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import check_divisible
from .position_encoding import sine_encoding


class RowColumnAttention(nn.Module):
    """A query weighs the w columns and the h rows of a map; a cell gets the product of both. Residual and post-norm.

    Keys are means over the other axis, padding included as in the official code. Memory: Q * (h + w) weights instead of
    Q * h * w.

    Args:
        dim: C, divisible by ``num_heads``.
        num_heads: H.
        dropout: probability, on the residual branch and on the weights of columns and of rows.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        check_divisible(dim, num_heads)
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 5 * dim)  # query along rows and columns, key along rows and columns, value
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        position_x: Tensor,
        position_y: Tensor,
        grid: Tensor,
        grid_x: Tensor,
        grid_y: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """Queries look at the map.

        Args:
            x: (N, Q, C) content.
            position_x, position_y: (N, Q, C) encoding of each query's coordinates.
            grid: (N, h, w, C) the map.
            grid_x: (N, w, C) encoding of the columns' coordinates.
            grid_y: (N, h, C) encoding of the rows' coordinates.
            padding: (N, h, w) bool, True outside the image.
        """
        (qx, qy, kx, ky, v), biases = self.in_proj.weight.chunk(5), self.in_proj.bias.chunk(5)
        # Keys are means over the other axis; the projection is linear, so the mean may come first.
        along_x = self._weigh(x + position_x, qx, biases[0], grid.mean(1) + grid_x, kx, biases[2], padding[:, 0])
        along_y = self._weigh(x + position_y, qy, biases[1], grid.mean(2) + grid_y, ky, biases[3], padding[:, :, 0])
        value = F.linear(grid, v, biases[4]).unflatten(-1, (self.num_heads, -1))
        rows = torch.einsum("nmqw,nhwmd->nmqhd", along_x, value)
        attended = torch.einsum("nmqh,nmqhd->nqmd", along_y, rows).flatten(2)
        return self.norm(x + self.dropout(self.out_proj(attended)))

    def _weigh(
        self, query: Tensor, wq: Tensor, bq: Tensor, key: Tensor, wk: Tensor, bk: Tensor, blocked: Tensor
    ) -> Tensor:
        """(N, H, Q, S) attention of (N, Q, C) queries to the S places of one axis, ``blocked`` (N, S)."""
        query, key = (
            F.linear(y, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y, weight, bias in ((query, wq, bq), (key, wk, bk))
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(blocked[:, None, None], -torch.inf).softmax(-1)
        return F.dropout(weights, self.dropout.p, self.training)


def axis_coordinates(padding: Tensor) -> tuple[Tensor, Tensor]:
    """(N, h, w) bool -> x (N, w) and y (N, h), the cells' centres in [0, 1] of the unpadded image; constant on padding."""
    along_y, along_x = (axis.cumsum(1, dtype=torch.int32) for axis in (~padding[:, :, 0], ~padding[:, 0]))
    return tuple((axis - 0.5) / axis[:, -1:] for axis in (along_x, along_y))


class AxisEncoding(nn.Module):
    """Learnt function of one coordinate: sine encoding, then two linear layers. Cells and queries share it.

    Args:
        dim: C, even.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(...) in [0, 1] -> (..., C)."""
        return self.layers(sine_encoding(x * (2 * torch.pi), self.dim).to(self.layers[0].weight.dtype))
