"""Where one query looks, a panel for each decoder layer: sampling points, or attention as heat."""

import numpy as np
import torch
from matplotlib.figure import Figure

from ..modeling.outputs import ForwardOutputs
from ..modeling.postprocess import class_probability
from .images import draw_box, image_grid, legend, to_pixels
from .recording import Layer, heat_map, on_image
from .style import ON_IMAGE, colour

REFERENCE, PREDICTED = "#FFFFFF", "#FF5AC8"
MARGIN = 0.06  # of the image's sides, shown around it where points may lie


def best_queries(outputs: ForwardOutputs, count: int, names: list[str]) -> list[int]:
    """The queries of the best detections of the last layer, best first."""
    scores = class_probability(outputs.matching.logits[-1, 0], len(names)).amax(-1)
    return scores.topk(min(count, len(scores))).indices.tolist()


def verdict(outputs: ForwardOutputs, query: int, layer: int, names: list[str]) -> str:
    """Best class of a query after a layer, and its score."""
    scores = class_probability(outputs.matching.logits[layer, 0, query], len(names))
    return f"{names[int(scores.argmax())]} {scores.max():.2f}"


def draw_attention(
    outputs: ForwardOutputs, layers: list[Layer], query: int, pixels: np.ndarray, names: list[str]
) -> Figure:
    """One query over all decoder layers.

    Args:
        outputs, layers: from :func:`~.recording.record`.
        query: which, from 0.
        pixels: (H, W, 3) RGB, the image.
        names: of the classes.
    """
    deformable = layers[0].sampling is not None
    figure, panels = image_grid(_greyed(pixels), len(layers))
    for i, (panel, layer) in enumerate(zip(panels, layers, strict=True)):
        (_draw_points if deformable else _draw_heat)(panel, layer, query, outputs, pixels)
        point = deformable and layer.sampling.around_point
        reference = to_pixels(layer.boxes[query], pixels, outputs.memory)
        if point:
            panel.plot(*((reference[:2] + reference[2:]) / 2).tolist(), "+", color=REFERENCE, markersize=12, mew=2)
        else:
            draw_box(panel, reference, REFERENCE)
        row = i + outputs.matching.before_layers
        draw_box(panel, to_pixels(outputs.matching.boxes[row, 0, query], pixels, outputs.memory), PREDICTED, "--")
        panel.set_title(f"layer {i + 1}: {verdict(outputs, query, row, names)}", fontsize=9)
    legend(figure, _entries(outputs, deformable), 3)
    return figure


def _entries(outputs: ForwardOutputs, deformable: bool) -> list[tuple[str, str, str]]:
    """What the legend says."""
    boxes = [
        ("reference (+: a point) that enters the layer", "#B0B0B0", "-"),
        ("box that the layer predicts", PREDICTED, "--"),
    ]
    if not deformable:
        return [*boxes, ("attention, bright = the layer's maximum", "#FCA50A", "s")]
    shapes = outputs.memory.shapes
    levels = [(f"level {i + 1} ({h} x {w} cells)", colour(i, ON_IMAGE), "o") for i, (h, w) in enumerate(shapes)]
    return [*boxes, ("larger point: more weight", "#808080", "o"), *levels]


def _draw_points(panel, layer: Layer, query: int, outputs: ForwardOutputs, pixels: np.ndarray) -> None:
    """All heads' points; colour by level, area and opacity by weight."""
    height, width = pixels.shape[:2]
    points = on_image(layer.sampling.locations, outputs.memory)[query] * torch.tensor([width, height])  # (H, L, K, 2)
    weights = layer.sampling.weights[query]
    strength = (weights / weights.max()).flatten(1)
    for level in range(points.shape[1]):
        x, y = points[:, level].flatten(0, 1).T.numpy()
        share = strength.view(weights.shape)[:, level].flatten().numpy()
        style = {"color": colour(level, ON_IMAGE), "edgecolors": "black", "linewidths": 0.4, "zorder": 3}
        panel.scatter(x, y, s=8 + 50 * share, alpha=0.35 + 0.65 * share, **style)
    panel.set(xlim=(-MARGIN * width, (1 + MARGIN) * width), ylim=((1 + MARGIN) * height, -MARGIN * height))


def _draw_heat(panel, layer: Layer, query: int, outputs: ForwardOutputs, pixels: np.ndarray) -> None:
    """The map spans the padded level, of which the image is the valid part."""
    height, width = pixels.shape[:2]
    heat = heat_map(layer.maps[query], outputs.memory.shapes).numpy()
    ratio = outputs.memory.valid_ratios[0, 0].tolist()
    opacity = 0.3 + 0.5 * heat / heat.max()  # where nobody looks the image shines through
    extent = (0, width / ratio[0], height / ratio[1], 0)
    panel.imshow(heat, extent=extent, cmap="inferno", alpha=opacity, vmin=0, interpolation="bilinear")
    panel.set(xlim=(0, width), ylim=(height, 0))


def _greyed(pixels: np.ndarray) -> np.ndarray:
    """The image without colour, so that colour means levels or heat."""
    return np.repeat(pixels.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
