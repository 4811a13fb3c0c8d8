"""Loss terms as plain functions of tensors, unreduced or nearly so; always float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import GIOU_EPS, cxcywh_to_xyxy, giou


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Sigmoid focal loss (Lin et al., ICCV 2017) of every logit, once as a negative and once as a positive.

    Args:
        logits: any shape.
        alpha: weight of positives, 1 - alpha of negatives.
        gamma: focusing exponent.

    Returns:
        tuple: (loss if the target is 0, loss if the target is 1), each in the shape of ``logits``.
    """
    prob, softplus = logits.sigmoid(), F.softplus(logits)
    negative = (1 - alpha) * prob**gamma * softplus
    positive = alpha * (1 - prob) ** gamma * (softplus - logits)  # -log(p) = softplus(-x) = softplus(x) - x
    return negative, positive


def focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """The first half of :func:`focal_terms` alone."""
    return (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)


def box_terms(predicted: Tensor, target: Tensor, giou_eps: float = GIOU_EPS) -> tuple[Tensor, Tensor]:
    """L1 and GIoU loss of matched boxes, pair by pair.

    Args:
        predicted, target: (..., 4) cxcywh in [0, 1].
        giou_eps: of :func:`~dn_detr_d2.boxes.giou`.

    Returns:
        tuple: L1 summed over the four numbers, and 1 - GIoU; each (...).
    """
    l1 = (predicted - target).abs().sum(-1)
    return l1, 1 - giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target), giou_eps)


def pairwise_l1(a: Tensor, b: Tensor) -> Tensor:
    """(..., A, 4) and (..., B, 4) -> (..., A, B) sum of absolute differences, without a (..., A, B, 4) tensor."""
    total = (a[..., :, None, 0] - b[..., None, :, 0]).abs_()
    for i in range(1, a.shape[-1]):
        total += (a[..., :, None, i] - b[..., None, :, i]).abs_()
    return total


def float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 (float64 stays): costs and losses are not computed in half precision."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
