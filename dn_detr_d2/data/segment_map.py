"""Objects of an image as the values of a map, which moves with the image."""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from ..errors import DatasetError
from .masks import boxes_of

NOTHING = 255  # value of pixels of no object, also of those that pad the image


def require_size(path: str, size: tuple[int, int], image: str, wanted: tuple[int, int]) -> None:
    """Raises DatasetError if the map in a file, (height, width) ``size``, has not the ``wanted`` one of its image."""
    if tuple(size) != tuple(wanted):
        raise DatasetError(
            f"{path} is {size[1]}x{size[0]}, but its image {image} is {wanted[1]}x{wanted[0]} (width x height); make them "
            "equal"
        )


@dataclass(frozen=True)
class SegmentMap:
    """What the pixels of an image belong to; each value is one object.

    Attributes:
        pixels: (H, W) uint8, or float32 with more than 255 objects; ``NOTHING`` = no object.
        values: of each object.
        labels, index: of each object, what its ``gt_classes`` and ``gt_index`` become.
    """

    pixels: np.ndarray
    values: list[int]
    labels: list[int]
    index: list[int]

    def instances(self, moved: np.ndarray) -> Instances:
        """The objects of the augmented map (H, W): masks, and boxes around them; what has no pixel left is left out."""
        masks = np.equal(moved, np.array(self.values, moved.dtype).reshape(-1, 1, 1))
        boxes, kept = boxes_of(masks)
        rows = np.flatnonzero(kept)
        masks = BitMasks(torch.from_numpy(masks[rows]))
        classes, index = (torch.tensor(x, dtype=torch.int64)[rows] for x in (self.labels, self.index))
        boxes = Boxes(torch.from_numpy(boxes[rows]))
        return Instances(moved.shape, gt_boxes=boxes, gt_classes=classes, gt_index=index, gt_masks=masks)
