"""What the converters of YOLO and Pascal VOC sets share: boxes inside their pictures, and the COCO file made of them.

A size is (height, width) in pixels, a box [x, y, width, height] in pixels, continuous: the right edge of an image is at
x = width.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from .label_files import Tally

ROUNDING = 1.0  # pixels that a box may stick out without being counted, as in training

EMPTY_BOX = "boxes without a positive width and height, dropped"
OUTSIDE_BOX = "boxes outside their picture, dropped"
CLIPPED_BOX = "boxes that stuck out of their picture by more than a pixel, clipped"


@dataclass(frozen=True)
class Thing:
    """An object: class ``name``, ``box`` [x, y, width, height] and ``polygon`` [x, y, x, y, ...], [] = none, in pixels."""

    name: str
    box: list[float]
    polygon: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """A picture with its objects; ``file_name`` is relative to the image folder, ``size`` (height, width)."""

    file_name: str
    size: tuple[int, int]
    things: list[Thing]


@dataclass(frozen=True)
class Conversion:
    """A data set that was read.

    Attributes:
        content: in COCO format.
        folder: what ``file_name`` is relative to.
        tally: what was dropped, missing or changed.
        faults: a sentence for each file that cannot be used.
        hint: a sentence about files that lie elsewhere, or "".
    """

    content: dict
    folder: Path
    tally: Tally
    faults: list[str]
    hint: str = ""


def read_scenes(
    sources: Iterable[tuple[Path, Callable[[], Scene]]], faults: list[str], names: list[str]
) -> list[Scene]:
    """The scenes of ``sources``, pairs of a file and what reads it; each that cannot be used adds a sentence to ``faults``.

    ``names``: the classes that there may be; [] = any.
    """
    scenes = []
    for file, load in sources:
        try:
            scene = load()
            if strangers := {thing.name for thing in scene.things} - set(names) if names else ():
                raise DatasetError(
                    f"it has the classes {sorted(strangers)}, which --names does not list; add them there"
                )
        except (DatasetError, ValueError, OSError) as error:
            faults.append(f"{file}: {' '.join(str(error).split())}")
            continue
        scenes.append(scene)
    return scenes


def coco_content(scenes: list[Scene], names: list[str]) -> dict:
    """The object of a COCO file; categories are numbered from 1, as in ``names``, or in the order of the alphabet."""
    categories = {name: i for i, name in enumerate(names or sorted({x.name for s in scenes for x in s.things}), 1)}
    images, annotations = [], []
    for i, scene in enumerate(scenes, 1):
        height, width = scene.size
        images.append({"id": i, "file_name": scene.file_name, "height": height, "width": width})
        for thing in scene.things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": categories[thing.name],
                    "bbox": thing.box,
                    "area": polygon_area(thing.polygon) or thing.box[2] * thing.box[3],
                    "iscrowd": 0,
                }
                | ({"segmentation": [thing.polygon]} if thing.polygon else {})
            )
    listed = [{"id": i, "name": name} for name, i in categories.items()]
    return {"images": images, "annotations": annotations, "categories": listed}


def place(thing: Thing, size: tuple[int, int], tally: Tally, where: str) -> Thing | None:
    """``thing`` inside a picture of ``size``; None if nothing is left of it. Both are counted.

    A box that lies inside stays as it is; positive is what is positive in float32, as in training.
    """
    height, width = size
    x, y, w, h = thing.box
    if not _is_positive(thing.box):
        tally.add(EMPTY_BOX, where)
        return None
    low, high = [max(x, 0.0), max(y, 0.0)], [min(x + w, float(width)), min(y + h, float(height))]
    reach = max(low[0] - x, low[1] - y, x + w - high[0], y + h - high[1])
    if reach <= 0:
        return thing
    box = [*low, high[0] - low[0], high[1] - low[1]]
    if not _is_positive(box):
        tally.add(OUTSIDE_BOX, where)
        return None
    if reach > ROUNDING:
        tally.add(CLIPPED_BOX, where)
    limits = itertools.cycle((width, height))
    polygon = [min(max(value, 0.0), float(limit)) for value, limit in zip(thing.polygon, limits, strict=False)]
    return Thing(thing.name, box, polygon)


def _is_positive(box: list[float]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        corner, extent = np.float32(box[:2]), np.float32(box[2:])
        return bool((corner + extent > corner).all())


def bounding_box(polygon: list[float]) -> list[float]:
    """[x, y, width, height] of [x, y, x, y, ...]."""
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def polygon_area(polygon: list[float]) -> float:
    """Square pixels inside [x, y, x, y, ...]; 0 for none."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    following = points[1:] + points[:1]
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, following, strict=True))) / 2


def refuse_empty(found: Conversion, allowed: bool) -> None:
    """Raises DatasetError for a set without boxes or classes, with all that was noticed."""
    content = found.content
    if not content["annotations"] and not allowed:
        hint = f"; {found.hint}" if found.hint else ""
        raise DatasetError(
            f"no box in {len(content['images'])} pictures{found.tally}{hint}; --allow-empty "
            "writes a set without boxes all the same"
        )
    if not content["images"]:
        raise DatasetError("no picture is left; nothing can be trained or evaluated on that")
    if not content["categories"]:
        raise DatasetError("a set without boxes has no class names; give them with --names classes.txt")
