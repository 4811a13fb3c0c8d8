"""Transformer encoders: from a pyramid of maps to the memory that the decoder looks at.

Shapes: N images, C channels, L levels, S = sum of h * w over the levels.
"""

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import (
    MLP,
    AxisEncoding,
    FeedForward,
    LayerStack,
    MultiScaleDeformableAttention,
    RowColumnAttention,
    SelfAttention,
    axis_coordinates,
)
from ..structures import Memory, Pyramid
from .registry import ENCODER_REGISTRY, initialise_transformer


def transformer_arguments(cfg, role: str) -> dict:
    """The arguments that encoder and decoder share, from ``MODEL.DN_DETR.<role>``; checks how they go together."""
    root = cfg.MODEL.DN_DETR
    node = root[role]
    if node.NUM_HEADS < 1 or root.HIDDEN_DIM % node.NUM_HEADS:
        raise ConfigError(
            f"MODEL.DN_DETR.HIDDEN_DIM = {root.HIDDEN_DIM} is not divisible by {role}.NUM_HEADS = {node.NUM_HEADS}"
        )
    for key in ("NUM_LAYERS", "FFN_DIM", "NUM_POINTS"):
        if node[key] < 1:
            raise ConfigError(f"MODEL.DN_DETR.{role}.{key} must be positive, got {node[key]}")
    if not 0 <= node.DROPOUT < 1:
        raise ConfigError(f"MODEL.DN_DETR.{role}.DROPOUT must lie in [0, 1), got {node.DROPOUT}")
    return {
        "dim": root.HIDDEN_DIM,
        "num_layers": node.NUM_LAYERS,
        "num_heads": node.NUM_HEADS,
        "ffn_dim": node.FFN_DIM,
        "dropout": node.DROPOUT,
        "activation_checkpointing": node.ACTIVATION_CHECKPOINTING,
        "initialization": root.INITIALIZATION,
    }


def flatten_pyramid(pyramid: Pyramid, level_embed: Tensor | None = None) -> Memory:
    """Lays all cells of all levels in a row; ``level_embed`` (L, C) is added to the positions of each level."""
    tokens = torch.cat([x.flatten(2) for x in pyramid.maps], 2).transpose(1, 2)  # (N, S, C)
    positions = [x.flatten(2).transpose(1, 2) for x in pyramid.positions]
    if level_embed is not None:
        positions = [x + embed for x, embed in zip(positions, level_embed, strict=True)]
    padding = torch.cat([x.flatten(1) for x in pyramid.padding], 1)
    # Under torch.jit.trace sizes are tensors, but the operator needs numbers.
    shapes = [tuple(int(s) if isinstance(s, Tensor) else s for s in x.shape[-2:]) for x in pyramid.maps]
    valid_ratios = torch.stack([valid_ratio(x) for x in pyramid.padding], 1)
    return Memory(tokens, torch.cat(positions, 1), padding, shapes, valid_ratios)


def valid_ratio(padding: Tensor) -> Tensor:
    """(N, h, w) bool padding -> (N, 2) part of (width, height) inside the image."""
    inside = (~padding).to(torch.get_default_dtype())
    return torch.stack([inside[:, 0].mean(1), inside[:, :, 0].mean(1)], -1)


def cell_centres(memory: Memory) -> Tensor:
    """(N, S, L, 2) centre of each cell as (x, y) in [0, 1] of every padded level."""
    return cell_points(memory)[:, :, None] * memory.valid_ratios[:, None]


def cell_points(memory: Memory) -> Tensor:
    """(N, S, 2) centre of each cell as (x, y) in [0, 1] of the unpadded image; above 1 on padding."""
    centres = []
    for (height, width), ratio in zip(memory.shapes, memory.valid_ratios.unbind(1), strict=True):
        y = (torch.arange(height, device=ratio.device, dtype=ratio.dtype) + 0.5) / height
        x = (torch.arange(width, device=ratio.device, dtype=ratio.dtype) + 0.5) / width
        grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)
        centres.append(grid / ratio[:, None])
    return torch.cat(centres, 1)


