"""Noised masks: the objects' masks, each moved by whole pixels.

Shapes: N images, M objects of the fullest image, D denoising queries, (H, W) pixels of the padded image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NoisedMasks:
    """Masks of the denoising queries (DN-DETR, TPAMI 2024, on Mask2Former), kept as clean masks and offsets.

    Attributes:
        masks: (N, M, H, W) bool clean masks.
        index: (N, D) int64, whose mask each slot has, on the target axis (M).
        offsets: (N, D, 2) int64 (x, y) by which it is moved, in pixels.
        valid: (N, D) bool, False where padded.
    """

    masks: Tensor
    index: Tensor
    offsets: Tensor
    valid: Tensor

    def cells(self, shape: tuple[int, int]) -> Tensor:
        """(N, D, h, w) bool: which cells of a level of h x w the moved masks cover any part of; none where padded.

        Raises:
            ValueError: cells that are not squares of whole pixels.
        """
        size, cell = tuple(self.masks.shape[-2:]), self.masks.shape[-2] // shape[0]
        if (shape[0] * cell, shape[1] * cell) != size:
            raise ValueError(
                f"masks of {size} pixels cannot be divided into {tuple(shape)} square cells of whole pixels"
            )
        images = zip(self.masks, self.index, self.offsets, strict=True)
        covered = torch.stack([shift_masks(masks, offsets, cell, index) for masks, index, offsets in images])
        return covered & self.valid[..., None, None]


def shift_masks(masks: Tensor, offsets: Tensor, cell: int = 1, index: Tensor | None = None) -> Tensor:
    """Moves masks by whole pixels; those that leave the image are lost, and what comes in is empty.

    A summed-area table of the masks as they are says which cells the moved ones cover: D masks of full size never exist.

    Args:
        masks: (M, H, W) bool.
        offsets: (D, 2) int64 (x, y), positive to the right and downwards.
        cell: side in pixels, a divisor of H and W, of the squares of which each is covered if any of its pixels is.
        index: (D,) int64, which of the masks is moved; None = each by its own offset.

    Returns:
        Tensor: (D, H / cell, W / cell) bool.
    """
    h, w = masks.shape[1:]
    area = masks.new_zeros(len(masks), h + 1, w + 1, dtype=torch.int32)  # pixels above and to the left of each corner
    area[:, 1:, 1:] = masks.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    x, y = (
        (torch.arange(0, size + 1, cell, device=masks.device) - offsets[:, i, None]) for i, size in enumerate((w, h))
    )
    index = torch.arange(len(masks), device=masks.device) if index is None else index
    corners = area[index[:, None, None], y.clamp(0, h)[:, :, None], x.clamp(0, w)[:, None]]
    return corners.diff(dim=1).diff(dim=2) > 0
