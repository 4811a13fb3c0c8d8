"""Attention modules: multi-head attention on given projections, DAB-DETR's conditional attention, deformable attention.

Shapes: N images, Q queries, S cells, C channels, H heads, L levels, K points. Masks are True where blocked.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import IsolatedGroups
from .autocast import autocast_dtype, lowered
from .mlp import map_together
from .ms_deform_attn import ms_deform_attn_fused

FOLD_PAIRS, FOLD_PAIRS_A_KEY = 100_000, 32  # measured on a CPU, see docs/performance.md


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    blocked: Tensor | None = None,
    dropout: float = 0.0,
    isolated: IsolatedGroups | None = None,
) -> Tensor:
    """Multi-head scaled dot-product attention on projected inputs.

    Args:
        query: (N, Q, H * E).
        key: (N, S, H * E).
        value: (N, S, H * D).
        num_heads: H; heads are consecutive blocks of channels.
        blocked: bool, (Q, S) or (N, Q, S) or (N, 1, S), True where a query must not look; or what :func:`added_to_scores`
            made of it.
        dropout: probability of losing an attention weight; 0 outside training.
        isolated: the groups that ``blocked`` is the mask of. Where they are large they are folded, see
            :func:`attend_folded`, and ``blocked`` is not looked at; the result is the same but for rounding.

    Returns:
        Tensor: (N, Q, H * D), heads side by side.
    """
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return attend_heads(*heads, blocked, dropout, isolated)


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor | None = None,
    dropout: float = 0.0,
    isolated: IsolatedGroups | None = None,
) -> Tensor:
    """:meth:`attend` of heads (N, H, Q, E), (N, H, S, E) and (N, H, S, D); gives (N, Q, H * D) too."""
    if isolated is not None and pays_to_fold(isolated, query.shape[2]):
        attended = attend_folded(query, key, value, isolated, dropout)
    else:
        if blocked is not None:
            blocked = blocked if blocked.dim() == 2 else blocked[:, None]
            blocked = ~blocked if blocked.dtype == torch.bool else blocked  # a bool mask of SDPA says what is allowed
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=blocked, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def added_to_scores(blocked: Tensor | None, isolated: IsolatedGroups | None, content: Tensor) -> Tensor | None:
    """The self-attention mask of several layers, made once: 0 where a query may look, else the least finite number.

    Of a bool mask attention makes the same in each layer anew, but with minus infinity, which in the input of a layer would
    be taken for a fault. The weight of what is blocked is 0 in either case, for a query that may look at any key.

    Args:
        blocked, isolated: as for :func:`attend`.
        content: (N, Q, C) of the queries.

    Returns:
        Tensor: like ``blocked``, in the dtype of attention; ``blocked`` itself where the groups are folded.
    """
    if blocked is None or (isolated is not None and pays_to_fold(isolated, content.shape[1])):
        return blocked
    dtype = autocast_dtype(content) or content.dtype
    return torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)


def pays_to_fold(groups: IsolatedGroups, num_queries: int) -> bool:
    """Whether folded attention is faster: it saves enough pairs, and enough for each key that it copies."""
    denoising = groups.number * groups.size
    matching = num_queries - denoising
    saved = denoising * (denoising - groups.size) + matching * denoising  # keys of other groups, and of all to matching
    return saved >= max(FOLD_PAIRS, FOLD_PAIRS_A_KEY * groups.number * (groups.size + matching))


def attend_folded(query: Tensor, key: Tensor, value: Tensor, groups: IsolatedGroups, dropout: float = 0.0) -> Tensor:
    """Self-attention with denoising groups as images of their own, whose keys are the group and the matching queries.

    No pair that is blocked is computed, and no mask is needed.

    Args:
        query, key, value: (N, H, Q, channels of a head), the groups first.
        groups: the groups; the queries behind them are the matching ones.
        dropout: probability of losing an attention weight.

    Returns:
        Tensor: (N, H, Q, channels of a head of ``value``).
    """
    shape = (groups.number, groups.size)
    denoising = groups.number * groups.size

    def _grouped(x: Tensor) -> Tensor:
        """(N, H, Q, E) -> (N, G, H, queries of a group, E)."""
        return x[:, :, :denoising].unflatten(2, shape).transpose(1, 2)

    def _seen(x: Tensor) -> Tensor:
        """(N, H, Q, E) -> (N * G, H, queries of a group and matching queries, E)."""
        matching = x[:, None, :, denoising:].expand(-1, groups.number, -1, -1, -1)
        return torch.cat([_grouped(x), matching], 3).flatten(0, 1)

    restored = F.scaled_dot_product_attention(
        _grouped(query).flatten(0, 1), _seen(key), _seen(value), dropout_p=dropout
    )
    restored = restored.unflatten(0, (-1, groups.number)).transpose(1, 2).flatten(2, 3)
    own = (x[:, :, denoising:] for x in (query, key, value))
    return torch.cat([restored, F.scaled_dot_product_attention(*own, dropout_p=dropout)], 2)


class SelfAttention(nn.Module):
    """Plain multi-head attention with separate query/key and value inputs, residual and post-norm.

    Args:
        dim: channels C, divisible by ``num_heads``.
        num_heads: H.
        dropout: probability, on the residual branch and on the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        check_divisible(dim, num_heads)
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, position: Tensor, blocked: Tensor | None = None, isolated: IsolatedGroups | None = None
    ) -> Tensor:
        """x (N, Q, C) attends to itself; ``position`` (N, Q, C) is added to query and key, not to the value."""
        placed, dim = x + position, x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        if torch.is_grad_enabled():  # one product of three inputs: fewer operators in both passes
            inputs = torch.stack([y := lowered(placed), y, lowered(x)]).flatten(1, 2)
            rows = torch.baddbmm(bias.view(3, 1, dim), inputs, weight.view(3, dim, dim).transpose(1, 2))
            query, key, value = rows.view(3, *x.shape[:2], self.num_heads, -1).transpose(2, 3).unbind()
        else:  # the copies would cost more
            both = F.linear(placed, weight[: 2 * dim], bias[: 2 * dim])
            parts = (*both.chunk(2, -1), F.linear(x, weight[2 * dim :], bias[2 * dim :]))
            query, key, value = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in parts)
        return self._add(x, query, key, value, blocked, isolated)

    def _add(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocked: Tensor | None,
        isolated: IsolatedGroups | None = None,
    ) -> Tensor:
        """Residual and norm around what the heads of the projected queries find."""
        dropout = self.dropout.p if self.training else 0.0
        attended = attend_heads(query, key, value, blocked, dropout, isolated)
        return self.norm(x + self.dropout(self.out_proj(attended)))


