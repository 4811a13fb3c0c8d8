"""Sine encodings: of the cells of a feature map, and of boxes.

Coordinates are turned into channels as in Vaswani et al., with sine and cosine interleaved. Maps and boxes are encoded y
first, x second; the reason is only that DETR began so, and every checkpoint of the family depends on it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def sine_encoding(x: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Encodes angles: channel 2i is sin(x / T^(2i/dim)), channel 2i+1 the cosine.

    Args:
        x: (...) angles in radians.
        dim: number of channels, even.
        temperature: T, the longest wavelength divided by 2 pi.

    Returns:
        Tensor: (..., dim) float32, or float64 for float64 angles.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    x = x if x.dtype == torch.float64 else x.float()
    angles = x[..., None] / wavelengths(dim, temperature, x)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def wavelengths(dim: int, temperature: float, like: Tensor) -> Tensor:
    """(dim / 2,) numbers T^(2i/dim) in the dtype and on the device of ``like``; made once and kept, but for tracers."""
    key = (dim, temperature, like.dtype, like.device)
    if not torch.compiler.is_compiling() and key in _WAVELENGTHS:
        return _WAVELENGTHS[key]
    with torch.inference_mode(False):  # what is kept must go with training too
        exponent = torch.arange(0, dim, 2, dtype=like.dtype, device=like.device) / dim
        made = torch.full_like(exponent[0], temperature) ** exponent  # a Python number would be uploaded, with a wait
    if not torch.compiler.is_compiling() and type(made) is Tensor:  # not one of those that stand for a tensor
        _WAVELENGTHS[key] = made
    return made


_WAVELENGTHS: dict[tuple, Tensor] = {}


def encode_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Sine encoding of boxes, DAB-DETR Eq. 3-5: (..., 4) cxcywh in [0, 1] -> (..., 4 * dim) in the order y, x, w, h."""
    cx, cy, w, h = boxes.unbind(-1)  # an index that is a list would be uploaded, with a wait
    return sine_encoding(torch.stack([cy, cx, w, h], -1) * (2 * math.pi), dim).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Position encoding of the cells of a padded map, counted in cells inside the image.

    Args:
        dim: channels of the result, divisible by 4; the first half is y, the second half x.
        temperature: 20 in DAB-DETR and DN-DETR, 10000 in DETR and the deformable family.
        offset: added to the count before it is divided by the number of cells; -0.5 puts the value at the cell's centre
            (deformable family), 0 in DETR, DAB-DETR and DN-DETR.
    """

    EPS = 1e-6

    def __init__(self, dim: int, temperature: float = 10000.0, offset: float = 0.0):
        super().__init__()
        if dim <= 0 or dim % 4:
            raise ValueError(f"dim must be positive and divisible by 4, got {dim}")
        self.dim, self.temperature, self.offset = dim, temperature, offset

    def forward(self, padding: Tensor) -> Tensor:
        """(N, h, w) bool, True outside the image -> (N, dim, h, w) float32."""
        return self.of_levels([padding])[0]

    def of_levels(self, padding: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The encodings of several maps, made together; ``dtype`` None = float32."""
        counted = [self._count(x) for x in padding]
        place, total = (torch.cat(x, 1) for x in zip(*counted, strict=True))
        angles = (place + self.offset) / (total + self.EPS) * (2 * math.pi)  # (N, S, 2), in [0, 2 pi] inside the image
        encoded = sine_encoding(angles, self.dim // 2, self.temperature).flatten(-2)
        levels = encoded.to(dtype or encoded.dtype).split([x.shape[1] for x, _ in counted], 1)
        return [x.unflatten(1, mask.shape[1:]).permute(0, 3, 1, 2) for x, mask in zip(levels, padding, strict=True)]

    def _count(self, padding: Tensor) -> tuple[Tensor, Tensor]:
        """(N, h, w) bool -> the places of the cells inside the image and how many there are, (N, h * w, 2) as (y, x)."""
        # Integers: cumulative sums of floats have no deterministic CUDA kernel.
        inside = ~padding
        y, x = (inside.cumsum(axis, dtype=torch.int32) for axis in (1, 2))
        totals = (y[:, -1:].expand_as(y), x[:, :, -1:].expand_as(x))
        place, total = (torch.stack(pair, -1).flatten(1, 2) for pair in ((y, x), totals))
        return place, total
