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
    (left, right), x = _neighbours(points[..., 0], w)
    (upper, lower), y = _neighbours(points[..., 1], h)
    pixels, first = masks.flatten(), row[..., None] * (h * w)
    upper, lower = first + upper * w, first + lower * w
    above = pixels[upper + left] * x[0] + pixels[upper + right] * x[1]
    return above * y[0] + (pixels[lower + left] * x[0] + pixels[lower + right] * x[1]) * y[1]


def _neighbours(place: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two cells whose centres are nearest to each place in [0, 1] of an axis, and their shares, 0 beyond the border."""
    place = place * size - 0.5
    before = place.floor()
    share, before = place - before, before.long()
    after = before + 1
    shares = (1 - share) * (before >= 0), share * (after < size)
    return (before.clamp_(min=0), after.clamp_(max=size - 1)), shares


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
