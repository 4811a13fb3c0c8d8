"""What losses and costs are computed with: plain functions of tensors."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import GIOU_EPS
from ..structures import Predictions


@dataclass(frozen=True)
class Constants:
    """What losses and matching costs have in common.

    Attributes:
        focal_alpha, focal_gamma: of the focal loss.
        giou_eps: of :func:`~dn_detr_d2.boxes.giou`.
    """

    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    giou_eps: float = GIOU_EPS


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


def float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 (float64 stays): costs and losses are not computed in half precision."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def in_float32(predictions: Predictions) -> Predictions:
    """The same predictions, each tensor by :func:`float32`."""
    tensors = {entry.name: getattr(predictions, entry.name) for entry in fields(predictions)}
    return replace(predictions, **{name: float32(x)[0] for name, x in tensors.items() if isinstance(x, Tensor)})
