"""Bipartite matching of queries and ground truths.

Shapes: K prediction sets (decoder layers), N images, Q queries, M ground truths of the fullest image, P classes, T pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..structures import Assignment, HostCopy, Predictions, Targets, upload
from .costs import BoxGIoUCost, BoxL1Cost, ClassFocalCost, ClassSoftmaxCost, Cost
from .functional import Constants, in_float32


class HungarianMatcher:
    """Finds for every image and prediction set the one-to-one pairing of least cost (DETR Eq. 1).

    The costs of all sets and images are one batched computation and reach the host in one transfer; no cost between a
    query of one image and a target of another is ever computed. SciPy solves each block.

    Args:
        costs: each with its weight, not all 0; None = those of :meth:`default_costs` with ``settings``.
        settings: of :meth:`default_costs`.

    Raises:
        ValueError: negative weights, or all of them 0.
    """

    def __init__(self, costs: Sequence[Cost] | None = None, **settings: float):
        if costs is not None and settings:
            raise ValueError(f"give either costs or {sorted(settings)}: a cost knows its weight")
        self.costs = list(self.default_costs(**settings) if costs is None else costs)
        if not any(cost.weight for cost in self.costs):
            raise ValueError(f"the weights of {[cost.name for cost in self.costs]} must not all be 0")

    @staticmethod
    def default_costs(
        *, class_cost: float = 2.0, l1_cost: float = 5.0, giou_cost: float = 2.0, **constants: float
    ) -> list[Cost]:
        """Focal class cost, GIoU and L1 with the weights of the paper's models.

        Args:
            class_cost, l1_cost, giou_cost: weights of the costs.
            constants: of :class:`~dn_detr_d2.losses.functional.Constants`.
        """
        shared = Constants(**constants)
        focal = ClassFocalCost(class_cost, shared.focal_alpha, shared.focal_gamma)
        return [focal, BoxGIoUCost(giou_cost, shared.giou_eps), BoxL1Cost(l1_cost)]

    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        """Pairs min(Q, objects) queries of each image with its objects, for each prediction set on its own.

        Raises:
            FloatingPointError: a cost of a real object is not finite; the text names layer and image.
        """
        return self.match([(predictions, targets)])[0]

    def match(self, parts: Sequence[tuple[Predictions, Targets]]) -> list[Assignment]:
        """:meth:`__call__` for several predictions with their targets, with one copy to the host for all of them."""
        return self.finish(self.start(parts))

    @torch.no_grad()
    def start(self, parts: Sequence[tuple[Predictions, Targets]]) -> "PendingCosts":
        """The part of :meth:`match` that does not wait for the device; the device may be given other work before
        :meth:`finish`."""
        costs = [self.cost(*part) for part in parts]
        host = HostCopy(
            torch.cat([cost.flatten() for cost in costs])
        )  # the one device-to-host copy of matching in a step
        return PendingCosts(host, [cost.shape for cost in costs], [targets for _, targets in parts])

    def finish(self, costs: "PendingCosts") -> list[Assignment]:
        """The assignments of :meth:`match` from the costs, once they are on the host."""
        blocks = costs.copy.wait().split([shape.numel() for shape in costs.shapes])
        rows = zip(blocks, costs.shapes, costs.targets, strict=True)
        return [self._assign(block.view(shape).numpy(), targets) for block, shape, targets in rows]

    def _assign(self, cost: np.ndarray, targets: Targets) -> Assignment:
        """The pairs of (K, N, Q, M) costs."""
        rows, columns, image = [], [], []
        for i, count in enumerate(targets.counts):
            blocks = [self._solve(cost[k, i, :, :count], k, i) for k in range(len(cost))]
            rows.append(np.stack([block[0] for block in blocks]))
            columns.append(np.stack([block[1] for block in blocks]))
            image.append(np.full(rows[-1].shape[1], i))
        rows, columns = np.concatenate(rows, 1), np.concatenate(columns, 1)
        packed = upload(np.concatenate([np.concatenate(image)[None], rows, columns]), targets.labels)
        k = len(rows)
        return Assignment(packed[0], packed[1 : 1 + k], packed[1 + k :], counts=[len(x) for x in image])

    @torch.no_grad()
    def cost(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M) float32 matching costs; columns of padded targets are meaningless."""
        with torch.autocast(predictions.logits.device.type, enabled=False):
            predictions = in_float32(predictions)
            first, *others = (cost.weight * cost(predictions, targets) for cost in self.costs)
            return sum(others, first)

    @staticmethod
    def _solve(cost: np.ndarray, layer: int, image: int) -> tuple[np.ndarray, np.ndarray]:
        if not np.isfinite(cost).all():
            raise FloatingPointError(
                f"the matching cost of decoder layer {layer}, image {image} of the batch is not finite: its predicted "
                "logits, boxes or masks hold NaN or Inf"
            )
        return linear_sum_assignment(cost)


@dataclass
class PendingCosts:
    """Matching costs between device and host.

    Attributes:
        copy: of all costs in a row.
        shapes: (K, N, Q, M) of each part.
        targets: of each part.
    """

    copy: HostCopy
    shapes: list[torch.Size]
    targets: list[Targets]


class SoftmaxMatcher(HungarianMatcher):
    """:class:`HungarianMatcher` with DETR's class cost: minus the probability of the class."""

    @staticmethod
    def default_costs(*, class_cost: float = 1.0, **settings: float) -> list[Cost]:
        """The costs of :class:`HungarianMatcher` with :class:`~dn_detr_d2.losses.costs.ClassSoftmaxCost` as the first.

        The weights are those of DETR: 1 of the class, 5 of L1, 2 of GIoU.
        """
        _, *boxes = HungarianMatcher.default_costs(**settings)
        return [ClassSoftmaxCost(class_cost), *boxes]
