"""Loss terms of masks, at points (Mask2Former, Cheng et al., CVPR 2022, Sec. 3.3).

Shapes: K prediction sets, N images, Q queries, C channels of mask embeddings, T pairs, R = K * T masks, n points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..structures import Assignment, Predictions, Targets
from .criterion import SetCriterion
from .normalizers import LossNormalizers
from .point_sampling import DrawPoints, check_points, most_uncertain, sample_maps, sample_masks
from .terms import LossTerm


class MaskPoints(LossTerm):
    """Binary cross-entropy ("mask") and dice ("dice") of paired masks, each at its own points.

    Of ``int(oversample_ratio * n)`` uniform candidates those ``int(importance_ratio * n)`` at which the prediction is most
    uncertain, and fresh uniform points up to n. Maps are made of paired queries alone, in chunks; where there are
    several, each is made once more for the backward pass, so that only one exists at a time.

    Args:
        mask_weight, dice_weight: of the two losses.
        num_points: n.
        oversample_ratio, importance_ratio: as above.
        draw: of the points.

    Attributes:
        chunk: how many numbers the maps and candidates of a chunk have, at most; at least one mask.

    Raises:
        ValueError: a negative weight, no point, or more points to keep than candidates.
    """

    name = "mask"
    names = ("mask", "dice")
    chunk = 2**24

    def __init__(
        self,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        *,
        num_points: int,
        draw: DrawPoints,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
    ):
        check_points("the loss", mask_weight, dice_weight, num_points)
        if not 0 <= importance_ratio <= min(oversample_ratio, 1):
            raise ValueError(
                f"importance_ratio must lie between 0 and the smaller of 1 and oversample_ratio = {oversample_ratio}, got "
                f"{importance_ratio}"
            )
        super().__init__(mask_weight)
        self.dice_weight, self.draw = dice_weight, draw
        self.candidates, self.kept = int(oversample_ratio * num_points), int(importance_ratio * num_points)
        self.rest = num_points - self.kept

    def weighted(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> dict[str, Tensor]:
        """(K,) weighted losses "mask" and "dice"; none of predictions without masks, such as DINO's proposals."""
        if predictions.mask_embeddings is None:
            return {}
        entropy, dice = self(predictions, targets, assignment, normalizers)
        return {"mask": self.weight * entropy, "dice": self.dice_weight * dice}

    def __call__(
        self, predictions: Predictions, targets: Targets, assignment: Assignment, normalizers: LossNormalizers
    ) -> Tensor:
        """(2, K): sums over the pairs of the means over points, of cross-entropy and of dice, divided by their number."""
        embeddings, features = predictions.mask_embeddings, predictions.mask_features
        k, pairs = len(embeddings), len(assignment)
        if not pairs:
            return (0 * embeddings.flatten(1).sum(1) + 0 * features.sum()).expand(2, -1)
        # Pair by pair, the sets of a pair side by side, so that all masks of an image meet its features in one product.
        queries = embeddings[assignment.index(k)].transpose(0, 1).flatten(0, 1)  # (R, C)
        masks = (assignment.image * targets.valid.shape[1] + assignment.target).expand(k, -1).T.flatten()
        counts = [k * count for count in assignment.image_counts(len(features))]
        size = max(self.chunk // (features[0, 0].numel() + 3 * self.candidates), 1)
        chunks = chunk_images(counts, size)
        images = features.unbind()  # once: the gradient of each part of a tensor has the size of the whole
        queries = iter(queries.split([length for runs in chunks for _, length in runs]))
        losses = []
        for runs, row in zip(chunks, masks.split(size), strict=True):
            candidates = self.draw("loss", len(row), self.candidates, features.device)
            rest = self.draw("rest", len(row), self.rest, features.device)
            factors = [x for i, _ in runs for x in (next(queries), images[i])]
            arguments = (targets.masks, row, candidates, rest, *factors)
            if len(chunks) > 1 and torch.is_grad_enabled():
                losses.append(checkpoint(self._losses, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                losses.append(self._losses(*arguments))
        return torch.cat(losses, 1).unflatten(1, (pairs, k)).sum(1) / normalizers.num_pairs

    def _losses(self, masks: Tensor, row: Tensor, candidates: Tensor, rest: Tensor, *factors: Tensor) -> Tensor:
        """(2, r) cross-entropy and dice of r masks, products of (r_i, C) embeddings and (C, h, w) features."""
        runs, features = factors[::2], factors[1::2]
        maps = torch.cat([run @ x.flatten(1) for run, x in zip(runs, features, strict=True)])
        maps = maps.unflatten(1, features[0].shape[1:])
        points = torch.cat([most_uncertain(maps, candidates, self.kept), rest], 1)
        logits, wanted = sample_maps(maps[:, None], points)[:, 0], sample_masks(masks, row, points)
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
        prob = logits.sigmoid()
        dice = 1 - (2 * (prob * wanted).sum(1) + 1) / (prob.sum(1) + wanted.sum(1) + 1)
        return torch.stack([entropy, dice])


def chunk_images(counts: list[int], size: int) -> list[list[tuple[int, int]]]:
    """Divides a row of items, ``counts[i]`` of image i, into chunks of at most ``size``.

    Returns:
        list: of each chunk its (image, number of items), in order.
    """
    chunks, room = [], 0
    for image, left in enumerate(counts):
        while left:
            if not room:
                chunks.append([])
                room = size
            taken = min(left, room)
            chunks[-1].append((image, taken))
            left, room = left - taken, room - taken
    return chunks


def without_masks(criterion: SetCriterion) -> SetCriterion:
    """The same criterion without its loss of masks."""
    return type(criterion)([term for term in criterion.terms if not isinstance(term, MaskPoints)])