class DenseEncoderLayer(nn.Module):
    """Self-attention over all cells and a feed-forward block; the activation is the block's ("relu" or "prelu")."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float, activation: str):
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout, activation)

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """(N, S, C) -> (N, S, C)."""
        return self.ffn(self.self_attn(tokens, positions, padding[:, None]))


@ENCODER_REGISTRY.register()
class PlainEncoder(LayerStack):
    """DETR's encoder: dense self-attention of all cells.

    Args:
        dim: C.
        num_layers, num_heads, ffn_dim, dropout: of the layers.
        activation_checkpointing: see :class:`~dn_detr_d2.layers.LayerStack`.
        initialization: see :func:`~dn_detr_d2.modeling.registry.initialise_transformer`.
    """

    ACTIVATION = "relu"

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        activation_checkpointing: bool = False,
        initialization: str = "detr",
    ):
        super().__init__(activation_checkpointing)
        self.layers = nn.ModuleList(
            DenseEncoderLayer(dim, num_heads, ffn_dim, dropout, self.ACTIVATION) for _ in range(num_layers)
        )
        initialise_transformer(self, initialization)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.ENCODER``."""
        return transformer_arguments(cfg, "ENCODER")

    def forward(self, pyramid: Pyramid) -> Memory:
        """All levels attend to each other; usually there is one."""
        memory = flatten_pyramid(pyramid)
        tokens = memory.tokens
        for layer in self.layers:
            tokens = self.checkpointed(self.step, layer, tokens, memory)
        memory.tokens = tokens
        return memory

    def step(self, layer: DenseEncoderLayer, tokens: Tensor, memory: Memory) -> Tensor:
        """(N, S, C) -> (N, S, C): one layer with the positions that it adds."""
        return layer(tokens, self.place(tokens, memory.positions), memory.padding)

    def place(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(N, S, C) positions as a layer adds them; here the encoding as it is."""
        return positions


@ENCODER_REGISTRY.register()
class DenseEncoder(PlainEncoder):
    """DAB-DETR's encoder: positions are scaled by the content, and the activation has a learned slope (PReLU).

    Args:
        dim: C.
        arguments: as for :class:`PlainEncoder`.
    """

    ACTIVATION = "prelu"

    @configurable
    def __init__(self, *, dim: int, initialization: str = "detr", **arguments):
        super().__init__(dim=dim, initialization=initialization, **arguments)
        self.position_scale = MLP(dim, dim, dim)
        if initialization != "anchor_detr":
            initialise_transformer(self.position_scale)

    def place(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Scaled by a learned function of the content (DAB-DETR Sec. 4)."""
        return positions * self.position_scale(tokens)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over the levels and a feed-forward block (ReLU)."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float, num_levels: int, num_points: int):
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, tokens: Tensor, positions: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Rows of tokens and positions (N * S, C), reference (N, S, L, 2) -> (N * S, C)."""
        attended = self.self_attn(tokens + positions, reference, tokens, memory.padding, memory.shapes)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


@ENCODER_REGISTRY.register()
class DeformableEncoder(LayerStack):
    """Deformable DETR's encoder: each cell looks at K points around itself on every level.

    Args:
        dim: C.
        num_layers, num_heads, ffn_dim, dropout: of the layers.
        activation_checkpointing: see :class:`~dn_detr_d2.layers.LayerStack`.
        initialization: see :func:`~dn_detr_d2.modeling.registry.initialise_transformer`.
        num_levels: L.
        num_points: K.
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        num_levels: int,
        num_points: int,
        activation_checkpointing: bool = False,
        initialization: str = "detr",
    ):
        super().__init__(activation_checkpointing)
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, num_heads, ffn_dim, dropout, num_levels, num_points) for _ in range(num_layers)
        )
        initialise_transformer(self, initialization)
        self.level_embed = nn.Embedding(num_levels, dim)  # after the Xavier pass: it starts from N(0, 1)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.ENCODER`` and ``NUM_FEATURE_LEVELS``."""
        node = cfg.MODEL.DN_DETR
        levels = {"num_levels": node.NUM_FEATURE_LEVELS, "num_points": node.ENCODER.NUM_POINTS}
        return transformer_arguments(cfg, "ENCODER") | levels

    def forward(self, pyramid: Pyramid) -> Memory:
        """Pyramid of L levels -> Memory."""
        memory = flatten_pyramid(pyramid, self.level_embed.weight)
        reference = cell_centres(memory)
        tokens, positions = memory.tokens.flatten(0, 1), memory.positions.flatten(0, 1)
        for layer in self.layers:
            tokens = self.checkpointed(layer, tokens, positions, reference, memory)
        memory.tokens = tokens.view(memory.tokens.shape)
        return memory


class RowColumnEncoderLayer(nn.Module):
    """Row-column attention of all cells to the map, and a feed-forward block (ReLU)."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attn = RowColumnAttention(dim, num_heads, dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, grid: Tensor, grid_x: Tensor, grid_y: Tensor, padding: Tensor) -> Tensor:
        """grid (N, h, w, C), grid_x (N, w, C), grid_y (N, h, C), padding (N, h, w) -> (N, h, w, C)."""
        positions = (y.expand_as(grid).flatten(1, 2) for y in (grid_x[:, None], grid_y[:, :, None]))
        tokens = self.self_attn(grid.flatten(1, 2), *positions, grid, grid_x, grid_y, padding)
        return self.ffn(tokens).view_as(grid)


@ENCODER_REGISTRY.register()
class RowColumnEncoder(LayerStack):
    """Anchor DETR's encoder, over one map: row-column attention. Its encoding of coordinates is passed on to the decoder.

    Args:
        dim: C.
        num_layers, num_heads, ffn_dim, dropout: of the layers.
        activation_checkpointing: see :class:`~dn_detr_d2.layers.LayerStack`.
        initialization: see :func:`~dn_detr_d2.modeling.registry.initialise_transformer`.
    """

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        activation_checkpointing: bool = False,
        initialization: str = "detr",
    ):
        super().__init__(activation_checkpointing)
        self.layers = nn.ModuleList(RowColumnEncoderLayer(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers))
        self.axis_encoding = AxisEncoding(dim)
        initialise_transformer(self, initialization)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.ENCODER``; it sees one level."""
        if cfg.MODEL.DN_DETR.NUM_FEATURE_LEVELS != 1:
            raise ConfigError(
                "MODEL.DN_DETR.ENCODER.NAME = 'RowColumnEncoder' needs NUM_FEATURE_LEVELS 1, got "
                f"{cfg.MODEL.DN_DETR.NUM_FEATURE_LEVELS}"
            )
        return transformer_arguments(cfg, "ENCODER")

    def forward(self, pyramid: Pyramid) -> Memory:
        """Pyramid of one level -> Memory."""
        memory, (padding,) = flatten_pyramid(pyramid), pyramid.padding
        grid_x, grid_y = (self.axis_encoding(x) for x in axis_coordinates(padding))
        grid = pyramid.maps[0].permute(0, 2, 3, 1)
        for layer in self.layers:
            grid = self.checkpointed(layer, grid, grid_x, grid_y, padding)
        memory.tokens, memory.axis_encoding = grid.flatten(1, 2), self.axis_encoding
        return memory
