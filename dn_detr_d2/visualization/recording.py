"""Records where the decoder's cross-attention looks, without touching what the model computes.

Hooks keep the arguments of every layer; locations and weights are then computed from them a second time.
Shapes: N = 1 image, Q queries, H heads, L levels, K points, S cells.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import ConditionalCrossAttention, MultiLevelConditionalCrossAttention, MultiScaleDeformableAttention
from ..layers.ms_deform_attn import locations_from_boxes, locations_from_points
from ..modeling.outputs import ForwardOutputs
from ..structures import Memory


@dataclass
class Sampling:
    """Where one layer of a deformable decoder samples.

    Attributes:
        locations: (Q, H, L, K, 2) (x, y) in [0, 1] of each padded level; points may lie outside.
        weights: (Q, H, L, K), the sum over (L, K) is 1.
        around_point: whether the points lie around the reference's centre rather than in its box.
    """

    locations: Tensor
    weights: Tensor
    around_point: bool


@dataclass
class Layer:
    """What one decoder layer looked at.

    Attributes:
        boxes: (Q, 4) reference boxes that entered, cxcywh in [0, 1] of the image.
        sampling: of deformable layers.
        maps: of dense layers, (Q, S) mean attention over the heads; every row sums up to 1.
    """

    boxes: Tensor
    sampling: Sampling | None = None
    maps: Tensor | None = None


def record(model: nn.Module, image: dict) -> tuple[ForwardOutputs, list[Layer]]:
    """One pass over an image, and what each decoder layer looked at.

    Args:
        model: in evaluation mode.
        image: what the model takes.

    Raises:
        ConfigError: the layers have a cross-attention that is not known here.
    """
    layers, of_layers, of_attention = model.decoder.layers, [], []
    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda _, arguments: of_layers.append(arguments)))
        handles.append(layer.cross_attn.register_forward_pre_hook(lambda _, arguments: of_attention.append(arguments)))
    try:
        with torch.no_grad():
            outputs = model.forward_outputs([image], annotated=False)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for layer, (_, inputs), arguments in zip(layers, of_layers, of_attention, strict=True):
        with torch.no_grad():
            found.append(Layer(inputs.boxes[0].cpu(), **_read(layer.cross_attn, arguments)))
    # Mask DINO's decoder sees the levels in another order than its encoder.
    return replace(outputs, memory=of_layers[0][1].memory), found


def _read(module: nn.Module, arguments: tuple) -> dict:
    """The fields of a :class:`Layer` that a kind of cross-attention gives."""
    if isinstance(module, MultiScaleDeformableAttention):
        return {"sampling": sampling(module, *arguments)}
    if isinstance(module, MultiLevelConditionalCrossAttention):
        return {"maps": multi_level_maps(module, *arguments)[0].cpu()}
    if isinstance(module, ConditionalCrossAttention):
        return {"maps": dense_maps(module, *arguments)[0].cpu()}
    raise ConfigError(
        f"the decoder layers attend by {type(module).__name__}; only MultiScaleDeformableAttention, "
        "ConditionalCrossAttention and MultiLevelConditionalCrossAttention can be shown; take a DAB-, DN- or deformable DETR"
    )


def sampling(
    module: MultiScaleDeformableAttention, query: Tensor, reference: Tensor, tokens, padding, shapes
) -> Sampling:
    """Locations and weights of the first image; arguments as for the module's ``forward``."""
    sizes = (module.num_heads, module.num_levels, module.num_points)
    offsets = module.sampling_offsets(query).unflatten(-1, (*sizes, 2))
    weights = module.attention_weights(query).unflatten(-1, (sizes[0], -1)).softmax(-1).unflatten(-1, sizes[1:])
    around_point = reference.shape[-1] == 2
    locations = (locations_from_points if around_point else locations_from_boxes)(reference, offsets, shapes)
    return Sampling(locations[0].cpu(), weights[0].cpu(), around_point)


def attention_weights(query: Tensor, key: Tensor, num_heads: int, padding: Tensor) -> Tensor:
    """(N, H, Q, S) softmax of the scaled products, as ``dn_detr_d2.layers.attention.attend`` weighs.

    Args:
        query: (N, Q, H * E).
        key: (N, S, H * E).
        num_heads: H.
        padding: (N, S) bool, True where nobody looks.
    """
    query, key = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)


def dense_maps(module: ConditionalCrossAttention, x, position, sine, tokens, token_positions, padding) -> Tensor:
    """(N, Q, S) mean over the heads; arguments as for the module's ``forward``."""
    query, key = module.project(x, position, sine, tokens, token_positions)
    return attention_weights(query, key, module.num_heads, padding).mean(1)


def multi_level_maps(
    module: MultiLevelConditionalCrossAttention, x, position, sine, tokens, token_positions, padding, shapes, asked
) -> Tensor:
    """(N, Q, S): each level's map times the weight that the query gives the level; arguments as for ``forward``."""
    query, key = module.project(x, position, sine, tokens, token_positions)
    sizes = [height * width for height, width in shapes]
    levels = module.level_weights(asked).softmax(-1)  # (N, Q, L)
    maps = [
        attention_weights(query, k, module.num_heads, blocked).mean(1)
        for k, blocked in zip(key.split(sizes, 1), padding.split(sizes, 1), strict=True)
    ]
    return torch.cat([level * levels[..., i, None] for i, level in enumerate(maps)], -1)


def on_image(locations: Tensor, memory: Memory) -> Tensor:
    """(Q, H, L, K, 2) in [0, 1] of each padded level -> in [0, 1] of the image, by each level's valid part."""
    return locations / memory.valid_ratios[0].cpu()[:, None]


def heat_map(weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """(S,) attention over the cells of all levels -> (h, w) on the cells of the first, with the same sum.

    A level's map is interpolated bilinearly and keeps its share of the attention.
    """
    size, total = shapes[0], torch.zeros(shapes[0])
    for part, shape in zip(weights.split([h * w for h, w in shapes]), shapes, strict=True):
        level = nn.functional.interpolate(part.view(1, 1, *shape), size=size, mode="bilinear")[0, 0]
        total = total + level * (part.sum() / level.sum().clamp(min=1e-12))
    return total
