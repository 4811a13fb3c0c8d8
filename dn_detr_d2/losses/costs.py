"""Matching costs: how much it would cost to let a query answer for an object. A new cost is a subclass of :class:`Cost`.

Shapes: K prediction sets (decoder layers), N images, Q queries, M ground truths of the fullest image, P classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import GIOU_EPS, corners, giou_of_corners
from ..structures import Predictions, Targets
from .functional import focal_terms
from .point_sampling import DrawPoints, check_points, sample_maps, sample_masks


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
        predicted, wanted = corners(predictions.boxes[..., None, :]), corners(targets.boxes[:, None])
        return -giou_of_corners(predicted, wanted, self.eps)


class MaskPointCost(Cost):
    """Binary cross-entropy and dice of masks at random points (Mask2Former, Cheng et al., CVPR 2022, Sec. 3.3).

    The points of an image are the same for all prediction sets, queries and objects, so its features are sampled once and
    multiplied with the embeddings; no map is made. Besides these samples, (N, C + M, n) numbers, memory is bounded by a few
    times :attr:`chunk` numbers.

    Args:
        mask_weight, dice_weight: of the two; not negative.
        num_points: n.
        draw: of the points.

    Attributes:
        chunk: how many logits at points exist at a time, at most; at least one row of queries of all images.

    Raises:
        ValueError: a negative weight, or no point.
    """

    name = "mask"
    chunk = 2**22

    def __init__(self, mask_weight: float = 5.0, dice_weight: float = 5.0, *, num_points: int, draw: DrawPoints):
        check_points("the matching cost", mask_weight, dice_weight, num_points)
        super().__init__(1.0)
        self.mask_weight, self.dice_weight = mask_weight, dice_weight
        self.num_points, self.draw = num_points, draw

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(K, N, Q, M), both parts with their weights; 0 of predictions without masks, such as DINO's proposals."""
        embeddings, features = predictions.mask_embeddings, predictions.mask_features
        k, n, q, _ = predictions.logits.shape
        if embeddings is None:
            return predictions.logits.new_zeros(k, n, q, targets.valid.shape[1])
        points = self.draw("match", n, self.num_points, features.device)
        sampled = sample_maps(features, points)  # (N, C, n)
        masks = torch.arange(targets.valid.numel(), device=features.device).view_as(targets.valid)
        wanted = sample_masks(targets.masks, masks, points[:, None]).transpose(1, 2)  # (N, n, M)
        rows = embeddings.transpose(0, 1).flatten(1, 2)  # (N, K * Q, C)
        parts = rows.split(max(self.chunk // (n * self.num_points), 1), 1)
        costs = torch.cat([self._compare(part @ sampled, wanted) for part in parts], 1)
        return costs.unflatten(1, (k, q)).transpose(0, 1)

    def _compare(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """(N, r, n) logits and (N, n, M) masks -> (N, r, M)."""
        entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ wanted) / self.num_points
        prob = logits.sigmoid()
        both = prob.sum(-1, keepdim=True) + wanted.sum(1, keepdim=True)
        return self.mask_weight * entropy + self.dice_weight * (1 - (2 * (prob @ wanted) + 1) / (both + 1))


def logits_of_labels(logits: Tensor, targets: Targets) -> Tensor:
    """(K, N, Q, P) -> (K, N, Q, M): of each query the column of each object's label."""
    k, _, q, _ = logits.shape
    return logits.gather(-1, targets.labels[None, :, None].expand(k, -1, q, -1))
