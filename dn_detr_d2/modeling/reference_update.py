"""How a decoder passes reference boxes from layer to layer: one small class a rule.

Shapes: N images, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class References:
    """The reference boxes of one decoder layer.

    Attributes:
        refined: (N, Q, 4), what the box head of the layer corrects; the loss of the layer follows its gradient.
        entering: (N, Q, 4), the same numbers as the layer itself sees them.
    """

    refined: Tensor
    entering: Tensor


class ReferenceUpdate:
    """Base of the rules: the references of the next layer from those of this one."""

    def __call__(self, references: References, correct: Callable[[], Tensor]) -> References:
        """The references of the next layer.

        Args:
            references: of this layer.
            correct: gives the entering references corrected by this layer, (N, Q, 4); it costs a pass of the box head.
        """
        raise NotImplementedError


class Static(ReferenceUpdate):
    """Every layer predicts from the references of the start (DETR, plain Deformable DETR)."""

    def __call__(self, references: References, correct: Callable[[], Tensor]) -> References:
        """The same again, with their gradient: the loss of every layer reaches them."""
        return References(references.entering, references.entering)


class Detached(ReferenceUpdate):
    """Every layer corrects the boxes of the layer before, whose gradient stops there (Deformable DETR)."""

    def __call__(self, references: References, correct: Callable[[], Tensor]) -> References:
        """The corrected boxes, without gradient."""
        boxes = correct().detach()
        return References(boxes, boxes)


class LookForwardTwice(ReferenceUpdate):
    """The loss of layer i + 1 also reaches the correction of layer i (DINO Sec. 3.5; DAB-DETR and DN-DETR do it unnamed)."""

    def __call__(self, references: References, correct: Callable[[], Tensor]) -> References:
        """The corrected boxes with their gradient towards this layer's correction; the next layer sees them without."""
        boxes = correct()
        return References(boxes, boxes.detach())
