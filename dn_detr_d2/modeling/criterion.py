"""From an assignment to weighted losses; who made the pairs, the matcher or the noise, is none of its business.

Shapes: K prediction sets (decoder layers), N images, Q queries, P classes, T pairs.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..boxes import GIOU_EPS
from ..structures import Assignment, Predictions, Targets
from .losses import box_terms, float32, focal_negative, focal_terms


class SetCriterion:
    """Focal class loss on all queries, L1 and GIoU on the paired ones, for all decoder layers at once.

    Matched boxes are compared pair by pair, so time and memory grow linearly with the number of objects.

    Args:
        class_weight, l1_weight, giou_weight: weights of the three terms, the same for every layer.
        focal_alpha, focal_gamma: of the focal loss.
        giou_eps: of :func:`~dn_detr_d2.boxes.giou`.
    """

    TERMS = ("class", "l1", "giou")
    MEANS: tuple[str, ...] = ()  # those that are means already, and do not see the normalizer

    @configurable
    def __init__(
        self,
        *,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        giou_eps: float = GIOU_EPS,
    ):
        self.weights = (class_weight, l1_weight, giou_weight)
        if min(self.weights) < 0:
            raise ValueError(f"loss weights must not be negative, got {self.weights} (class, L1, GIoU)")
        self.focal_alpha, self.focal_gamma, self.giou_eps = focal_alpha, focal_gamma, giou_eps

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.LOSS``."""
        node = cfg.MODEL.DN_DETR.LOSS
        return {
            "class_weight": node.CLASS_WEIGHT,
            "l1_weight": node.L1_WEIGHT,
            "giou_weight": node.GIOU_WEIGHT,
            "focal_alpha": node.FOCAL_ALPHA,
            "focal_gamma": node.FOCAL_GAMMA,
            "giou_eps": node.GIOU_EPS,
        }

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Assignment,
        normalizer: Tensor,
        counted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of every layer.

        Args:
            predictions: of K layers.
            targets: the clean ground truth.
            assignment: which query answers for which ground truth; a single row holds for all layers.
            normalizer: scalar, what the sums are divided by (usually the number of objects).
            counted: (N, Q) bool, queries whose class loss counts; all if None.

        Returns:
            dict: term name ("class", "l1", "giou") -> (K,) float32, weighted; the last entry is the final layer.
        """
        with torch.autocast(predictions.logits.device.type, enabled=False):
            logits, boxes = float32(predictions.logits, predictions.boxes)
            layer = torch.arange(len(logits), device=logits.device)[:, None]  # (K, 1), broadcasts with T
            pairs = (layer, assignment.image, assignment.query)
            l1, overlap = box_terms(boxes[pairs], targets.boxes[assignment.image, assignment.target], self.giou_eps)
            labels = targets.labels[assignment.image, assignment.target]
            classes = self._class_loss(logits, pairs, labels, normalizer, counted, targets.whole)
            terms = (classes, l1.sum(1) / normalizer, overlap.sum(1) / normalizer)
            return {name: weight * term for name, weight, term in zip(self.TERMS, self.weights, terms, strict=True)}

    def _class_loss(
        self, logits: Tensor, pairs, labels: Tensor, normalizer: Tensor, counted: Tensor | None, whole: list[int]
    ) -> Tensor:
        """(K,) focal losses: every logit as a negative, then the paired ones turned into positives.

        No one-hot target of the size of the logits is built.
        """
        everywhere = focal_negative(logits, self.focal_alpha, self.focal_gamma).sum(-1)  # (K, N, Q)
        if counted is not None:
            everywhere = everywhere * counted
        negative, positive = focal_terms(logits[(*pairs, labels)], self.focal_alpha, self.focal_gamma)
        return (everywhere.flatten(1).sum(1) + (positive - negative).sum(1)) / normalizer


class SoftmaxCriterion(SetCriterion):
    """DETR's class loss: cross-entropy over the classes and "no object", the last logit (DETR Sec. 3.1).

    It is the mean over all queries, in which queries that shall say "no object" count less.

    Args:
        no_object_weight: how much they count; 0.1 in DETR.
        weights: as for :class:`SetCriterion`.
    """

    MEANS = ("class",)

    @configurable
    def __init__(self, *, no_object_weight: float = 0.1, **weights: float):
        super().__init__(**weights)
        if not 0 < no_object_weight <= 1:
            raise ValueError(f"no_object_weight must lie in (0, 1], got {no_object_weight}")
        self.no_object_weight = no_object_weight

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.LOSS``."""
        return {**super().from_config(cfg), "no_object_weight": cfg.MODEL.DN_DETR.LOSS.NO_OBJECT_WEIGHT}

    def _class_loss(
        self, logits: Tensor, pairs, labels: Tensor, normalizer: Tensor, counted: Tensor | None, whole: list[int]
    ) -> Tensor:
        """(K,) weighted means of the cross-entropy over the queries of all images of ``whole``."""
        target = torch.full(logits.shape[:-1], logits.shape[-1] - 1, device=logits.device)  # (K, N, Q)
        target[pairs] = labels.expand(len(logits), -1)
        weight = torch.where(target == logits.shape[-1] - 1, self.no_object_weight, 1.0)
        if counted is not None:
            weight = weight * counted
        entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(weight)
        sums, queries = (entropy * weight).flatten(1).sum(1), logits.shape[2]
        if counted is not None:
            return sums / weight.flatten(1).sum(1).clamp(min=1e-6)
        found = sum(min(count, queries) for count in whole)
        return sums / (found + self.no_object_weight * (queries * len(whole) - found))
