"""Values of maps and masks at points, and which points are worth a loss.

A point is (x, y) in [0, 1] of the padded image, (0, 0) the upper left corner of the first pixel. Values are interpolated
between the centres of cells; outside the map they are 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (kind, number of sets, points a set, device) -> (sets, points, 2) in [0, 1]; kind is "match", "loss" or "rest".
DrawPoints = Callable[[str, int, int, torch.device], Tensor]


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """(B, C, h, w) floating-point maps at (B, n, 2) points: (B, C, n)."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sample_masks(masks: Tensor, row: Tensor, points: Tensor) -> Tensor:
    """Bool masks at points as :func:`sample_maps` would give them, without a floating-point copy of the masks.

    Args:
        masks: (..., h, w) bool.
        row: (...) int64, which of the masks, counted over all axes before h.
        points: (..., n, 2); ``row`` and what stands before n are broadcast.

    Returns:
        Tensor: (..., n) float32 in [0, 1].
    """
    h, w = masks.shape[-2:]
    pixels, first = masks.flatten(), row[..., None] * (h * w)
    grid = 2 * points - 1  # from here on rounded as grid_sample does
    x, y = (((grid[..., i] + 1) * size - 1) / 2 for i, size in enumerate((w, h)))
    left, top, total = x.floor(), y.floor(), torch.zeros((), device=masks.device)
    for column, line in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        share = (1 - (x - column).abs()) * (1 - (y - line).abs())
        share = torch.where((column >= 0) & (column < w) & (line >= 0) & (line < h), share, 0)
        place = line.long().clamp(0, h - 1) * w + column.long().clamp(0, w - 1)
        total = total + share * pixels[first + place]
    return total


@torch.no_grad()
def most_uncertain(maps: Tensor, candidates: Tensor, kept: int) -> Tensor:
    """The candidates with the smallest absolute logit (PointRend, Kirillov et al., CVPR 2020, Sec. 3.2); no gradient.

    Args:
        maps: (T, h, w) logits.
        candidates: (T, n, 2).
        kept: how many of them, at most n.

    Returns:
        Tensor: (T, kept, 2).
    """
    logits = sample_maps(maps[:, None], candidates)[:, 0]
    best = logits.abs().topk(kept, largest=False, sorted=False).indices
    return candidates.gather(1, best[..., None].expand(-1, -1, 2))


def check_points(what: str, mask_weight: float, dice_weight: float, num_points: int) -> None:
    """Raises ValueError for a negative weight or less than one point."""
    if not (mask_weight >= 0 and dice_weight >= 0):
        raise ValueError(f"the weights of {what} of masks must not be negative, got {mask_weight} and {dice_weight}")
    if num_points < 1:
        raise ValueError(f"{what} of masks needs at least one point, got num_points = {num_points}")
