"""Multi-scale deformable attention (Zhu et al., ICLR 2021, Eq. 3): the public functions and their pure-PyTorch form.

Shapes: N images, H heads, D channels a head, L levels, K points a head and level, Q queries, S = sum of h * w over levels.

A query looks at K points of each level instead of at every cell: the result is the attention-weighted sum of bilinear
samples. A sampling location (x, y) in [0, 1] spans a level from edge to edge, so x * w - 0.5 is the column index
(``grid_sample`` with ``align_corners=False``); what lies outside a level counts as zero. A location that is infinite or not
a number makes the result of its query and head not a number, on every backend.

docs/operator.md has the formulas, the kernels and what was measured.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import upload
from .autocast import without_autocast
from .kernels import refuse_transforms, uses_kernel

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples of ``value``.

    Floating-point tensors of any of the four dtypes, not necessarily the same; strides as they come; every size may be
    0. Sums are kept in float32, or in float64 for float64 values.

    Args:
        value: (N, S, H, D), levels one after the other.
        spatial_shapes: (h, w) of each level as Python integers, sum of h * w equal to S.
        sampling_locations: (N, Q, H, L, K, 2) as (x, y), [0, 1] inside a level.
        attention_weights: (N, Q, H, L, K), usually summing to 1 over (L, K).
        backend: "auto": the compiled kernel of the tensors' device where there is one, else PyTorch's operators;
            "cuda", "cpu": that kernel or an error; "torch": PyTorch's operators.

    Returns:
        Tensor: (N, Q, H * D) in the dtype of ``value``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the text names it.
        NotImplementedError: a forward-mode derivative is asked of the kernel.
    """
    _check_inputs(
        value,
        spatial_shapes,
        {"sampling_locations": sampling_locations, "attention_weights": attention_weights},
    )
    if uses_kernel(backend, value.device):
        refuse_transforms(value, sampling_locations, attention_weights)
        sizes = [size for shape in spatial_shapes for size in shape]
        return torch.ops.dn_detr_d2.ms_deform_attn(value, sizes, sampling_locations, attention_weights)
    with without_autocast(value.device.type):
        return ms_deform_attn_torch(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    backend: str = "auto",
) -> Tensor:
    """:func:`ms_deform_attn` from what a network predicts: softmax and locations are made inside the kernel.

    Neither the locations nor the weights are stored, so a training step keeps less and reads less.

    Args:
        value: (N, S, H, D).
        spatial_shapes: (h, w) of each level.
        reference: (N, Q, L, 2) points, or (N, Q, L, 4) boxes as (cx, cy, w, h), in [0, 1] of each level.
        sampling_offsets: (N, Q, H, L, K, 2) as (x, y): in cells around a point, in half sizes / K inside a box.
        attention_logits: (N, Q, H, L, K); the softmax goes over (L, K).
        backend: as for :func:`ms_deform_attn`.

    Returns:
        Tensor: (N, Q, H * D) in the dtype of ``value``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the text names it.
        NotImplementedError: a forward-mode derivative is asked of the kernel.
    """
    _check_inputs(
        value, spatial_shapes, {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits}, reference
    )
    if uses_kernel(backend, value.device):
        refuse_transforms(value, reference, sampling_offsets, attention_logits)
        sizes = [size for shape in spatial_shapes for size in shape]
        return torch.ops.dn_detr_d2.ms_deform_attn_fused(value, sizes, reference, sampling_offsets, attention_logits)
    with without_autocast(value.device.type):
        wide = torch.promote_types(value.dtype, torch.float32)
        locate = locations_from_boxes if reference.shape[-1] == 4 else locations_from_points
        locations = locate(reference.to(wide), sampling_offsets.to(wide), spatial_shapes)
        weights = attention_logits.to(wide).flatten(3).softmax(-1).view(attention_logits.shape)
        return ms_deform_attn_torch(value, spatial_shapes, locations, weights)


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
    locations = sampling_locations.to(wide).transpose(1, 2).flatten(0, 1)  # (N*H, Q, L, K, 2)
    grid = 2 * locations.clamp(-1, 2) - 1  # beyond [-1, 2] a point is outside in any case
    weights = attention_weights.to(wide).transpose(1, 2).reshape(n * h, 1, q, num_levels, points)

    maps = value.to(wide).permute(0, 2, 3, 1).reshape(n * h, d, value.shape[1])  # (N*H, D, S)
    # x - x is NaN where x is not finite, else 0; what grid_sample makes of such locations depends on the device.
    not_finite = (locations - locations).detach().sum(-1)[:, None]  # (N*H, 1, Q, L, K)
    output = (not_finite * weights).sum((-2, -1)).expand(-1, d, -1)  # (N*H, D, Q)
    levels = maps.split([height * width for height, width in spatial_shapes], -1)
    for level, (features, shape) in enumerate(zip(levels, spatial_shapes, strict=True)):
        if 0 in shape:
            continue  # a level without cells adds nothing
        features = features.reshape(n * h, d, *shape)
        sampled = F.grid_sample(features, grid[:, :, level], align_corners=False)  # (N*H, D, Q, K)
        output = output + (sampled * weights[:, :, :, level]).sum(-1)
    return output.reshape(n, h * d, q).transpose(1, 2).to(value.dtype)


