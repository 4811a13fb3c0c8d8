"""Multi-scale deformable attention (Zhu et al., ICLR 2021, Eq. 3): the public function and its pure-PyTorch form.

Shapes: N images, H heads, D channels a head, L levels, K points a head and level, Q queries, S = sum of h * w over levels.

A query looks at K points of each level instead of at every cell: the result is the attention-weighted sum of bilinear
samples. A sampling location (x, y) in [0, 1] spans a level from edge to edge, so x * w - 0.5 is the column index
(``grid_sample`` with ``align_corners=False``); what lies outside a level counts as zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of ``value``.

    Args:
        value: (N, S, H, D), levels one after the other.
        spatial_shapes: (h, w) of each level as Python integers, sum of h * w equal to S.
        sampling_locations: (N, Q, H, L, K, 2) as (x, y), [0, 1] inside a level.
        attention_weights: (N, Q, H, L, K), usually summing to 1 over (L, K).

    Returns:
        Tensor: (N, Q, H * D) in the dtype of ``value``. Sampling is done in at least float32 whatever that dtype is.

    Raises:
        ValueError: a shape does not fit; the text names the argument.
    """
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    with torch.autocast(value.device.type, enabled=False):
        return ms_deform_attn_torch(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_torch(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` from standard operators, one ``grid_sample`` a level; runs wherever PyTorch runs."""
    n, _, h, d = value.shape
    _, q, _, num_levels, points, _ = sampling_locations.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    grid = (2 * sampling_locations.to(wide) - 1).transpose(1, 2).flatten(0, 1)  # (N*H, Q, L, K, 2)
    weights = attention_weights.to(wide).transpose(1, 2).reshape(n * h, 1, q, num_levels, points)

    maps = value.to(wide).permute(0, 2, 3, 1).reshape(n * h, d, value.shape[1])  # (N*H, D, S)
    output = maps.new_zeros(n * h, d, q)
    levels = maps.split([height * width for height, width in spatial_shapes], -1)
    for level, (features, shape) in enumerate(zip(levels, spatial_shapes, strict=True)):
        features = features.reshape(n * h, d, *shape)
        sampled = F.grid_sample(features, grid[:, :, level], align_corners=False)  # (N*H, D, Q, K)
        output = output + (sampled * weights[:, :, :, level]).sum(-1)
    return output.view(n, h * d, q).transpose(1, 2).to(value.dtype)


def _check_shapes(value, spatial_shapes, sampling_locations, attention_weights) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (N, S, H, D), got shape {tuple(value.shape)}")
    n, s, h, _ = value.shape
    cells = sum(height * width for height, width in spatial_shapes)
    if cells != s:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} hold {cells} cells, but value has S = {s}")
    if sampling_locations.dim() != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(f"sampling_locations must be (N, Q, H, L, K, 2), got {tuple(sampling_locations.shape)}")
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be (N, Q, H, L, K) = {tuple(sampling_locations.shape[:-1])} like "
            f"sampling_locations, got {tuple(attention_weights.shape)}"
        )
    if (sampling_locations.shape[0], sampling_locations.shape[2]) != (n, h):
        raise ValueError(
            f"sampling_locations has N = {sampling_locations.shape[0]} and H = {sampling_locations.shape[2]}, "
            f"but value has N = {n} and H = {h}"
        )
    if sampling_locations.shape[3] != len(spatial_shapes):
        raise ValueError(
            f"sampling_locations has L = {sampling_locations.shape[3]} levels, but spatial_shapes lists "
            f"{len(spatial_shapes)}"
        )
