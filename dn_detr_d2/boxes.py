"""Box arithmetic on plain tensors.

Naming: *cxcywh* is (centre x, centre y, width, height), *xyxy* is (x0, y0, x1, y1). Inside the model boxes are cxcywh in
[0, 1] of the unpadded image, float32; absolute pixels exist only in the data mapper and the post-processor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Clamp of logit() in DAB-DETR, DN-DETR and DINO: a box coordinate closer than this to 0 or 1 is not told apart.
LOGIT_EPS = 1e-3
# Keeps the GIoU of two points finite. It is 1e-6 of the area of a box of side 1e-6, the smallest that float32 corners near 1
# tell from a point.
GIOU_EPS = 1e-18


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy, in the same unit."""
    return torch.cat(corners(boxes), -1)


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4) cxcywh -> the low and the high corner, (..., 2) each."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (..., 4) cxcywh, in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def image_scale(image_size: tuple[int, int], like: Tensor) -> Tensor:
    """(4,) factors (width, height, width, height) of an image given as (height, width); nothing is copied from the host."""
    factors = like.new_empty(2, 2)
    for axis, side in enumerate(image_size[::-1]):
        factors[:, axis].fill_(side)
    return factors.flatten()


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(..., 4) xyxy boxes of (..., h, w) bool masks, in whole pixels; the box of an empty mask is 0 throughout.

    x1 and y1 are the first column and row behind the mask, as of Detectron2's ``BitMasks.get_bounding_boxes``.
    """
    low, high = [], []
    for line in (masks.amax(-2), masks.amax(-1)):  # columns, rows; faster than any()
        low.append(line.byte().argmax(-1))
        high.append((line.shape[-1] - line.flip(-1).byte().argmax(-1)) * line.any(-1))
    return torch.stack(low + high, -1)


def logit(x: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """Inverse of the sigmoid with both ends clamped: log(max(x, eps) / max(1 - x, eps)).

    Numerator and denominator are clamped one by one, as in the official code, so the ends differ by about ``eps``.
    Values outside [0, 1] are taken as 0 or 1; NaN stays NaN.
    """
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def giou(a: Tensor, b: Tensor, eps: float = GIOU_EPS) -> Tensor:
    """Generalized IoU (Rezatofighi et al., CVPR 2019) of xyxy boxes, element by element with broadcasting.

    Args:
        a, b: (..., 4) xyxy with x1 >= x0 and y1 >= y0; for all pairs pass ``a[:, None]`` and ``b[None]``.
        eps: added to the union and to the enclosing area. The 1e-6 of DAB-DETR, DN-DETR and DINO make the GIoU of a box with
            itself 0.99 at side 0.01 and 0.5 at side 0.001, and its gradient as wrong.

    Returns:
        Tensor: broadcast shape without the last dimension, in (-1, 1] up to rounding. Degenerate boxes give a finite value.
    """
    return giou_of_corners(a.split(2, -1), b.split(2, -1), eps)


def giou_of_corners(a: Sequence[Tensor], b: Sequence[Tensor], eps: float = GIOU_EPS) -> Tensor:
    """:func:`giou` of boxes by their :func:`corners`: a pair of (..., 2) each, with broadcasting."""
    (a_low, a_high), (b_low, b_high) = a, b
    intersection = _area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    # The part of b outside a is never negative, also when rounded; so the IoU is never above 1.
    union = _area(a_high - a_low) + (_area(b_high - b_low) - intersection)
    enclosing = _area(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    return intersection / (union + eps) - (enclosing - union) / (enclosing + eps)


def _area(size: Tensor) -> Tensor:
    """(..., 2) width and height -> (...); a reduction over a dimension of 2 costs more than all the rest for many pairs."""
    width, height = size.unbind(-1)
    return width * height
