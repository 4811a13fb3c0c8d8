"""Kinds of box noise by name: functions of boxes and of the scale of the noise that return new boxes.

A noise takes (..., 4) cxcywh boxes in [0, 1] and a :class:`NoiseScale`, and gives boxes of the same shape, each of whose
four numbers is clamped to [0, 1]. At scale (0, 0) it gives the boxes back. All draw from PyTorch's global generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import reach, shift_and_scale
from .noise_registry import NoiseRegistry


class NoiseScale(NamedTuple):
    """How strong box noise is.

    Attributes:
        center: lambda1 >= 0, of the centre, in half widths and heights.
        size: lambda2 >= 0, of width and height, in widths and heights.
    """

    center: float
    size: float


BoxNoise = Callable[[Tensor, NoiseScale], Tensor]
BOX_NOISES = NoiseRegistry("box_noise", "MODEL.DN_DETR.DENOISING.BOX_NOISE.NAME")


@BOX_NOISES.register("uniform")
def uniform(boxes: Tensor, scale: NoiseScale) -> Tensor:
    """DN-DETR's noise (Sec. 4.1): each number moves by u times its reach, u uniform in (-1, 1)."""
    return shift_and_scale(boxes, *scale)


@BOX_NOISES.register("gaussian")
def gaussian(boxes: Tensor, scale: NoiseScale) -> Tensor:
    """Normal noise with the standard deviation of the uniform one, reach / sqrt(3), and no bound but the clamp."""
    return (boxes + torch.randn_like(boxes) * reach(boxes[..., 2:], *scale) / math.sqrt(3)).clamp(0, 1)


@BOX_NOISES.register("truncated_gaussian")
def truncated_gaussian(boxes: Tensor, scale: NoiseScale) -> Tensor:
    """Normal noise of standard deviation reach / 2, cut off at the reach, that is at two standard deviations.

    Drawn by the inverse of its distribution function. Its own standard deviation is 0.4398 reaches (uniform: 0.5774).
    """
    u = (2 * torch.rand_like(boxes) - 1) * math.erf(math.sqrt(2))
    return (boxes + u.erfinv() / math.sqrt(2) * reach(boxes[..., 2:], *scale)).clamp(0, 1)


@BOX_NOISES.register("iou_targeted")
def iou_targeted(boxes: Tensor, scale: NoiseScale) -> Tensor:
    """Noise whose IoU with the object is uniform in [:func:`least_iou`, 1].

    A direction is drawn as DN-DETR draws its noise, and the box moves along it until its IoU with the object is the wanted
    one, see :func:`distance_at_iou`. So the IoU is spread evenly over the range that uniform noise of this scale covers
    unevenly. The IoU is as wanted but where the clamp changes a number: for a centre outside the image or a side above 1.
    (Boxes of a wanted IoU are also made by Oksuz et al., WACV 2020, corner by corner.)
    """
    direction = (2 * torch.rand_like(boxes) - 1) * reach(torch.ones_like(boxes[..., 2:]), *scale)
    loss = torch.rand_like(boxes[..., :1]) * (1 - least_iou(scale))
    return (boxes + distance_at_iou(direction, loss) * direction * boxes[..., 2:].tile(2)).clamp(0, 1)


def distance_at_iou(direction: Tensor, loss: Tensor) -> Tensor:
    """How far to go from a box in a direction until the IoU with it is c = 1 - ``loss``; in closed form.

    After t steps of (a_x, a_y, b_x, b_y), in widths and heights of the box, its sides are 1 + t b, and along each axis the
    overlap is 1 - t k with k = max(0, -b, abs(a) - b / 2): the moved side covers the other, lies inside, or sticks out. IoU
    = c means (1 + c) (1 - t k_x) (1 - t k_y) = c (1 + (1 + t b_x) (1 + t b_y)), a quadratic equation. IoU falls along the
    way, so its smaller positive root is the only one before the boxes part.

    Args:
        direction: (..., 4).
        loss: (..., 1) in [0, 1].

    Returns:
        Tensor: (..., 1) t >= 0; any number for a direction of zeros.
    """
    shift, change = direction.abs()[..., :2], direction[..., 2:]
    k = torch.maximum(-change, shift - change / 2).clamp(min=0)
    c = 1 - loss
    second = (1 + c) * k.prod(-1, keepdim=True) - c * change.prod(-1, keepdim=True)
    first = (1 + c) * k.sum(-1, keepdim=True) + c * change.sum(-1, keepdim=True)
    root = (first * first - 4 * second * loss).clamp(min=0).sqrt()
    return 2 * loss / (first + root).clamp(min=1e-20)


def least_iou(scale: NoiseScale) -> float:
    """The least IoU of a box with what uniform noise of this scale makes of it; (1 - lambda) ** 2 if both are lambda <= 1.

    IoU falls with the shift of the centre, and as a function of one side it has no minimum but at its ends, so the least
    lies at a corner of the range of (shift, width, height).
    """

    def corner(width: float, height: float) -> float:
        """The IoU of a unit square with a box of this size whose centre is shifted as far as it goes."""
        overlap = math.prod(max(min(1, side, (1 + side - scale.center) / 2), 0) for side in (width, height))
        return overlap / (1 + width * height - overlap)

    narrow, wide = max(1 - scale.size, 0), 1 + scale.size
    return min(corner(narrow, narrow), corner(narrow, wide), corner(wide, wide))


@BOX_NOISES.register("scale_aware")
@dataclass(frozen=True)
class ScaleAware:
    """Uniform noise that does not shrink with small objects: for them it is an absolute length, as annotation errors are.

    A side shorter than ``reference_size`` gets the reach of that size, but no side changes by more than itself. The noised
    box of a small object may thus lie beside it.

    Args:
        reference_size: in sides of the image, positive. The default is COCO's limit of small objects, 32 pixels (Lin et
            al., ECCV 2014), in an image of 640.
    """

    reference_size: float = 0.05

    def __post_init__(self):
        if not 0 < self.reference_size < math.inf:
            raise ValueError(f"reference_size must be positive, got {self.reference_size}")

    @classmethod
    def from_config(cls, cfg) -> "ScaleAware":
        """From ``DENOISING.BOX_NOISE.REFERENCE_SIZE``."""
        return cls(cfg.MODEL.DN_DETR.DENOISING.BOX_NOISE.REFERENCE_SIZE)

    def __call__(self, boxes: Tensor, scale: NoiseScale) -> Tensor:
        """Noised boxes."""
        size = boxes[..., 2:]
        shift, change = reach(size.clamp(min=self.reference_size), *scale).split(2, -1)
        step = torch.cat([shift, torch.minimum(change, size)], -1)
        return (boxes + (2 * torch.rand_like(boxes) - 1) * step).clamp(0, 1)
