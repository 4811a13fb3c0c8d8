"""Inputs and slow references for the tests of deformable attention."""

import math

import numpy as np
import torch


def loop_reference(value, shapes, locations, weights):
    """Bilinear sampling written out: one corner at a time, straight from the definition."""
    n, _, h, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    out = torch.zeros(n, q, h, d, dtype=value.dtype)
    for i in np.ndindex(n, q, h, levels, points):
        image, query, head, level, _ = i
        height, width = shapes[level]
        start = sum(a * b for a, b in shapes[:level])
        x = float(locations[i][0]) * width - 0.5
        y = float(locations[i][1]) * height - 0.5
        for cy in (math.floor(y), math.floor(y) + 1):
            for cx in (math.floor(x), math.floor(x) + 1):
                if 0 <= cy < height and 0 <= cx < width:
                    share = (1 - abs(x - cx)) * (1 - abs(y - cy))
                    out[image, query, head] += weights[i] * share * value[image, start + cy * width + cx, head]
    return out.flatten(2)


def fixture():
    """Spec section 1.4, float64."""
    rs = np.random.RandomState(7)
    value, loc = rs.standard_normal((2, 30, 2, 3)), rs.uniform(-0.1, 1.1, (2, 4, 2, 2, 2, 2))
    w = rs.uniform(0, 1, (2, 4, 2, 2, 2))
    w /= w.sum((-1, -2), keepdims=True)
    return torch.tensor(value), [(6, 4), (3, 2)], torch.tensor(loc), torch.tensor(w)


def make_inputs(n=1, q=3, h=2, d=4, k=2, shapes=((4, 6), (2, 3)), dtype=torch.float64, point_dtype=None, seed=0):
    """Random (value, shapes, locations, weights); locations reach outside and stay a hundredth of a cell off the kinks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(shape) for shape in shapes]
    s, levels = sum(a * b for a, b in shapes), len(shapes)
    value = torch.randn(n, s, h, d, dtype=torch.float64, generator=generator).to(dtype)
    sizes = torch.tensor([(max(b, 1), max(a, 1)) for a, b in shapes], dtype=torch.float64).view(levels, 1, 2)
    cells = (torch.rand(n, q, h, levels, k, 2, dtype=torch.float64, generator=generator) * 1.4 - 0.2) * sizes - 0.5
    cells = cells.floor() + (cells - cells.floor()).clamp(0.01, 0.99)
    locations = ((cells + 0.5) / sizes).to(point_dtype or dtype)
    weights = torch.rand(n, q, h, levels, k, dtype=torch.float64, generator=generator).to(point_dtype or dtype)
    return value, shapes, locations, weights


def make_fused_inputs(dims=4, seed=0, **sizes):
    """Random (value, shapes, reference, offsets, logits) of float64."""
    value, shapes, locations, weights = make_inputs(seed=seed, **sizes)
    n, q, _, levels, k, _ = locations.shape
    generator = torch.Generator().manual_seed(seed + 1)
    reference = torch.rand(n, q, levels, dims, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    around = reference[:, :, None, :, None]
    sizes = torch.tensor([(b, a) for a, b in shapes], dtype=torch.float64).view(levels, 1, 2)
    step = 1 / sizes if dims == 2 else around[..., 2:] * 0.5 / k
    return value, shapes, reference, (locations - around[..., :2]) / step, weights * 4 - 2
