"""The random draws of denoising training, and nothing else: functions on tensors that return new tensors.

Every function draws on the device of its input from PyTorch's global generator, so a seed makes it reproducible.
"""

import torch
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


def flip_labels(labels: Tensor, prob: float, num_classes: int) -> Tensor:
    """Label noise (DN-DETR Sec. 4.1): redraws a label uniformly with probability ``prob`` (gamma).

    The new label may be the old one, so a label changes with probability ``prob * (1 - 1 / num_classes)``.

    Args:
        labels: (...) int64 in [0, num_classes).
        prob: gamma in [0, 1].
        num_classes: number of classes; "unknown", the index ``num_classes``, is never drawn.
    """
    redraw = torch.rand(labels.shape, device=labels.device) < prob
    return torch.where(redraw, torch.randint_like(labels, num_classes), labels)


def distribution(weights: Tensor) -> Tensor:
    """(..., P) cumulative shares of (..., P) weights: float64, not negative, not all 0.

    On the CPU: cumulative sums of floats have no deterministic CUDA kernel.
    """
    below = weights.cpu().cumsum(-1)
    return below / below[..., -1:]


def redraw_labels(labels: Tensor, prob: float, below: Tensor) -> Tensor:
    """Redraws a label with probability ``prob``, the new one in proportion to weights.

    Args:
        labels: (...) int64 in [0, P).
        prob: gamma in [0, 1].
        below: :func:`distribution` of the weights, (P,) for all, or (..., P) for each label, on the device of the labels.
            Weight 0 is never drawn.
    """
    redraw = torch.rand(labels.shape, device=labels.device) < prob
    below = below.expand(*labels.shape, -1).contiguous()
    u = torch.rand(*labels.shape, 1, device=labels.device, dtype=below.dtype)
    return torch.where(redraw, torch.searchsorted(below, u, right=True)[..., 0], labels)


def shift_and_scale(boxes: Tensor, center_scale: float, size_scale: float) -> Tensor:
    """Box noise (DN-DETR Sec. 4.1): centre shifting and box scaling, each uniform.

    The centre moves by less than ``center_scale`` (lambda1) times half the size, so it stays inside the box for lambda1
    <= 1; width and height become (1 - lambda2) to (1 + lambda2) times themselves, lambda2 = ``size_scale``. Each of the
    four numbers is then clamped to [0, 1], as in the official code; the box itself may still reach out of the image.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
    """
    return (boxes + (2 * torch.rand_like(boxes) - 1) * reach(boxes[..., 2:], center_scale, size_scale)).clamp(0, 1)


def reach(size: Tensor, center_scale: float, size_scale: float) -> Tensor:
    """(..., 4) largest change of (cx, cy, w, h) in the noise of DN-DETR, for (..., 2) widths and heights."""
    return torch.cat([size / 2 * center_scale, size * size_scale], -1)


def jitter_corners(
    boxes: Tensor, scale: float, negative: bool, keep_order: bool = False, spread: Tensor | None = None
) -> Tensor:
    """Contrastive box noise (DINO Sec. 3.3): each corner coordinate moves in a random direction.

    Positive copies move by up to ``scale`` half sizes, negative ones by one to two times as much. Coordinates are clamped
    to the image. The corners are drawn independently, so those of a negative copy may cross: at scale 1, 7 in 16 boxes get
    a width or a height that is not positive, as in the official code.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        scale: in half widths and heights, not negative.
        negative: which of the two.
        keep_order: swap crossed corners, so that width and height are never negative.
        spread: (..., 1) positive: the share of ``scale`` that a corner of a positive copy moves is u to the power of
            1 / spread, u uniform in [0, 1), with the mean spread / (1 + spread). None = 1.

    Returns:
        Tensor: (..., 4) cxcywh.
    """
    half = boxes[..., 2:].tile(2) / 2
    distance = torch.rand_like(boxes)
    if spread is not None:
        distance = distance ** (1 / spread)
    distance = distance + float(negative)
    direction = 2.0 * torch.randint_like(boxes, 2) - 1
    corners = (cxcywh_to_xyxy(boxes) + direction * distance * half * scale).clamp(0, 1)
    if keep_order:
        corners = corners.unflatten(-1, (2, 2)).sort(-2).values.flatten(-2)
    return xyxy_to_cxcywh(corners)


def mask_offsets(size: Tensor, scale: float) -> Tensor:
    """Mask noise (DN-DETR, TPAMI 2024): the shift of box centres as whole pixels, halves to the even one.

    Args:
        size: (..., 2) width and height of the objects' boxes in pixels.
        scale: lambda1, in half widths and heights.

    Returns:
        Tensor: (..., 2) int64 (x, y).
    """
    return ((2 * torch.rand_like(size) - 1) * size / 2 * scale).round().long()


def random_subset(valid: Tensor, size: int) -> Tensor:
    """Draws ``size`` positions of each row, real ones first.

    Args:
        valid: (..., M) bool; positions that may be drawn.
        size: how many, at most M.

    Returns:
        Tensor: (..., size) int64, distinct and ascending; a row with fewer valid positions is filled up with others.
    """
    order = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 2.0)
    return order.argsort(-1)[..., :size].sort(-1).values
