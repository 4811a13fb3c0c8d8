"""Noised ground truth laid out on the query axis, and who may see whom.

Shapes: N images, M objects a group has room for, G groups, D = G * M denoising queries, Q matching queries.
Slot g * M + j holds copy g of the j-th object of its image; contrastive groups are 2 M wide, M positive and then M negative
copies. Denoising queries stand before the matching queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import Assignment


@dataclass
class NoisedTargets:
    """What the denoising queries start from, and what they must restore.

    Attributes:
        labels: (N, D) int64 noised labels, "unknown" (num_classes) where padded.
        boxes: (N, D, 4) noised cxcywh boxes in [0, 1], 0.5 where padded.
        valid: (N, D) bool, False where padded.
        num_groups: G.
        assignment: which slot restores which ground truth; one row, padding left out.
        counted: (N, D) bool, slots that have a class loss: those that restore an object, or that must learn to be none.
        mask_padding: whether padded slots are hidden from the other queries of their group.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    num_groups: int
    assignment: Assignment
    counted: Tensor
    mask_padding: bool = False

    @property
    def num_queries(self) -> int:
        """D, the number of slots on the query axis, padding included."""
        return self.labels.shape[1]

    def attention_mask(self, num_matching: int) -> Tensor:
        """Self-attention mask over denoising and matching queries (DN-DETR Eq. 8-9).

        One rule: *a denoising key is visible to its own group only*. So no matching query sees a noised ground truth,
        and no group sees another; matching queries are visible to all. Padded slots stay visible inside their group, as
        in the official code, unless ``mask_padding``.

        Args:
            num_matching: Q.

        Returns:
            Tensor: (D + Q, D + Q) bool [query, key], True = blocked; (N, D + Q, D + Q) with ``mask_padding``.
        """
        d = self.num_queries
        position = torch.arange(d + num_matching, device=self.labels.device)
        is_denoising = position < d
        group = torch.where(is_denoising, position // (d // self.num_groups), -1)
        blocked = is_denoising & (group[:, None] != group)
        if self.mask_padding:
            padded_key = torch.cat([~self.valid, self.valid.new_zeros(len(self.valid), num_matching)], 1)
            blocked = blocked | padded_key[:, None]
        return blocked
