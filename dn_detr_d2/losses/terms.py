"""Loss terms of a set criterion: from predictions and pairs to one number a prediction set.

A term is called with ``(predictions, targets, assignment, normalizers)`` and returns (K,) losses without its weight; whether
the matcher made the pairs or the noise makes no difference to it. A new term is a new subclass of :class:`LossTerm`.
Terms of masks are in :mod:`.mask_terms`.

Shapes: K prediction sets (decoder layers), N images, Q queries, P classes, T pairs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import GIOU_EPS, corners, giou_of_corners
from ..structures import Assignment, Predictions, Targets
from .functional import focal_negative, focal_terms
from .normalizers import LossNormalizers


class LossTerm:
    """Base of all terms.

    Args:
        weight: factor of the term in the total loss, not negative.

    Attributes:
        name: of the term in the dict of losses.
        names: of all its losses there, where :meth:`weighted` gives several.
        is_mean: whether the term of queries without ``class_loss_mask`` is a mean over queries already, rather than a sum
            over pairs divided by ``num_pairs``.

    Raises:
        ValueError: a negative weight.
    """

    name: str
    is_mean = False

    def __init__(self, weight: float = 1.0):
        if not weight >= 0:
            raise ValueError(f"the weight of the loss term {self.name!r} must not be negative, got {weight}")
        self.weight = weight

    @property
    def names(self) -> tuple[str, ...]:
        """One name, or those of the losses that share their computation."""
        return (self.name,)

    def weighted(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> dict[str, Tensor]:
        """(K,) weighted losses by name; the arguments are those of a call."""
        return {self.name: self.weight * self(predictions, targets, assignment, normalizers)}

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(K,) losses, unweighted.

        Args:
            predictions: of K layers, float32 or wider.
            targets: the clean ground truth.
            assignment: which query answers for which ground truth; a single row holds for all layers.
            normalizers: what the sums are divided by.
        """
        raise NotImplementedError


class ClassFocal(LossTerm):
    """Sigmoid focal loss (Lin et al., ICCV 2017): every logit as a negative, then the paired ones turned into positives.

    No one-hot target of the size of the logits is built.

    Args:
        weight: of the term.
        alpha, gamma: of the focal loss.

    Raises:
        ValueError: gamma between 0 and 1, whose gradient at a certain prediction is infinite.
    """

    name = "class"

    def __init__(self, weight: float = 1.0, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__(weight)
        if gamma != 0 and not 1 <= gamma < math.inf:
            raise ValueError(f"gamma of the focal loss must be 0 or at least 1, got {gamma}")
        self.alpha, self.gamma = alpha, gamma

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(K,) sums over the queries of ``assignment.class_loss_mask``, divided by the number of pairs."""
        logits, labels = predictions.logits, targets.labels[assignment.image, assignment.target]
        everywhere = focal_negative(logits, self.alpha, self.gamma).sum(-1)  # (K, N, Q)
        if assignment.class_loss_mask is not None:
            everywhere = everywhere * assignment.class_loss_mask
        paired = logits[(*assignment.index(len(logits)), labels)]
        negative, positive = focal_terms(paired, self.alpha, self.gamma)
        positive = weighted_pairs(positive, targets, assignment)
        return (everywhere.flatten(1).sum(1) + (positive - negative).sum(1)) / normalizers.num_pairs


class ClassSoftmax(LossTerm):
    """Cross-entropy over the classes and "no object", the last logit (DETR Sec. 3.1).

    It is the mean over all queries, in which queries that shall say "no object" count less.

    Args:
        weight: of the term.
        no_object_weight: how much they count; 0.1 in DETR.

    Raises:
        ValueError: a negative weight, or ``no_object_weight`` outside (0, 1].
    """

    name = "class"
    is_mean = True

    def __init__(self, weight: float = 1.0, no_object_weight: float = 0.1):
        super().__init__(weight)
        if not 0 < no_object_weight <= 1:
            raise ValueError(f"no_object_weight must lie in (0, 1], got {no_object_weight}")
        self.no_object_weight = no_object_weight

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(K,) weighted means over the queries of all images of the step.

        With ``assignment.class_loss_mask`` sums over its queries, divided by the number of pairs: of denoising queries the
        mean over the noised objects of the step.
        """
        logits, mask = predictions.logits, assignment.class_loss_mask
        no_object = logits.shape[-1] - 1
        target = torch.full(logits.shape[:-1], no_object, device=logits.device)  # (K, N, Q)
        labels = targets.labels[assignment.image, assignment.target]
        target[assignment.index(len(logits))] = labels.expand(len(logits), -1)
        weight = torch.where(target == no_object, self.no_object_weight, 1.0)
        if targets.weights is not None:
            of_pairs = targets.weights[assignment.image, assignment.target]
            weight[assignment.index(len(logits))] = of_pairs.expand(len(logits), -1)
        if mask is not None:
            weight = weight * mask
        entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(weight)
        sums = (entropy * weight).flatten(1).sum(1)
        if mask is not None:
            return sums / normalizers.num_pairs
        queries, counts = logits.shape[2], normalizers.step_counts
        found = sum(min(count, queries) for count in counts)
        return sums / (found + self.no_object_weight * (queries * len(counts) - found))


class BoxL1(LossTerm):
    """Sum of the absolute differences of the four numbers of matched cxcywh boxes, pair by pair."""

    name = "l1"

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(K,) sums over the pairs, divided by their number."""
        predicted, wanted = matched_boxes(predictions, targets, assignment)
        return weighted_pairs((predicted - wanted).abs(), targets, assignment).sum((1, 2)) / normalizers.num_pairs


class BoxGIoU(LossTerm):
    """1 - GIoU of matched boxes, pair by pair.

    Args:
        weight: of the term.
        eps: of :func:`~dn_detr_d2.boxes.giou`.
    """

    name = "giou"

    def __init__(self, weight: float = 1.0, eps: float = GIOU_EPS):
        super().__init__(weight)
        self.eps = eps

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(K,) sums over the pairs, divided by their number."""
        predicted, wanted = (corners(x) for x in matched_boxes(predictions, targets, assignment))
        lost = weighted_pairs(1 - giou_of_corners(predicted, wanted, self.eps), targets, assignment)
        return lost.sum(1) / normalizers.num_pairs


def weighted_pairs(losses: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
    """(K, T, ...) losses of pairs times the weights of their objects, which are 1 where the targets have none."""
    if targets.weights is None:
        return losses
    weights = targets.weights[assignment.image, assignment.target]  # (K or 1, T)
    return losses * weights[(..., *[None] * (losses.dim() - weights.dim()))]


def matched_boxes(predictions: Predictions, targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """Predicted (K, T, 4) and wanted (K or 1, T, 4) boxes of the pairs: time and memory are linear in their number."""
    return (
        predictions.boxes[assignment.index(len(predictions.boxes))],
        targets.boxes[assignment.image, assignment.target],
    )
