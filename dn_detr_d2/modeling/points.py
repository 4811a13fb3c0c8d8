"""The random points at which masks are compared."""

import torch
from torch import Tensor


def random_points(kind: str, num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """(num_sets, num_points, 2) points (x, y), uniform in [0, 1] of the padded image, float32.

    All random points of matching and losses come from here.

    Args:
        kind: what they are for: "match" = one set an image; "loss" = the candidates of each matched mask, of which the most
            uncertain are kept; "rest" = the points of each matched mask beside these. The draw is the same for all.
        num_sets, num_points: how many.
        device: of the result.
    """
    return torch.rand(num_sets, num_points, 2, device=device, dtype=torch.float32)


def draw_points(kind: str, num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """:func:`random_points` as it is when this is called: what matcher and criterion are given."""
    return random_points(kind, num_sets, num_points, device)
