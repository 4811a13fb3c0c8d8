"""From an assignment to weighted losses; who made the pairs, the matcher or the noise, is none of its business.

Shapes: K prediction sets (decoder layers), N images, Q queries, P classes, T pairs.
"""

import torch
from detectron2.config import configurable
from torch import Tensor

from ..structures import Assignment, Predictions, Targets
from .losses import box_terms, float32, focal_negative, focal_terms


class SetCriterion:
    """Focal class loss on all queries, L1 and GIoU on the paired ones, for all decoder layers at once.

    Matched boxes are compared pair by pair, so time and memory grow linearly with the number of objects.

    Args:
        class_weight, l1_weight, giou_weight: weights of the three terms, the same for every layer.
        focal_alpha, focal_gamma: of the focal loss.
    """

    TERMS = ("class", "l1", "giou")

    @configurable
    def __init__(
        self,
        *,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        self.weights = (class_weight, l1_weight, giou_weight)
        if min(self.weights) < 0:
            raise ValueError(f"loss weights must not be negative, got {self.weights} (class, L1, GIoU)")
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma

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
            l1, overlap = box_terms(boxes[pairs], targets.boxes[assignment.image, assignment.target])
            labels = targets.labels[assignment.image, assignment.target]
            sums = (self._class_loss(logits, pairs, labels, counted), l1.sum(1), overlap.sum(1))
            return {
                name: weight / normalizer * total
                for name, weight, total in zip(self.TERMS, self.weights, sums, strict=True)
            }

    def _class_loss(self, logits: Tensor, pairs, labels: Tensor, counted: Tensor | None) -> Tensor:
        """(K,) focal sums: every logit as a negative, then the paired ones turned into positives.

        No one-hot target of the size of the logits is built.
        """
        everywhere = focal_negative(logits, self.focal_alpha, self.focal_gamma).sum(-1)  # (K, N, Q)
        if counted is not None:
            everywhere = everywhere * counted
        negative, positive = focal_terms(logits[(*pairs, labels)], self.focal_alpha, self.focal_gamma)
        return everywhere.flatten(1).sum(1) + (positive - negative).sum(1)