class CrossAttention(SelfAttention):
    """Plain multi-head attention of queries to the image, residual and post-norm (DETR)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, position: Tensor, tokens: Tensor, token_positions: Tensor, blocked: Tensor
    ) -> Tensor:
        """x, position (N, Q, C); tokens, token_positions (N, S, C); blocked (N, 1, S) or (N, Q, S) bool -> (N, Q, C)."""
        inputs = (x + position, tokens + token_positions, tokens)
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        projected = (F.linear(*y) for y in zip(inputs, weights, biases, strict=True))
        return self._add(x, *(y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected), blocked)


class ConditionalSelfAttention(nn.Module):
    """Self-attention of DAB-DETR: content and position have projections of their own, added per query and key.

    Args:
        dim, num_heads, dropout: as for :class:`SelfAttention`.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        check_divisible(dim, num_heads)
        self.num_heads = num_heads
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, position: Tensor, blocked: Tensor | None = None, isolated: IsolatedGroups | None = None
    ) -> Tensor:
        """x, position (N, Q, C) -> (N, Q, C)."""
        key = self.key_content(x) + self.key_position(position)
        dropout = self.dropout.p if self.training else 0.0
        attended = attend(self.query(x, position), key, self.value(x), self.num_heads, blocked, dropout, isolated)
        return self.norm(x + self.dropout(self.out_proj(attended)))

    def query(self, x: Tensor, position: Tensor) -> Tensor:
        """(N, Q, C) what the queries ask with: projected content plus projected position."""
        return self.query_content(x) + self.query_position(position)


class ConditionalCrossAttention(nn.Module):
    """Cross-attention of DAB-DETR (Liu et al., ICLR 2022, Sec. 4): content and position are concatenated per head.

    The score of a query and a cell is content . content + position . position, because each head sees
    [content ‖ position] of twice the width.

    Args:
        dim: channels C, divisible by ``num_heads``.
        num_heads: H.
        dropout: probability, on the residual branch and on the attention weights.
        add_query_position: the first decoder layer also adds the projected positions to the contents, since its
            content carries no place yet.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, add_query_position: bool = False):
        super().__init__()
        check_divisible(dim, num_heads)
        self.num_heads = num_heads
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim) if add_query_position else None
        self.query_sine = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, position: Tensor, sine: Tensor, tokens: Tensor, token_positions: Tensor, padding: Tensor
    ) -> Tensor:
        """Queries look at the image.

        Args:
            x: (N, Q, C) content.
            position: (N, Q, C) learned embedding of the anchor.
            sine: (N, Q, C) modulated sine encoding of the anchor's centre.
            tokens, token_positions: (N, S, C).
            padding: (N, S) bool, True outside the image.
        """
        query, key = self.project(x, position, sine, tokens, token_positions)
        dropout = self.dropout.p if self.training else 0.0
        attended = attend(query, key, self.value(tokens), self.num_heads, padding[:, None], dropout)
        return self.norm(x + self.dropout(self.out_proj(attended)))

    def project(self, x: Tensor, position: Tensor, sine: Tensor, tokens: Tensor, token_positions: Tensor):
        """(N, Q, 2C) queries and (N, S, 2C) keys, as the heads compare them; arguments as for :meth:`forward`."""
        query, key, key_position = self.query_content(x), self.key_content(tokens), self.key_position(token_positions)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + key_position
        return self._beside(query, self.query_sine(sine)), self._beside(key, key_position)

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenates two (N, Q, C) tensors head by head into (N, Q, 2C)."""
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in (content, position))
        return torch.cat(list(heads), -1).flatten(2)


