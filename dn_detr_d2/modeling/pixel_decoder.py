"""From the encoder's memory to mask features: the finest level, enlarged and joined with a backbone map of stride 4.

Shapes: N images, C channels.
"""

from dataclasses import replace

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..errors import ConfigError
from ..structures import Memory
from .neck import Neck

STRIDE = 4  # of the mask features, in pixels of the padded image


def padded_size(memory: Memory) -> tuple[int, int] | None:
    """(height, width) of the padded images, to which boxes are relative in models with masks; None in all other models."""
    if memory.mask_features is None:
        return None
    height, width = memory.mask_features.shape[-2:]
    return STRIDE * height, STRIDE * width


class PixelDecoder(nn.Module):
    """The last step of Mask2Former's pixel decoder (Cheng et al., CVPR 2022, Sec. 3.2), after neck and encoder.

    Args:
        in_channels: of the backbone map.
        dim: C.
        feature: name of the backbone map, of stride :data:`STRIDE`.
    """

    @configurable
    def __init__(self, *, in_channels: int, dim: int, feature: str):
        super().__init__()
        self.feature = feature
        self.lateral = self._norm_after(nn.Conv2d(in_channels, dim, 1, bias=False))
        self.fuse = self._norm_after(nn.Conv2d(dim, dim, 3, padding=1, bias=False))
        self.mask_features = nn.Conv2d(dim, dim, 1)
        c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR``; refuses a map of another stride, or one that is not there."""
        root = cfg.MODEL.DN_DETR
        name = root.MASK.FEATURE
        if name not in input_shape or input_shape[name].stride != STRIDE:
            found = {key: shape.stride for key, shape in input_shape.items()}
            raise ConfigError(
                f"MODEL.DN_DETR.MASK.FEATURE = {name!r} must be a map of stride {STRIDE}, but "
                f"{cfg.MODEL.BACKBONE.NAME} makes {found} (stride of each map); add it to the backbone's OUT_FEATURES"
            )
        if root.SIZE_DIVISIBILITY <= 0 or root.SIZE_DIVISIBILITY % STRIDE:
            raise ConfigError(
                f"MODEL.DN_DETR.SIZE_DIVISIBILITY = {root.SIZE_DIVISIBILITY} must be a multiple of {STRIDE} with "
                "MASK.ENABLED, so that mask features have whole cells; 32 fits the usual backbones"
            )
        if root.HIDDEN_DIM % Neck.NUM_GROUPS or root.HIDDEN_DIM == Neck.NUM_GROUPS:
            raise ConfigError(
                f"MODEL.DN_DETR.HIDDEN_DIM = {root.HIDDEN_DIM} must be a multiple of {Neck.NUM_GROUPS} above "
                f"{Neck.NUM_GROUPS} for the group norms of MASK.ENABLED"
            )
        return {"in_channels": input_shape[name].channels, "dim": root.HIDDEN_DIM, "feature": name}

    @staticmethod
    def _norm_after(convolution: nn.Conv2d) -> nn.Sequential:
        c2_xavier_fill(convolution)
        return nn.Sequential(convolution, nn.GroupNorm(Neck.NUM_GROUPS, convolution.out_channels))

    def forward(self, features: dict[str, Tensor], memory: Memory) -> Memory:
        """The memory with its ``mask_features``, (N, C, H / 4, W / 4)."""
        raw = features[self.feature]
        finest = max(range(len(memory.shapes)), key=lambda level: memory.shapes[level])
        cells = memory.of_levels(memory.tokens)[finest].transpose(1, 2).unflatten(2, memory.shapes[finest])
        enlarged = F.interpolate(cells, raw.shape[-2:], mode="bilinear", align_corners=False)
        joined = self.fuse(self.lateral(raw) + enlarged).relu()
        return replace(memory, mask_features=self.mask_features(joined))
