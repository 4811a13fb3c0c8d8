"""Decoder layers, each with the module that turns a reference box into the positions that the layer needs.

Shapes: N images, Q queries, S cells, C channels, L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import (
    MLP,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    CrossAttention,
    FeedForward,
    MultiLevelConditionalCrossAttention,
    MultiScaleDeformableAttention,
    RowColumnAttention,
    SelfAttention,
    axis_coordinates,
    encode_boxes,
)
from ..structures import IsolatedGroups, Memory
from .registry import DECODER_LAYER_REGISTRY


@dataclass
class QueryPosition:
    """Where a query looks from.

    Attributes:
        embedding: (N, Q, C) learned function of the reference box.
        sine: (N, Q, C) modulated sine encoding of its centre (y, x), for conditional attention.
    """

    embedding: Tensor
    sine: Tensor | None = None


@dataclass
class LayerInputs:
    """What a decoder layer is given beside the contents.

    Attributes:
        position: where the queries look from.
        boxes: (N, Q, 4) reference boxes, cxcywh in [0, 1].
        memory: what they look at.
        blocked: (Q, Q) or (N, Q, Q) self-attention mask [query, key], or None; a decoder gives it as attention adds it to
            its scores, see :func:`~dn_detr_d2.layers.attention.added_to_scores`.
        blocked_cells: (N, Q, S) bool cross-attention mask [query, cell] of masked attention, or None.
        isolated: the groups that ``blocked`` is the mask of, if it is no other; self-attention may use them instead.
        value: what the deformable attention of this layer samples from the memory, where that is made for all layers at
            once (:func:`~dn_detr_d2.layers.project_values`).
    """

    position: QueryPosition
    boxes: Tensor
    memory: Memory
    blocked: Tensor | None
    blocked_cells: Tensor | None = None
    isolated: IsolatedGroups | None = None
    value: Tensor | None = None


def part_of_padded(boxes: Tensor, memory: Memory) -> Tensor:
    """(N, Q, 4) boxes in [0, 1] of the image -> in [0, 1] of the padded image, as its finest level sees it.

    They stay as they are, as those of an image alone, where padding is hidden.
    """
    return boxes if memory.hides_padding else boxes * memory.box_ratios[:, :1]


class AnchorPosition(nn.Module):
    """Embeds reference boxes; layers after the first scale the embedding by the content (DAB-DETR Eq. 5).

    Args:
        dim: C, divisible by 4.
    """

    AFTER_FIRST = ("scale",)  # parts that the first layer does not use

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.embed = MLP(2 * dim, dim, dim)
        self.scale = MLP(dim, dim, dim)

    def forward(self, content: Tensor, boxes: Tensor, memory: Memory, first: bool) -> QueryPosition:
        """content (N, Q, C), boxes (N, Q, 4). Deformable layers encode the box as a part of the *padded* image."""
        embedding = self.embed(encode_boxes(part_of_padded(boxes, memory), self.dim // 2))
        return QueryPosition(embedding if first else embedding * self.scale(content))


class UnscaledAnchorPosition(nn.Module):
    """DINO's positions: embedded reference boxes, the same for any content.

    Args:
        dim: C, divisible by 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.embed = MLP(2 * dim, dim, dim)

    def forward(self, content: Tensor, boxes: Tensor, memory: Memory, first: bool) -> QueryPosition:
        """content (N, Q, C), boxes (N, Q, 4); the box is encoded as a part of the *padded* image."""
        return QueryPosition(self.embed(encode_boxes(part_of_padded(boxes, memory), self.dim // 2)))


class ModulatedAnchorPosition(AnchorPosition):
    """DAB-DETR's positions: the sine encoding of the centre is scaled by content and by width and height.

    The x half is multiplied by w_ref / w and the y half by h_ref / h, where the content predicts (w_ref, h_ref): attention
    becomes wide for wide boxes and high for high ones (DAB-DETR Eq. 6).
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.reference_size = MLP(dim, dim, 2)

    def forward(self, content: Tensor, boxes: Tensor, memory: Memory, first: bool) -> QueryPosition:
        """content (N, Q, C), boxes (N, Q, 4)."""
        sine = encode_boxes(boxes, self.dim // 2)  # (N, Q, 2C) in the order y, x, w, h
        y, x = (sine[..., : self.dim] if first else sine[..., : self.dim] * self.scale(content)).chunk(2, -1)
        ratio = self.reference_size(content).sigmoid() / boxes[..., 2:]
        modulated = torch.cat([y * ratio[..., 1:], x * ratio[..., :1]], -1)
        return QueryPosition(self.embed(sine), modulated)


@DECODER_LAYER_REGISTRY.register()
class ConditionalDecoderLayer(nn.Module):
    """Layer of DAB-DETR and DN-DETR: conditional self- and cross-attention over one dense map.

    Args:
        dim: C.
        num_heads, ffn_dim, dropout: as named.
        index: 0 for the first layer, whose cross-attention adds the positions to the contents.
        num_levels, num_points: not used; dense attention sees every cell.
    """

    Position = ModulatedAnchorPosition

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        index: int,
        num_levels: int,
        num_points: int,
    ):
        super().__init__()
        self.self_attn = ConditionalSelfAttention(dim, num_heads, dropout)
        self.cross_attn = ConditionalCrossAttention(dim, num_heads, dropout, add_query_position=index == 0)
        self.ffn = FeedForward(dim, ffn_dim, dropout, activation="prelu")

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        position, memory = inputs.position, inputs.memory
        content = self.self_attn(content, position.embedding, inputs.blocked, inputs.isolated)
        content = self.cross_attn(
            content, position.embedding, position.sine, memory.tokens, memory.positions, memory.padding
        )
        return self.ffn(content)


@DECODER_LAYER_REGISTRY.register()
class MultiLevelConditionalDecoderLayer(nn.Module):
    """Layer of DN-Deformable-DETR with a deformable encoder only: dense conditional attention to each level.

    Args:
        dim: C.
        num_heads, ffn_dim, dropout: as named.
        index: 0 for the first layer, whose cross-attention adds the positions to the contents.
        num_levels: L.
        num_points: not used; dense attention sees every cell.
    """

    Position = ModulatedAnchorPosition

    def __init__(
        self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float, index: int, num_levels: int, num_points: int
    ):
        super().__init__()
        self.self_attn = ConditionalSelfAttention(dim, num_heads, dropout)
        self.cross_attn = MultiLevelConditionalCrossAttention(dim, num_heads, num_levels, dropout, index == 0)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        position, memory = inputs.position, inputs.memory
        asked = self.self_attn.query(content, position.embedding)  # before the content changes, as in the official code
        content = self.self_attn(content, position.embedding, inputs.blocked, inputs.isolated)
        image = (memory.tokens, memory.positions, memory.padding, memory.shapes)
        return self.ffn(self.cross_attn(content, position.embedding, position.sine, *image, asked))


@DECODER_LAYER_REGISTRY.register()
class DeformableDecoderLayer(nn.Module):
    """Layer of the deformable family: self-attention, then K sampling points in and around the reference box.

    Args:
        dim: C.
        num_heads, ffn_dim, dropout: as named.
        index: not used; all layers are alike.
        num_levels: L.
        num_points: K.
    """

    Position = AnchorPosition

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        index: int,
        num_levels: int,
        num_points: int,
    ):
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.cross_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        position, memory = inputs.position, inputs.memory
        content = self.self_attn(content, position.embedding, inputs.blocked, inputs.isolated)
        reference = self.reference(inputs.boxes[:, :, None] * memory.box_ratios[:, None])
        image = (memory.tokens, memory.padding, memory.shapes)
        made = {} if inputs.value is None else {"value": inputs.value}
        attended = self.cross_attn(content + position.embedding, reference, *image, **made)
        return self.ffn(self.norm(content + self.dropout(attended)))

    def reference(self, boxes: Tensor) -> Tensor:
        """(N, Q, L, 4) boxes of the padded levels -> what the points are placed in or around."""
        return boxes


class PointPosition(nn.Module):
    """Anchor DETR's positions: a learned function of the reference's centre.

    Args:
        dim: C, divisible by 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.embed = MLP(dim, dim, dim)

    def forward(self, content: Tensor, boxes: Tensor, memory: Memory, first: bool) -> QueryPosition:
        """content (N, Q, C), boxes (N, Q, 4)."""
        return QueryPosition(self.embed(encode_boxes(boxes, self.dim // 2)[..., : self.dim]))


class GivenPosition(nn.Module):
    """Stands where a layer's positions come with the queries (Deformable DETR)."""

    def __init__(self, dim: int):
        super().__init__()


@DECODER_LAYER_REGISTRY.register()
class PlainDecoderLayer(nn.Module):
    """Layer of DETR: self-attention, attention to all cells, feed-forward block (ReLU).

    Args:
        dim: C.
        num_heads, ffn_dim, dropout: as named.
        index, num_levels, num_points: not used; all layers are alike and see every cell.
    """

    Position = GivenPosition
    CROSS_ATTENTION = CrossAttention

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        index: int = 0,
        num_levels: int = 1,
        num_points: int = 4,
    ):
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.cross_attn = self.CROSS_ATTENTION(dim, num_heads, dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C); DETR has no boxes to look around."""
        position, memory = inputs.position, inputs.memory
        content = self.self_attn(content, position.embedding, inputs.blocked, inputs.isolated)
        image = (memory.tokens, memory.positions, memory.padding[:, None])
        return self.ffn(self.cross_attn(content, position.embedding, *image))


@DECODER_LAYER_REGISTRY.register()
class MaskedDecoderLayer(PlainDecoderLayer):
    """Layer of Mask2Former: attention to the cells of the query's mask, then self-attention, then the feed-forward block.

    Args:
        dim, num_heads, ffn_dim, dropout, index, num_levels, num_points: as for :class:`PlainDecoderLayer`.
    """

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C); needs ``inputs.blocked_cells``."""
        position, memory = inputs.position.embedding, inputs.memory
        content = self.cross_attn(content, position, memory.tokens, memory.positions, inputs.blocked_cells)
        return self.ffn(self.self_attn(content, position, inputs.blocked, inputs.isolated))


@DECODER_LAYER_REGISTRY.register()
class RowColumnDecoderLayer(PlainDecoderLayer):
    """Layer of Anchor DETR: self-attention, row-column attention to the map, feed-forward block (ReLU).

    Args:
        dim, num_heads, ffn_dim, dropout, index, num_levels, num_points: as for :class:`PlainDecoderLayer`.
    """

    Position = PointPosition
    CROSS_ATTENTION = RowColumnAttention

    def forward(self, content: Tensor, inputs: LayerInputs) -> Tensor:
        """(N, Q, C) -> (N, Q, C); needs RowColumnEncoder's memory."""
        boxes, memory = inputs.boxes, inputs.memory
        padding = memory.padding.unflatten(1, memory.shapes[0])
        encode = memory.axis_encoding
        content = self.self_attn(content, inputs.position.embedding, inputs.blocked, inputs.isolated)
        grid = (memory.tokens.unflatten(1, memory.shapes[0]), *(encode(x) for x in axis_coordinates(padding)), padding)
        return self.ffn(self.cross_attn(content, encode(boxes[..., 0]), encode(boxes[..., 1]), *grid))


@DECODER_LAYER_REGISTRY.register()
class QueryDecoderLayer(DeformableDecoderLayer):
    """Layer of Deformable DETR: positions come with the queries, points lie in the reference box."""

    Position = GivenPosition


@DECODER_LAYER_REGISTRY.register()
class PointDecoderLayer(QueryDecoderLayer):
    """Layer of plain Deformable DETR: the points lie around the reference's centre."""

    def reference(self, boxes: Tensor) -> Tensor:
        """Centres only."""
        return boxes[..., :2]


@DECODER_LAYER_REGISTRY.register()
class FirstPointDecoderLayer(QueryDecoderLayer):
    """Layer of Deformable DETR with box refinement: the first one knows a centre, the others a box."""

    def __init__(self, *, index: int, **arguments):
        super().__init__(index=index, **arguments)
        self.knows_boxes = index > 0

    def reference(self, boxes: Tensor) -> Tensor:
        """Centres in the first layer."""
        return boxes if self.knows_boxes else boxes[..., :2]


@DECODER_LAYER_REGISTRY.register()
class DinoDecoderLayer(DeformableDecoderLayer):
    """Layer of DINO: a deformable layer whose positions do not depend on the content."""

    Position = UnscaledAnchorPosition
