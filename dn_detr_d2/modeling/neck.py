"""From backbone maps to a pyramid of C-channel maps with padding masks and position encodings.

Shapes: N images, C channels, L levels, (h, w) the size of a level.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import SinePositionEncoding
from ..structures import Pyramid
from .hidden_padding import outside, project


class Neck(nn.Module):
    """Projects the chosen backbone maps to C channels and adds coarser levels by strided convolution.

    The first extra level is a 3x3 stride-2 convolution of the coarsest *backbone* map, each further one of the level
    before it (Deformable DETR). Levels are in the order of ``in_features``; extra ones stand at its coarse end.

    Args:
        input_shape: channels of every backbone map.
        in_features: backbone maps to use, high resolution first, or low resolution first (Mask2Former).
        num_levels: L, at least the number of ``in_features``.
        dim: C.
        norm: "" for none (DETR, DAB-DETR, DN-DETR) or "GN" for 32 groups (deformable family).
        position_encoding: of the padding mask of each level.
        xavier: whether convolutions in front of a norm start from Xavier and bias 0; otherwise, and without a norm, they
            start as PyTorch's do.
    """

    NUM_GROUPS = 32

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: list[str],
        num_levels: int,
        dim: int,
        norm: str,
        position_encoding: SinePositionEncoding,
        xavier: bool = True,
    ):
        super().__init__()
        self.in_features = list(in_features)
        self.strides = {name: input_shape[name].stride for name in in_features}
        self.coarse_first = len(in_features) > 1 and is_coarser(input_shape, in_features[0], in_features[-1])
        channels = [input_shape[name].channels for name in in_features]
        coarsest = channels[0 if self.coarse_first else -1]
        projections = [self._projection(width, dim, 1, norm, xavier) for width in channels]
        for level in range(len(channels), num_levels):
            projections.append(self._projection(coarsest if level == len(channels) else dim, dim, 3, norm, xavier))
        self.projections = nn.ModuleList(projections)
        self.position_encoding = position_encoding

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR``; refuses maps that the backbone does not make."""
        node = cfg.MODEL.DN_DETR
        if unknown := [name for name in node.IN_FEATURES if name not in input_shape]:
            raise ConfigError(
                f"MODEL.DN_DETR.IN_FEATURES names {unknown}, but {cfg.MODEL.BACKBONE.NAME} makes {sorted(input_shape)}"
            )
        if not 0 < len(node.IN_FEATURES) <= node.NUM_FEATURE_LEVELS:
            raise ConfigError(
                f"MODEL.DN_DETR.NUM_FEATURE_LEVELS = {node.NUM_FEATURE_LEVELS} must be at least the number of "
                f"IN_FEATURES {list(node.IN_FEATURES)}, which must not be empty"
            )
        if node.NECK.NORM not in ("", "GN"):
            raise ConfigError(f"MODEL.DN_DETR.NECK.NORM must be '' or 'GN', got {node.NECK.NORM!r}")
        if node.HIDDEN_DIM < 4 or node.HIDDEN_DIM % 4:
            raise ConfigError(
                f"MODEL.DN_DETR.HIDDEN_DIM = {node.HIDDEN_DIM} must be divisible by 4 for the sine encoding of (y, x) pairs"
            )
        # With one channel a group, a level of a single cell could not be normalised.
        if node.NECK.NORM and (node.HIDDEN_DIM % cls.NUM_GROUPS or node.HIDDEN_DIM == cls.NUM_GROUPS):
            raise ConfigError(
                f"MODEL.DN_DETR.HIDDEN_DIM = {node.HIDDEN_DIM} must be a multiple of {cls.NUM_GROUPS} above "
                f"{cls.NUM_GROUPS} for the groups of NECK.NORM = GN"
            )
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "num_levels": node.NUM_FEATURE_LEVELS,
            "dim": node.HIDDEN_DIM,
            "norm": node.NECK.NORM,
            "position_encoding": build_position_encoding(cfg),
            "xavier": node.INITIALIZATION != "dn_encoder_only",
        }

    @classmethod
    def _projection(cls, in_channels: int, dim: int, kernel: int, norm: str, xavier: bool) -> nn.Sequential:
        stride, padding = (1, 0) if kernel == 1 else (2, 1)
        convolution = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=padding)
        if not norm:
            return nn.Sequential(convolution)
        if xavier:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        return nn.Sequential(convolution, nn.GroupNorm(cls.NUM_GROUPS, dim))

    def forward(self, features: dict[str, Tensor], padding: Tensor, *, hidden: bool = False) -> Pyramid:
        """Backbone maps and the (N, H, W) bool pixel padding mask -> Pyramid.

        Args:
            features: maps of the backbone.
            padding: True right of and below each image.
            hidden: keep padding out of convolutions and norms, see :mod:`.hidden_padding`.
        """
        raw = [(features[name], self.strides[name]) for name in self.in_features]
        given, extra = self.projections[: len(raw)], self.projections[len(raw) :]

        def _project(projection: nn.Sequential, source: tuple[Tensor, int]) -> tuple[Tensor, int]:
            return project(projection, source[0], padding, source[1]) if hidden else (projection(source[0]), 0)

        maps, coarser = [_project(*pair) for pair in zip(given, raw, strict=True)], []
        for projection in extra:
            coarser.append(_project(projection, coarser[-1] if coarser else raw[0 if self.coarse_first else -1]))
        maps = coarser[::-1] + maps if self.coarse_first else maps + coarser
        masks = [outside(padding, stride) if hidden else shrink_mask(padding, x.shape[-2:]) for x, stride in maps]
        maps = [x for x, _ in maps]
        return Pyramid(maps, self.position_encoding.of_levels(masks, maps[0].dtype), masks)

    def count_cells(self, size: tuple[int, int]) -> int:
        """Cells of all levels of an image of (height, width) without padding."""
        strides = list(self.strides.values())
        while len(strides) < len(self.projections):
            strides.append(2 * max(strides))
        return sum(math.prod(-(-length // stride) for length in size) for stride in strides)


def build_position_encoding(cfg) -> SinePositionEncoding:
    """The encoding of image cells of ``MODEL.DN_DETR.NECK``."""
    node = cfg.MODEL.DN_DETR
    return SinePositionEncoding(node.HIDDEN_DIM, node.NECK.POSITION_TEMPERATURE, node.NECK.POSITION_OFFSET)


def is_coarser(input_shape: dict[str, ShapeSpec], a: str, b: str) -> bool:
    """Whether backbone map ``a`` has a larger stride than ``b``; False where strides are not told."""
    strides = input_shape[a].stride, input_shape[b].stride
    return None not in strides and strides[0] > strides[1]


def padding_mask(sizes: Tensor, height: int, width: int) -> Tensor:
    """(N, height, width) bool: True on the pixels right of and below each image of size (h, w), sizes (N, 2)."""
    rows, columns = torch.arange(height, device=sizes.device), torch.arange(width, device=sizes.device)
    return (rows[None, :, None] >= sizes[:, 0, None, None]) | (columns[None, None] >= sizes[:, 1, None, None])


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool -> (N, h, w) bool by nearest neighbour, as DETR does."""
    return F.interpolate(mask[None].float(), size=size)[0].bool()
