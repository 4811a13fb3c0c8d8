"""Workloads of the operator, and how PyTorch alone would do them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr_d2.layers.ms_deform_attn import locations_from_boxes, locations_from_points

Shapes = list[tuple[int, int]]


def pyramid(height: int, width: int, levels: int = 4) -> Shapes:
    """Level sizes at strides 8, 16, ...: four of them in Deformable DETR."""
    return [(-(-height // (8 << i)), -(-width // (8 << i))) for i in range(levels)]


def make_case(height, width, queries=None, n=1, h=8, d=32, k=4, levels=4, dtype=torch.float32, seed=0) -> dict:
    """Inputs of an encoder (``queries`` None: one a cell, points around it) or of a decoder (boxes at random)."""
    torch.manual_seed(seed)
    shapes = pyramid(height, width, levels)
    s = sum(a * b for a, b in shapes)
    if queries is None:
        axes = [
            torch.meshgrid((torch.arange(a) + 0.5) / a, (torch.arange(b) + 0.5) / b, indexing="ij") for a, b in shapes
        ]
        centres = torch.cat([torch.stack([x, y], -1).view(-1, 2) for y, x in axes])
        reference = centres[None, :, None].expand(n, -1, levels, -1)
    else:
        reference = torch.cat([torch.rand(n, queries, 1, 2), torch.rand(n, queries, 1, 2) * 0.3 + 0.05], -1)
        reference = reference.expand(-1, -1, levels, -1)
    offsets = 2 * torch.randn(n, reference.shape[1], h, levels, k, 2)
    logits = torch.randn(n, reference.shape[1], h, levels, k)
    locate = locations_from_points if queries is None else locations_from_boxes
    return {
        "value": torch.randn(n, s, h, d).to(dtype),
        "shapes": shapes,
        "locations": locate(reference, offsets, shapes).contiguous(),
        "weights": logits.flatten(3).softmax(-1).view_as(logits),
        "reference": reference.contiguous(),
        "offsets": offsets,
        "logits": logits,
    }


def grid_sample_composite(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One ``grid_sample`` a level and a weighted sum, in the dtype of the values, without any check."""
    n, s, h, d = value.shape
    q = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype).transpose(1, 2).flatten(0, 1)  # (N*H, Q, L, K, 2)
    shares = weights.to(value.dtype).transpose(1, 2).reshape(n * h, 1, q, -1)
    maps = value.permute(0, 2, 3, 1).reshape(n * h, d, s).split([a * b for a, b in shapes], -1)
    sampled = [
        F.grid_sample(x.view(n * h, d, *shape), grids[:, :, level], align_corners=False)
        for level, (x, shape) in enumerate(zip(maps, shapes, strict=True))
    ]
    return (torch.stack(sampled, -2).flatten(-2) * shares).sum(-1).view(n, h * d, q).transpose(1, 2)


def gather_corners(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, by_index: bool = False) -> Tensor:
    """Four reads a level, by ``Tensor.gather`` or by indices: the forms that ``torch.compile`` fuses best."""
    n, _, h, _ = value.shape
    images, heads = torch.arange(n, device=value.device), torch.arange(h, device=value.device)
    total, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        x, y = (locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5).unbind(-1)  # (N, Q, H, K)
        for dy in (0, 1):
            for dx in (0, 1):
                cx, cy = x.floor() + dx, y.floor() + dy
                inside = (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
                share = (1 - (x - cx).abs()) * (1 - (y - cy).abs()) * inside * weights[:, :, :, level]
                cell = start + (cy.clamp(0, height - 1) * width + cx.clamp(0, width - 1)).long()
                if by_index:
                    corner = value[images[:, None, None, None], cell, heads[:, None]]  # (N, Q, H, K, D)
                else:
                    flat = cell.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, value.shape[3])
                    corner = value.transpose(1, 2).gather(2, flat).unflatten(2, (-1, cell.shape[3])).transpose(1, 2)
                total = total + (corner * share[..., None].to(value.dtype)).sum(3)
        start += height * width
    return total.flatten(2)
