"""Turns the targets of a batch into noised targets. No parameters, no special case for images without objects.

Shapes: N images, M ground truths of the fullest image, m = min(M, room in a group), G groups, D = G * m queries.
"""

import numpy as np
import torch
from torch import Tensor

from ..structures import Assignment, Targets, upload
from .noise import flip_labels, random_subset, shift_and_scale
from .noised_targets import NoisedTargets


class DenoisingGenerator:
    """Denoising of DN-DETR (Li et al., CVPR 2022): G noised copies of every object, one a group.

    Since the *targets* are padded (M >= 1), a batch or a rank without objects runs the same graph as any other: its slots
    are all padding.

    Args:
        num_classes: number of classes P; index P stands for "unknown".
        num_groups: G >= 1.
        label_noise_prob: gamma in [0, 1], the chance that a label is redrawn.
        center_noise_scale: lambda1 >= 0, centre shift in half sizes.
        size_noise_scale: lambda2 >= 0, change of width and height in sizes.
        max_queries: at most so many denoising queries; 0 = no limit. When G * M is more, each group gets a fresh random
            subset of ``max_queries // G`` objects of each image that has more.
        mask_padding: hide padded slots from the real queries of their group (the official code does not).

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_groups: int,
        label_noise_prob: float,
        center_noise_scale: float,
        size_noise_scale: float,
        max_queries: int = 0,
        mask_padding: bool = False,
    ):
        if num_classes < 1 or num_groups < 1:
            raise ValueError(f"num_classes and num_groups must be positive, got {num_classes} and {num_groups}")
        if not 0 <= label_noise_prob <= 1:
            raise ValueError(f"label_noise_prob must lie in [0, 1], got {label_noise_prob}")
        if center_noise_scale < 0 or size_noise_scale < 0:
            raise ValueError(f"noise scales must not be negative, got {center_noise_scale} and {size_noise_scale}")
        if max_queries and max_queries < num_groups:
            raise ValueError(
                f"max_queries must be 0 (no limit) or at least num_groups = {num_groups}, got {max_queries}"
            )
        self.num_classes, self.num_groups = num_classes, num_groups
        self.label_noise_prob = label_noise_prob
        self.center_noise_scale, self.size_noise_scale = center_noise_scale, size_noise_scale
        self.max_queries, self.mask_padding = max_queries, mask_padding

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DENOISING``."""
        node = cfg.MODEL.DN_DETR.DENOISING
        return {
            "num_classes": cfg.MODEL.DN_DETR.NUM_CLASSES,
            "num_groups": node.NUM_GROUPS,
            "label_noise_prob": node.LABEL_NOISE_PROB,
            "center_noise_scale": node.CENTER_NOISE_SCALE,
            "size_noise_scale": node.SIZE_NOISE_SCALE,
            "max_queries": node.MAX_QUERIES,
            "mask_padding": node.MASK_PADDING,
        }

    def __call__(self, targets: Targets) -> NoisedTargets:
        """Draws fresh noise for a batch; ``targets`` stay as they were."""
        room = self._room(targets.labels.shape[1])
        chosen = self._choose(targets, room)  # (N, G, m) index on the target axis
        image = torch.arange(len(targets.labels), device=chosen.device)[:, None, None]
        labels, boxes, valid = (x[image, chosen] for x in (targets.labels, targets.boxes, targets.valid))

        labels = flip_labels(labels, self.label_noise_prob, self.num_classes)
        boxes = shift_and_scale(boxes, self.center_noise_scale, self.size_noise_scale)
        labels = torch.where(valid, labels, self.num_classes)
        boxes = torch.where(valid[..., None], boxes, 0.5)
        return NoisedTargets(
            labels.flatten(1),
            boxes.flatten(1, 2),
            valid.flatten(1),
            self.num_groups,
            self._assign(chosen, targets.counts),
            self.mask_padding,
        )

    def _room(self, num_objects: int) -> int:
        """Objects that a group has room for."""
        return min(num_objects, self.max_queries // self.num_groups) if self.max_queries else num_objects

    def _choose(self, targets: Targets, room: int) -> Tensor:
        """(N, G, m): which ground truth stands in which slot; all of them in order while there is room."""
        n, m = targets.labels.shape
        if room == m:
            return torch.arange(m, device=targets.labels.device).expand(n, self.num_groups, m)
        return random_subset(targets.valid[:, None].expand(-1, self.num_groups, -1), room)

    def _assign(self, chosen: Tensor, counts: list[int]) -> Assignment:
        """Pairs every real slot with its ground truth. Which slots are real is known on the host: no device read."""
        room = chosen.shape[-1]
        filled = np.arange(room) < np.minimum(counts, room)[:, None]  # (N, m)
        image, slot = np.nonzero(np.tile(filled, self.num_groups))
        image, slot = upload(np.stack([image, slot]), chosen)
        return Assignment(image, slot[None], chosen.flatten(1)[image, slot][None])
