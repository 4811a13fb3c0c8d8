"""Bipartite matching of queries and ground truths.

Shapes: K prediction sets (decoder layers), N images, Q queries, M ground truths of the fullest image, P classes, T pairs.
"""

import numpy as np
import torch
from detectron2.config import configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..boxes import GIOU_EPS, cxcywh_to_xyxy, giou
from ..structures import Assignment, Predictions, Targets, upload
from .losses import float32, focal_terms, pairwise_l1


class HungarianMatcher:
    """Finds for every image and prediction set the one-to-one pairing of least cost (DETR Eq. 1).

    The costs of all sets and images are one batched computation and reach the host in one transfer; no cost between a
    query of one image and a target of another is ever computed. SciPy solves each block.

    Args:
        class_cost, l1_cost, giou_cost: weights of the three costs, not all 0.
        focal_alpha, focal_gamma: of the focal class cost.
        giou_eps: of :func:`~dn_detr_d2.boxes.giou`.

    Raises:
        ValueError: negative weights, or all of them 0.
    """

    @configurable
    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        giou_eps: float = GIOU_EPS,
    ):
        weights = (class_cost, l1_cost, giou_cost)
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"matching costs must not be negative, nor all 0, got {weights} (class, L1, GIoU)")
        self.class_cost, self.l1_cost, self.giou_cost = weights
        self.focal_alpha, self.focal_gamma, self.giou_eps = focal_alpha, focal_gamma, giou_eps

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.MATCHER`` and the focal constants of ``LOSS``."""
        node = cfg.MODEL.DN_DETR
        return {
            "class_cost": node.MATCHER.CLASS_COST,
            "l1_cost": node.MATCHER.L1_COST,
            "giou_cost": node.MATCHER.GIOU_COST,
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
            "giou_eps": node.LOSS.GIOU_EPS,
        }

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        """Pairs min(Q, objects) queries of each image with its objects, for each prediction set on its own.

        Raises:
            FloatingPointError: a cost of a real object is not finite; the text names layer and image.
        """
        cost = self.cost(predictions, targets).cpu().numpy()  # the one device-to-host copy of a training step
        rows, columns, image = [], [], []
        for i, count in enumerate(targets.counts):
            blocks = [self._solve(cost[k, i, :, :count], k, i) for k in range(len(cost))]
            rows.append(np.stack([block[0] for block in blocks]))
            columns.append(np.stack([block[1] for block in blocks]))
            image.append(np.full(rows[-1].shape[1], i))
        rows, columns = np.concatenate(rows, 1), np.concatenate(columns, 1)
        packed = upload(np.concatenate([np.concatenate(image)[None], rows, columns]), targets.labels)
        k = len(rows)
        return Assignment(packed[0], packed[1 : 1 + k], packed[1 + k :])

    @torch.no_grad()
    def cost(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M) float32 matching costs; columns of padded targets are meaningless."""
        with torch.autocast(predictions.logits.device.type, enabled=False):
            logits, boxes = float32(predictions.logits, predictions.boxes)
            k, n, q, _ = logits.shape
            index = targets.labels[None, :, None].expand(k, n, q, -1)
            predicted, wanted = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes)
            overlap = giou(predicted[..., :, None, :], wanted[:, None], self.giou_eps)
            cost = self.class_cost * self._class_cost(logits, index) - self.giou_cost * overlap
            return cost + self.l1_cost * pairwise_l1(boxes, targets.boxes)

    def _class_cost(self, logits: Tensor, index: Tensor) -> Tensor:
        """(K, N, Q, P) logits and (K, N, Q, M) labels -> (K, N, Q, M): what the focal loss would change by."""
        negative, positive = focal_terms(logits.gather(-1, index), self.focal_alpha, self.focal_gamma)
        return positive - negative

    @staticmethod
    def _solve(cost: np.ndarray, layer: int, image: int) -> tuple[np.ndarray, np.ndarray]:
        if not np.isfinite(cost).all():
            raise FloatingPointError(
                f"the matching cost of decoder layer {layer}, image {image} of the batch is not finite: its predicted "
                "logits or boxes hold NaN or Inf"
            )
        return linear_sum_assignment(cost)


class SoftmaxMatcher(HungarianMatcher):
    """DETR's class cost: minus the probability of the class, "no object" being one of them."""

    def _class_cost(self, logits: Tensor, index: Tensor) -> Tensor:
        """(K, N, Q, P + 1) logits and (K, N, Q, M) labels -> (K, N, Q, M)."""
        return -logits.softmax(-1).gather(-1, index)
