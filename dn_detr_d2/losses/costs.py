"""Matching costs: how much it would cost to let a query answer for an object. A new cost is a subclass of :class:`Cost`.

Shapes: K prediction sets (decoder layers), N images, Q queries, M ground truths of the fullest image, P classes.
"""

import torch
from torch import Tensor

from ..boxes import GIOU_EPS, cxcywh_to_xyxy, giou
from ..structures import Predictions, Targets
from .functional import focal_terms


class Cost:
    """Base of all costs.

    Args:
        weight: factor in the total cost, not negative.

    Raises:
        ValueError: a negative weight.
    """

    name: str

    def __init__(self, weight: float = 1.0):
        if not weight >= 0:
            raise ValueError(f"the weight of the matching cost {self.name!r} must not be negative, got {weight}")
        self.weight = weight

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M) costs, unweighted; columns of padded targets are meaningless."""
        raise NotImplementedError


class ClassFocalCost(Cost):
    """What the focal loss would change by if the query were paired with the object.

    Args:
        weight: of the cost.
        alpha, gamma: of the focal loss.
    """

    name = "class"

    def __init__(self, weight: float = 2.0, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__(weight)
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M)."""
        negative, positive = focal_terms(logits_of_labels(predictions.logits, targets), self.alpha, self.gamma)
        return positive - negative


class ClassSoftmaxCost(Cost):
    """DETR's class cost: minus the probability of the class, "no object", the last logit, being one of them."""

    name = "class"

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M)."""
        return -logits_of_labels(predictions.logits.softmax(-1), targets)


class BoxL1Cost(Cost):
    """Sum of the absolute differences of the four numbers of the cxcywh boxes."""

    name = "l1"

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M)."""
        return torch.cdist(predictions.boxes, targets.boxes[None], p=1)


class BoxGIoUCost(Cost):
    """Minus the GIoU of the boxes.

    Args:
        weight: of the cost.
        eps: of :func:`~dn_detr_d2.boxes.giou`.
    """

    name = "giou"

    def __init__(self, weight: float = 2.0, eps: float = GIOU_EPS):
        super().__init__(weight)
        self.eps = eps

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M)."""
        predicted, wanted = cxcywh_to_xyxy(predictions.boxes), cxcywh_to_xyxy(targets.boxes)
        return -giou(predicted[..., :, None, :], wanted[:, None], self.eps)


def logits_of_labels(logits: Tensor, targets: Targets) -> Tensor:
    """(K, N, Q, P) -> (K, N, Q, M): of each query the column of each object's label."""
    k, _, q, _ = logits.shape
    return logits.gather(-1, targets.labels[None, :, None].expand(k, -1, q, -1))