class MultiLevelConditionalCrossAttention(ConditionalCrossAttention):
    """Conditional cross-attention on each level by itself; each query weighs what the levels answer.

    The decoder of DN-Deformable-DETR with a deformable encoder only. A softmax inside a level keeps the many cells of the
    fine levels from drowning those of the coarse ones.

    Args:
        dim, num_heads, dropout, add_query_position: as for :class:`ConditionalCrossAttention`.
        num_levels: L.
    """

    def __init__(
        self, dim: int, num_heads: int, num_levels: int, dropout: float = 0.0, add_query_position: bool = False
    ):
        super().__init__(dim, num_heads, dropout, add_query_position)
        self.level_weights = nn.Linear(dim, num_levels)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        position: Tensor,
        sine: Tensor,
        tokens: Tensor,
        token_positions: Tensor,
        padding: Tensor,
        shapes: list[tuple[int, int]],
        asked: Tensor,
    ) -> Tensor:
        """As :class:`ConditionalCrossAttention`, with the (h, w) of each level and ``asked`` (N, Q, C), from which each
        query weighs the levels."""
        query, key = self.project(x, position, sine, tokens, token_positions)
        sizes = [height * width for height, width in shapes]
        levels = [part.split(sizes, 1) for part in (key, self.value(tokens), padding)]
        dropout = self.dropout.p if self.training else 0.0
        answers = [
            attend(query, k, v, self.num_heads, blocked[:, None], dropout)
            for k, v, blocked in zip(*levels, strict=True)
        ]
        weights = self.level_weights(asked).softmax(-1)  # (N, Q, L)
        attended = (torch.stack(answers, -1) * weights[:, :, None]).sum(-1)
        # The weights sum up to 1, so projecting the mixture equals mixing the projections.
        return self.norm(x + self.dropout(self.out_proj(attended)))


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention of Deformable DETR: each query predicts where to look and how much.

    Args:
        dim: channels C, divisible by ``num_heads``.
        num_heads: H.
        num_levels: L.
        num_points: K sampling points a head and level.
        backend: of :func:`ms_deform_attn`; an attribute, so that it can be changed on a model that is there.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, backend: str = "auto"):
        super().__init__()
        check_divisible(dim, num_heads)
        self.backend = backend
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head j starts out looking in direction 2 pi j / H, its point k at k + 1 steps, equally at all points."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # to the edge of a square
        steps = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * steps[None, None, :, None]  # (H, 1, K, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        tokens: Tensor,
        padding: Tensor,
        shapes: list[tuple[int, int]],
        value: Tensor | None = None,
    ) -> Tensor:
        """Samples the tokens around the reference of each query.

        Args:
            query: (N, Q, C), content plus position, or its rows, (N * Q, C).
            reference: (N, Q, L, 2) points or (N, Q, L, 4) cxcywh boxes, in [0, 1] of each padded level.
            tokens: (N, S, C), or their rows.
            padding: (N, S) bool, True outside the image; those tokens count as zero.
            shapes: (h, w) of each level.
            value: what :func:`project_values` made of the tokens for this module; None = it is made here.

        Returns:
            Tensor: like ``query``.
        """
        if value is None:
            rows = self.value_proj(tokens.flatten(0, -2)).masked_fill(padding.flatten()[:, None], 0.0)
            value = rows.view(*padding.shape, self.num_heads, -1)
        sizes = (*reference.shape[:2], self.num_heads, self.num_levels, self.num_points)
        rows = lowered(query.flatten(0, -2))
        offsets, logits = self.sampling_offsets(rows).view(*sizes, 2), self.attention_weights(rows).view(sizes)
        attended = ms_deform_attn_fused(value, shapes, reference, offsets, logits, self.backend)
        return self.output_proj(attended.flatten(0, 1) if query.dim() == 2 else attended)


# With more numbers than this a device is busy with the values themselves; then each layer projects its own, which holds one
# gradient at a time instead of all.
TOGETHER = 2**27


def project_values(layers: Sequence[MultiScaleDeformableAttention], tokens: Tensor, padding: Tensor) -> list:
    """What several layers sample from the same tokens, made by one batched product.

    Args:
        layers: K modules of one size.
        tokens: (N, S, C).
        padding: (N, S) bool, True outside the image; those tokens count as zero.

    Returns:
        list: K values (N, S, H, channels of a head), the same as of each layer alone but for rounding; K times None above
        :data:`TOGETHER` numbers.
    """
    if len(layers) * tokens.numel() > TOGETHER:
        return [None] * len(layers)
    rows = lowered(tokens.flatten(0, 1)).expand(len(layers), -1, -1)
    values = map_together([x.value_proj for x in layers], rows).masked_fill(padding.flatten()[:, None], 0.0)
    return list(values.view(len(layers), *tokens.shape[:2], layers[0].num_heads, -1).unbind())


def check_divisible(dim: int, num_heads: int) -> None:
    """Raises ValueError unless the heads share the channels evenly."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"channels must be divisible by the number of heads, got {dim} channels and {num_heads} heads")
