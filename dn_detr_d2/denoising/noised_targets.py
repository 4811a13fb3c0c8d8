"""Noised ground truth laid out on the query axis.

Shapes: N images, D denoising queries, Q matching queries. Denoising queries stand before the matching queries; which slot
belongs to which group is said by :class:`~dn_detr_d2.denoising.QueryGroups`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..structures import Assignment, IsolatedGroups
from .mask_noise import NoisedMasks
from .query_groups import QueryGroups


@dataclass
class NoisedTargets:
    """What the denoising queries start from, and what they must restore.

    Attributes:
        labels: (N, D) int64 noised labels, "unknown" (num_classes) where padded.
        boxes: (N, D, 4) noised cxcywh boxes in [0, 1], 0.5 where padded.
        valid: (N, D) bool, False where padded.
        groups: group and copy of each slot, and which group sees which.
        assignment: which slot restores which ground truth; one row, padding left out. Its ``class_loss_mask`` (N, D) are the
            slots that have a class loss: those that restore an object, or that must learn to be none.
        mask_padding: whether padded slots are hidden from the other queries of their group.
        masks: noised masks, or None where the targets have none.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    groups: QueryGroups
    assignment: Assignment
    mask_padding: bool = False
    masks: NoisedMasks | None = None

    @property
    def num_queries(self) -> int:
        """D, the number of slots on the query axis, padding included."""
        return self.labels.shape[1]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.groups.num_groups

    @property
    def isolated(self) -> IsolatedGroups | None:
        """The groups, where :meth:`attention_mask` says no more than that each sees itself and the matching queries."""
        return None if self.mask_padding else self.groups.pattern

    def as_known(self) -> "NoisedTargets":
        """The same as known objects: matching queries see them; nobody sees padding, which would tell of other images."""
        return replace(self, groups=self.groups.shown_to_matching(), mask_padding=True)

    def attention_mask(self, num_matching: int) -> Tensor:
        """Self-attention mask over denoising and matching queries (DN-DETR Eq. 8-9), from the table of ``groups``.

        Padded slots stay visible inside their group, as in the official code, unless ``mask_padding``.

        Args:
            num_matching: Q.

        Returns:
            Tensor: (D + Q, D + Q) bool [query, key], True = blocked; (N, D + Q, D + Q) with ``mask_padding``.
        """
        blocked = self.groups.attention_mask(num_matching)
        if self.mask_padding:
            padded_key = torch.cat([~self.valid, self.valid.new_zeros(len(self.valid), num_matching)], 1)
            blocked = blocked | padded_key[:, None]
        return blocked
