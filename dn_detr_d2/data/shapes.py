"""The embedded data set: scenes of circles, rectangles and triangles in COCO format, drawn from a seed.

``shapes_train`` and ``shapes_val`` are registered with Detectron2 when this package is imported, and drawn into a cache
folder when they are first used. Only integer arithmetic and an uncompressed file format are used, so the files are the
same bytes on every machine. Scenes have 0 to 4 objects, small and large ones, overlap, textured grounds and several
sizes; some are blank. Masks, like boxes, are those of whole objects, also where another object hides a part.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from .coco_custom import load_with_categories

CLASSES = ("circle", "rectangle", "triangle")
VERSION = 2  # part of the cache folder's name; raise it when the files change
SPLITS = {"shapes_train": (11, 1200), "shapes_val": (12, 200)}  # name: (seed, images)
SIZES = ((128, 128), (128, 112), (112, 128), (128, 96), (96, 128))  # (height, width)
BLANK_PERCENT = 5
MAX_OBJECTS = 4
SIDES = (20, 72)  # shortest and longest side of an object, pixels
MAX_COVERED_PERCENT = 30  # an object is not placed where it would hide more of another
MIN_CONTRAST = 200  # sum over the channels of the difference between an object and what it covers


class Dice:
    """Whole numbers from NumPy's legacy generator, whose stream is frozen for all versions (NEP 19)."""

    def __init__(self, seed: list[int]):
        self._state = np.random.RandomState(seed)

    def integers(self, low: int, high: int | None = None, size=None):
        """Uniform in [low, high), or [0, low) with one bound; an int, or an int64 array of ``size``."""
        drawn = self._state.randint(low, high, size, dtype=np.int64)
        return int(drawn) if size is None else drawn


def cache_folder() -> Path:
    """Where the data set lives: $DN_DETR_CACHE as it was on import, default ~/.cache/dn_detr_d2."""
    root = Path(os.environ.get("DN_DETR_CACHE") or Path.home() / ".cache" / "dn_detr_d2")
    return root / f"shapes-v{VERSION}"


Scene = tuple[np.ndarray, list[tuple[int, int, int, int]], list[int], list[np.ndarray]]


@dataclass(frozen=True)
class Split:
    """How a split is drawn.

    Attributes:
        folder: where its files are.
        seed: of all its scenes.
        num_images: so many.
        draw: from the dice of a scene to what :func:`draw_scene` returns.
        classes: their names, in the order of the class indices.
    """

    folder: Path
    seed: int
    num_images: int
    draw: Callable[[Dice], Scene]
    classes: Sequence[str]


_splits: dict[str, Split] = {}


def register_shapes() -> None:
    """Registers both splits; nothing is drawn or read yet."""
    for name, (seed, num_images) in SPLITS.items():
        register_split(name, Split(cache_folder() / name, seed, num_images, lambda rng: draw_scene(rng), CLASSES))


def register_split(name: str, split: Split) -> None:
    """Registers a data set that is drawn when it is first used; one that is known stays."""
    if name in DatasetCatalog:
        return
    _splits[name] = split
    DatasetCatalog.register(name, lambda: load_shapes(name))
    MetadataCatalog.get(name).set(
        json_file=str(split.folder / "annotations.json"),
        evaluator_type="coco",
        thing_classes=list(split.classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(split.classes))},
    )


def load_shapes(name: str, masks: bool = False) -> list[dict]:
    """Dataset dicts of a split, drawn first if the cache does not hold it; with ``masks`` also the ``segmentation``."""
    annotations = Path(MetadataCatalog.get(name).json_file)
    if not annotations.is_file():
        split = _splits[name]
        generate(annotations.parent, split.seed, split.num_images, split.draw, split.classes)
    return load_with_categories(annotations, annotations.parent, masks=masks)[0]


def generate(
    folder: Path,
    seed: int,
    num_images: int,
    draw: Callable[[Dice], Scene] | None = None,
    classes: Sequence[str] = CLASSES,
) -> None:
    """Draws a split into ``folder``: images as .bmp and annotations.json; arguments as of :class:`Split`."""
    draw = draw or draw_scene
    with drafted(folder) as draft:
        images, annotations = [], []
        for image_id in range(num_images):
            pixels, boxes, labels, masks = draw(Dice([seed, image_id]))
            file_name = f"{image_id:05d}.bmp"
            Image.fromarray(pixels).save(draft / file_name)
            height, width = pixels.shape[:2]
            images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
            for (x0, y0, x1, y1), label, mask in zip(boxes, labels, masks, strict=True):
                size = [x1 - x0, y1 - y0]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [x0, y0, *size],
                        "segmentation": run_lengths_of(mask),
                        "area": size[0] * size[1],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (draft / "annotations.json").write_text(json.dumps(content))


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``folder`` when its content is complete, and nothing otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError:  # another process was faster; its files are the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def run_lengths_of(mask: np.ndarray) -> dict:
    """Compressed run lengths of a mask (H, W), as a JSON file holds them."""
    found = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}