def locations_from_points(points: Tensor, offsets: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Sampling locations around points, offsets in cells: point + offset / (w, h).

    Args:
        points: (N, Q, L, 2) in [0, 1].
        offsets: (N, Q, H, L, K, 2), (x, y).
        shapes: (h, w) of each level.
    """
    # Compiled, sizes are symbols, of which no array can be made; recorded, an upload would read host memory at each replay.
    if torch.compiler.is_compiling() or (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        sizes = [torch.sym_max(size, 1) for height, width in shapes for size in (width, height)]
        cells = torch.stack([offsets.new_full((), size) for size in sizes])
        cells = cells.view(-1, 2)
    else:
        cells = np.array([(max(width, 1), max(height, 1)) for height, width in shapes], np.int64).reshape(-1, 2)
        cells = upload(cells, offsets)  # (L, 2), no wait for the device
    return points[:, :, None, :, None] + offsets / cells[:, None]


def locations_from_boxes(boxes: Tensor, offsets: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Sampling locations inside boxes, offsets in half sizes: centre + offset / K * (w, h) / 2.

    Args:
        boxes: (N, Q, L, 4) cxcywh in [0, 1].
        offsets: (N, Q, H, L, K, 2).
        shapes: not needed; boxes carry their own scale.
    """
    num_points = offsets.shape[-2]
    centre, size = boxes[:, :, None, :, None, :2], boxes[:, :, None, :, None, 2:]
    return centre + offsets / num_points * size * 0.5


def _check_inputs(value, spatial_shapes, by_point: dict, *references) -> None:
    """``by_point``: what is (N, Q, H, L, K, 2) and what is (N, Q, H, L, K), by name; ``references``: none or one."""
    named = [("value", value), *(("reference", x) for x in references), *by_point.items()]
    for name, tensor in named:
        _check_tensor(name, tensor, value)
    (name, points), (weights_name, weights) = by_point.items()

    if value.dim() != 4:
        raise ValueError(f"value must be (N, S, H, D), got shape {tuple(value.shape)}")
    if points.dim() != 6 or points.shape[-1] != 2:
        raise ValueError(f"{name} must be (N, Q, H, L, K, 2), got shape {tuple(points.shape)}")
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"{weights_name} must be (N, Q, H, L, K) = {tuple(points.shape[:-1])} like {name}, "
            f"got shape {tuple(weights.shape)}"
        )
    n, s, h, _ = value.shape
    if (points.shape[0], points.shape[2]) != (n, h):
        raise ValueError(
            f"{name} has N = {points.shape[0]} and H = {points.shape[2]}, but value has N = {n} and H = {h}"
        )
    _check_shapes(spatial_shapes, s, points.shape[3], name)
    for reference in references:
        expected = (n, points.shape[1], points.shape[3])
        if reference.dim() != 4 or reference.shape[3] not in (2, 4) or reference.shape[:3] != expected:
            raise ValueError(
                f"reference must be (N, Q, L, 2) points or (N, Q, L, 4) boxes with (N, Q, L) = {expected}, "
                f"got shape {tuple(reference.shape)}"
            )


def _check_tensor(name: str, tensor, value) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got layout {tensor.layout}")
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")


def _check_shapes(spatial_shapes, cells: int, num_levels: int, name: str) -> None:
    if not isinstance(spatial_shapes, list | tuple):
        raise TypeError(
            f"spatial_shapes must be a list of (h, w) pairs of Python integers, got {type(spatial_shapes).__name__}"
            + ("; use spatial_shapes.tolist()" if isinstance(spatial_shapes, Tensor | np.ndarray) else "")
        )
    for shape in spatial_shapes:
        if not isinstance(shape, list | tuple) or len(shape) != 2:
            raise ValueError(f"spatial_shapes must hold (h, w) pairs, got {shape!r}")
        for size in shape:
            if not isinstance(size, int | torch.SymInt) or isinstance(size, bool):
                raise TypeError(f"spatial_shapes must hold Python integers, got {size!r} ({type(size).__name__})")
            if size < 0 or size >= 2**31:
                raise ValueError(f"spatial_shapes must hold sizes in [0, 2^31), got {size}")
    if num_levels != len(spatial_shapes):
        raise ValueError(f"{name} has L = {num_levels} levels, but spatial_shapes lists {len(spatial_shapes)}")
    held = sum(height * width for height, width in spatial_shapes)
    if held != cells:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} hold {held} cells, but value has S = {cells}")
