"""An image as a panel, with boxes and words on it. Boxes are xyxy in pixels of the image that the model gets."""

import math
from pathlib import Path

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, image_scale
from ..coco import NUM_RAW_CLASSES, coco_names, raw_names
from ..modeling.pixel_decoder import padded_size
from ..structures import Memory
from ..utils.text_output import escaped
from .style import new_figure

FLIPPED = "#D55E00"


def to_rgb(image: Tensor, image_format: str) -> np.ndarray:
    """(3, H, W) 0..255 in "RGB" or "BGR" -> (H, W, 3) uint8 RGB."""
    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def to_pixels(boxes: Tensor, pixels: np.ndarray, memory: Memory) -> Tensor:
    """(..., 4) cxcywh in [0, 1] -> (..., 4) xyxy in pixels of an (H, W, 3) image, on the host.

    Args:
        boxes: of the model.
        pixels: the image as the model has seen it.
        memory: of the pass; with masks, boxes are relative to the padded image.
    """
    boxes = boxes.detach().float().cpu()
    return cxcywh_to_xyxy(boxes) * image_scale(padded_size(memory) or pixels.shape[:2], boxes)


def image_grid(pixels: np.ndarray, count: int) -> tuple[Figure, list]:
    """A figure with ``count`` panels that each show the image; panels keep its aspect."""
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3 if count <= 6 else 4)
    rows = math.ceil(count / columns)
    height, width = pixels.shape[:2]
    side = (3.8 if count > 2 else 5.5) / max(height, width)  # inches a pixel
    figure, panels = new_figure(rows, columns, (max(width * side, 2.6), height * side + 0.35))
    for panel in panels:
        panel.set_axis_off()
    for panel in panels[:count]:
        panel.imshow(pixels, extent=(0, width, height, 0), interpolation="bilinear")
        panel.set(xlim=(0, width), ylim=(height, 0))
    return figure, panels[:count]


def draw_box(panel, box: Tensor, colour: str, style: str = "-", width: float = 1.8) -> None:
    """Outlines (x0, y0, x1, y1); a dark rim keeps it visible on any ground."""
    x0, y0, x1, y1 = box.tolist()
    outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style, linewidth=width)
    outline.set_path_effects([withStroke(linewidth=width + 1.0, foreground="black")])
    panel.add_patch(outline)


def write(panel, x: float, y: float, text: str, marked: bool = False, below: bool = False) -> None:
    """A word at a point inside the image, above it unless ``below``; ``marked`` makes it bold on vermilion."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    x, y = min(max(x, left), right), min(max(y, top), bottom)
    down = y < 0.93 * bottom if below else y < 0.07 * bottom
    end = x > 0.6 * right
    panel.text(
        x,
        y,
        text,
        fontsize=7,
        color="white",
        fontweight="bold" if marked else "normal",
        va="top" if down else "bottom",
        ha="right" if end else "left",
        clip_on=True,
        bbox={"facecolor": FLIPPED if marked else "#202020", "alpha": 0.85, "pad": 0.8, "linewidth": 0},
    )


def legend(figure: Figure, entries: list[tuple[str, str, str]], columns: int = 4) -> None:
    """A legend below the panels from (label, colour, line style); styles "o", "+" and "s" are markers."""
    handles = [
        Line2D([], [], color=colour, marker=style, markeredgecolor="#202020", linestyle="none", label=label)
        if style in ("o", "+", "s")
        else Line2D([], [], color=colour, linestyle=style, label=label)
        for label, colour, style in entries
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), fontsize=8, frameon=False
    )


def class_names(cfg) -> list[str]:
    """Names of the classes: of the config, else of its first training set, else their numbers."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else Metadata()
    return known_names(cfg, metadata) or [f"class {i}" for i in range(cfg.MODEL.DN_DETR.NUM_CLASSES)]


def known_names(cfg, metadata: Metadata) -> list[str]:
    """Names of the classes: of the config, else of a data set that has as many; [] where nothing names them.

    A model of COCO's 91 raw ids has their names.
    """
    node = cfg.MODEL.DN_DETR
    names = list(node.CLASS_NAMES) or list(metadata.get("thing_classes", []))
    if node.NUM_CLASSES == NUM_RAW_CLASSES and names == list(coco_names()):
        return list(raw_names())
    return names if node.NUM_CLASSES in (None, len(names)) else []


def title_of(image: str, weights: str) -> str:
    """Which image, and which model."""
    model = "/".join(Path(weights).parts[-2:]) if weights else "random weights: this model has learned nothing"
    return escaped(f"{Path(image).name}, {model}")