def draw_scene(rng: Dice) -> Scene:
    """One scene, drawn from the back to the front.

    Returns:
        (H, W, 3) uint8 pixels, and of each object (x0, y0, x1, y1) in pixels around all of it, class index, (H, W) bool mask
        of all of it.
    """
    height, width = SIZES[rng.integers(len(SIZES))]
    pixels = draw_ground(rng, height, width)
    owner = np.zeros((height, width), np.int64)  # 0 = ground, i = i-th object
    masks, boxes, labels = [], [], []
    wanted = 0 if rng.integers(100) < BLANK_PERCENT else rng.integers(1, MAX_OBJECTS + 1)
    for _ in range(4 * wanted):
        if len(boxes) == wanted:
            break
        label = rng.integers(len(CLASSES))
        mask, box = draw_object(rng, label, height, width)
        if box is None or hides_too_much(owner, mask, [int(x.sum()) for x in masks]):
            continue
        owner[mask] = len(boxes) + 1
        masks.append(mask)
        pixels[mask] = object_colour(rng, pixels, mask)
        boxes.append(box)
        labels.append(label)
    noise = rng.integers(-8, 9, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), boxes, labels, masks


def draw_ground(rng: Dice, height: int, width: int) -> np.ndarray:
    """(H, W, 3) int64: plain, gradient, stripes, checks or speckles around a random colour."""
    y, x = np.mgrid[:height, :width]
    period = rng.integers(4, 17)
    patterns = (
        np.zeros((height, width), np.int64),
        (x * rng.integers(-40, 41) + y * rng.integers(-40, 41)) // max(height, width),
        (x * rng.integers(0, 3) + y * rng.integers(1, 3)) // period % 2 * 30 - 15,
        (x // period + y // period) % 2 * 30 - 15,
        np.kron(rng.integers(-18, 19, (height // 4, width // 4)), np.ones((4, 4), np.int64)),
    )
    return rng.integers(40, 216, 3) + patterns[rng.integers(len(patterns))][..., None]


def draw_object(rng: Dice, shape: int, height: int, width: int, sides: tuple[int, int] | None = None):
    """Mask (H, W) of an object wholly inside the image and its (x0, y0, x1, y1); (mask, None) where it has no room.

    Args:
        rng: what it is drawn from.
        shape: 0 = circle, 1 = rectangle, 2 = triangle, 3 = rhombus.
        height, width: of the image in pixels.
        sides: shortest and longest side in pixels; None = :data:`SIDES`.
    """
    low, high = sides or SIDES
    w = rng.integers(low, high + 1)
    h = w if shape == 0 else int(np.clip(w * rng.integers(50, 201) // 100, low, high))
    y, x = np.mgrid[:height, :width]
    if w >= width or h >= height:
        return np.zeros((height, width), bool), None
    x0, y0 = rng.integers(width - w + 1), rng.integers(height - h + 1)
    dx, dy = 2 * (x - x0) - w + 1, 2 * (y - y0) - h + 1  # doubled distance from the centre, exact for any parity
    inside = (abs(dx) < w) & (abs(dy) < h)
    if shape == 0:
        inside &= dx * dx + dy * dy <= w * w
    elif shape == 2:  # apex up or down
        depth = (y - y0) if rng.integers(2) else (y0 + h - 1 - y)
        inside &= abs(dx) * h <= w * (depth + 1)
    elif shape == 3:
        inside &= abs(dx) * h + abs(dy) * w <= w * h
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return inside, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def hides_too_much(
    owner: np.ndarray, mask: np.ndarray, areas: list[int], most_percent: int = MAX_COVERED_PERCENT
) -> bool:
    """Whether an object drawn on ``mask`` would hide more than ``most_percent`` of one that lies below it."""
    left = np.bincount(owner[~mask], minlength=len(areas) + 1)[1:]
    return any(100 * (area - rest) > most_percent * area for area, rest in zip(areas, left, strict=True))


def object_colour(rng: Dice, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(3,) a colour that stands out from what the object covers."""
    below = pixels[mask].sum(0) // mask.sum()
    colour = rng.integers(0, 256, 3)
    while np.abs(colour - below).sum() < MIN_CONTRAST:
        colour = rng.integers(0, 256, 3)
    return colour
