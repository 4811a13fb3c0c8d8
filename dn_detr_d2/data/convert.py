"""What the converters of YOLO and Pascal VOC sets share: files, numbers, boxes, counts, and the COCO file made of them.

A size is (height, width) in pixels, a box [x, y, width, height] in pixels, continuous: the right edge of an image is at
x = width.
"""

import itertools
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DatasetError

# Endings of files that the formats of images.py usually have.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
EXAMPLES = 5  # names listed of each kind
LARGEST_SEARCH = 500  # folders looked into for files that are not where they were expected
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
ROUNDING = 1.0  # pixels that a box may stick out without being counted, as in training

HIDDEN = "hidden files and folders, not read"
LINKED = "links to folders, not followed"
EMPTY_BOX = "boxes without a positive width and height, dropped"
OUTSIDE_BOX = "boxes outside their picture, dropped"
CLIPPED_BOX = "boxes that stuck out of their picture by more than a pixel, clipped"


class Tally:
    """What was dropped, missing or changed, by kind, in the order of the first of each."""

    def __init__(self):
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, place: object) -> None:
        """Counts one more of ``kind``, found at ``place``."""
        self._places.setdefault(kind, []).append(str(place))

    def add_once(self, kind: str, place: object) -> None:
        """The same for what may be met several times."""
        if str(place) not in self._places.get(kind, ()):
            self.add(kind, place)

    def lines(self) -> list[str]:
        """One line a kind: how many, and where the first were."""
        return [
            f"{kind}: {len(places)} ({', '.join(places[:EXAMPLES])}{', ...' if len(places) > EXAMPLES else ''})"
            for kind, places in self._places.items()
        ]

    def __str__(self) -> str:
        """All lines as the end of a sentence."""
        return "".join(f"; {line}" for line in self.lines())


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


def number(text: str) -> float:
    """A finite decimal number in any notation; raises ValueError that names the text."""
    text = text.strip()
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{text!r:.60} is no finite decimal number")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r:.60} is no finite decimal number")
    return value


def whole_number(text: str) -> int:
    """A whole number in any notation (1, 1.0, 1e0); raises ValueError that names the text."""
    value = number(text)
    if value != int(value):
        raise ValueError(f"{text!r:.60} is no whole number")
    return int(value)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; raises DatasetError that names the line, and OSError."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DatasetError(
            f"line {line} is not {encoding.upper().removesuffix('-SIG')}; save the file as UTF-8"
        ) from None


def lines_of(text: str) -> list[str]:
    """Lines as an editor counts them, whatever ends them."""
    return re.split("\r\n|\r|\n", text)


def normal(name: str) -> str:
    """A file's name in one of the spellings that mean the same: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def walk(folder: Path, suffixes: tuple[str, ...], tally: Tally) -> list[str]:
    """Files below ``folder`` that end in one of ``suffixes``, relative to it with slashes, in order.

    Hidden ones (.DS_Store, ._name, __MACOSX) and links to folders are left out and counted; raises OSError.
    """
    found = []

    def fail(error: OSError):
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        below = os.path.relpath(root, folder)
        for name in [name for name in folders + files if name.startswith(".") or name == "__MACOSX"]:
            tally.add_once(HIDDEN, os.path.join(root, name))
            (folders if name in folders else files).remove(name)
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                tally.add_once(LINKED, os.path.join(root, name))
        paths = (os.path.normpath(os.path.join(below, name)) for name in files)
        found += [Path(path).as_posix() for path in paths if path.lower().endswith(suffixes)]
    return sorted(found)


def check_label_file(path: Path, roots: list[str]) -> None:
    """Raises DatasetError if ``path`` is no regular file, or lies, its links followed, below none of the real ``roots``."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DatasetError("it is no regular file")
    real = os.path.realpath(path)
    if not any(os.path.commonpath([root, real]) == root for root in roots):
        raise DatasetError("it leads out of the folder with the label files; put the file itself there")


def best_folder(start: Path, score: Callable[[Path], int]) -> tuple[Path, int]:
    """The folder at, below or beside ``start`` with the largest score, and the score; looks at ``LARGEST_SEARCH``."""
    candidates = itertools.islice(_around(start), LARGEST_SEARCH)
    scored = [(score(folder), folder) for folder in candidates]
    most = max((n for n, _ in scored), default=0)
    return next(((folder, n) for n, folder in scored if n == most), (start, 0))


def _around(start: Path) -> Iterator[Path]:
    seen = set()
    for top in (start, Path(os.path.abspath(start)).parent):
        for root, folders, _ in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if len(Path(root).relative_to(top).parts) >= 3:
                folders.clear()
            if os.path.realpath(root) not in seen:
                seen.add(os.path.realpath(root))
                yield Path(root)
