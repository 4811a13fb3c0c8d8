"""YOLO label files: lines of "class cx cy w h", or "class x y x y x y ..." of a polygon, in [0, 1] of the picture.

As Ultralytics reads them: a class in any notation of a whole number, files with boxes and polygons, a polygon as its
bounding box, lines that repeat another one dropped, a picture without a label file as one without objects.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from .convert import Conversion, Scene, Thing, bounding_box, coco_content, place, read_scenes
from .images import ImageFolder, image_size
from .label_files import SUFFIXES, Tally, best_folder, check_label_file, lines_of, normal, number, read_text, walk
from .yolo_yaml import Names, Split, labels_folder

LIMIT = 1.5  # of a coordinate in [0, 1]: what sticks out further is no rounding but another unit
MANY = 8  # boxes from which a set can be told to follow another convention
SUSPICIOUS = 0.25  # part of the boxes that stick out
FITTING, MISFITS = 0.9, 0.25  # share of boxes that must fit another convention; misfits for each that sticks out
SAMPLE = 100  # pictures whose label files are searched elsewhere
TOLERANCE = 1.01  # of a coordinate in [0, 1], as in Ultralytics
# [x, y, w, h] of the four numbers of a box.
CONVENTIONS: dict[str, Callable] = {
    "cxcywh": lambda cx, cy, w, h: [cx - w / 2, cy - h / 2, w, h],
    "xywh": lambda x, y, w, h: [x, y, w, h],
    "xyxy": lambda x0, y0, x1, y1: [x0, y0, x1 - x0, y1 - y0],
}
# Text files that exporters put beside label files.
NO_LABELS = {"classes", "labels", "obj", "predefined_classes", "notes", "train", "val", "valid", "test"}

NO_LABEL_FILE = "pictures without a label file, kept as pictures without objects"
NO_PICTURE = "label files without a picture, left out"
REPEATED = "lines that repeat an earlier one of their file, dropped"
POLYGONS = "polygons, kept as segmentation, with their bounding boxes"
POSES = "lines with key points, of which only the box is kept"
CONFIDENCES = "confidences, left out"
SHARED = "pictures that share the label file of another one, as their names differ in the ending only"
TWICE = "pictures that are listed twice, kept once"
MOVED = "path of the data.yaml does not exist, its own folder is taken"


@dataclass(frozen=True)
class Options:
    """How lines are read: ``boxes`` of ``CONVENTIONS`` (None = cxcywh, and say so if that cannot be), in pixels or in
    [0, 1], with or without a confidence at the end."""

    boxes: str | None = None
    pixels: bool = False
    confidence: bool = False


@dataclass(frozen=True)
class Pair:
    """An image, relative to the image folder, and its label file, None = it has none."""

    image: str
    labels: Path | None


class LabelFolders:
    """Finds label files by the names of images: .txt in any case, names in any normalisation of Unicode."""

    def __init__(self, tally: Tally):
        self._tally = tally
        self._folders: dict[Path, dict[str, list[str]]] = {}
        self.used: set[Path] = set()

    def find(self, folder: Path, image: str) -> Path | None:
        """The label file of ``image`` in ``folder``; raises DatasetError where two would fit."""
        if folder not in self._folders:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            self._folders[folder] = listing = {}
            for name in names:
                if name.lower().endswith(".txt"):
                    listing.setdefault(normal(name[:-4]), []).append(name)
        found = self._folders[folder].get(normal(Path(image).stem), [])
        paths = {folder / name for name in found}
        if paths & self.used:
            self._tally.add(SHARED, image)
        self.used |= paths
        if len(found) > 1:
            raise DatasetError(f"{folder} has {found[0]} and {found[1]} for the image {image}; take one away")
        return folder / found[0] if found else None


class Reader:
    """Reads label files; counts what it drops, and how boxes would look in other conventions.

    Args:
        classes: names, and numbers of key points a line.
        options: how lines are read.
        tally: is added to.
    """

    def __init__(self, classes: Names, options: Options, tally: Tally):
        self.names, self.keypoints = classes.names, classes.keypoints
        self.options, self.tally = options, tally
        self._boxes = self._outside = 0
        self._fits, self._misfits = Counter(), Counter()  # of boxes, in conventions

    def read(self, file: Path, size: tuple[int, int]) -> list[Thing]:
        """The objects of a file whose picture has ``size`` (height, width).

        Raises:
            DatasetError: a line cannot be read; the first is named, the others are counted.
            OSError: the file cannot be read.
        """
        seen, found, faults = set(), [], []
        for count, line in enumerate(lines_of(read_text(file)), 1):
            fields = line.split()
            if not fields:
                continue
            where = f"{file} line {count}"
            try:
                label, values = self._numbers(fields, where)
                if (key := (label, *values)) in seen:
                    self.tally.add(REPEATED, where)
                    continue
                seen.add(key)
                thing = self._thing(label, values, size, where)
            except ValueError as error:
                faults.append(f"line {count} {error}")
                continue
            found += [thing] if thing is not None else []
        if faults:
            others = f"; {len(faults) - 1} more lines of this file cannot be read" if len(faults) > 1 else ""
            raise DatasetError(faults[0] + others)
        return found

    def _numbers(self, fields: list[str], where: str) -> tuple[int, list[float]]:
        """(class, 4 numbers of a box or 6 and more of a polygon) of a line; raises ValueError."""
        try:
            label, *values = map(number, fields)
        except ValueError as error:
            hint = "; numbers are parted by blanks" if any("," in text for text in fields) else ""
            raise DatasetError(f"has {error}; it must be: class cx cy w h{hint}") from None
        if label != int(label) or not 0 <= label < len(self.names):
            raise DatasetError(
                f"has class {fields[0]}, but there are {len(self.names)} class names, for the classes 0 .. "
                f"{len(self.names) - 1}"
            )
        values = self._without_extras(values, where)
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise DatasetError(
                f"has {len(fields)} fields, it must be: class cx cy w h, or class and at least three pairs x y"
            )
        return int(label), values

    def _without_extras(self, values: list[float], where: str) -> list[float]:
        if self.keypoints and len(values) == 4 + self.keypoints + self.options.confidence:
            self.tally.add(POSES, where)
            return values[:4]
        if self.options.confidence and len(values) == 6 and values[5] >= 1 and values[5] == int(values[5]):
            self.tally.add(CONFIDENCES, where)  # and the number of a track; a polygon would have a confidence as well
            return values[:4]
        if self.options.confidence and len(values) % 2 and len(values) >= 5:
            self.tally.add(CONFIDENCES, where)
            return values[:-1]
        if len(values) == 5:
            raise DatasetError(
                "has 6 fields, class cx cy w h and a confidence, as predictions have that were saved; if they are to be "
                "the ground truth, --ignore-confidence reads them"
            )
        return values

    def _thing(self, label: int, values: list[float], size: tuple[int, int], where: str) -> Thing | None:
        height, width = size
        scale = (1, 1) if self.options.pixels else (width, height)
        reach = max(abs(v) * scale[i % 2] / (width, height)[i % 2] for i, v in enumerate(values))
        if reach > LIMIT:
            raise DatasetError(f"has the coordinates {values[:8]}, {self._unit(values, size)}")
        if len(values) > 4:
            polygon = [v * scale[i % 2] for i, v in enumerate(values)]
            thing = place(Thing(self.names[label], bounding_box(polygon), polygon), size, self.tally, where)
            if thing is not None:
                self.tally.add(POLYGONS, where)
            return thing
        x, y, w, h = CONVENTIONS[self.options.boxes or "cxcywh"](*values)
        box = [x * scale[0], y * scale[1], w * scale[0], h * scale[1]]
        self._compare([v * scale[i % 2] / (width, height)[i % 2] for i, v in enumerate(values)], box, size)
        return place(Thing(self.names[label], box), size, self.tally, where)

    def _unit(self, values: list[float], size: tuple[int, int]) -> str:
        """What is wrong with coordinates that lie far outside."""
        picture = f"{size[1]}x{size[0]}"
        if self.options.pixels:
            return f"but its picture has {picture} pixels; correct them, or leave --pixels out"
        pixels = all(0 <= v <= size[1 - i % 2] for i, v in enumerate(values))
        if pixels and sum(v > 1 for v in values) * 2 > len(values):
            return f"which must lie in [0, 1]; as pixels they fit the picture of {picture}: --pixels reads them so"
        if len(values) > 4 and all(0 <= v <= 1 for v in values[:4]):
            return (
                "of which only the first four lie in [0, 1]; kpt_shape in the data.yaml says how many key points follow a "
                "box, and --ignore-confidence leaves out a confidence and a track id"
            )
        return "which must lie in [0, 1]; correct them"

    def _compare(self, values: list[float], box: list[float], size: tuple[int, int]) -> None:
        """Whether a box (``values`` in [0, 1]) sticks out by more than a pixel, and would not in other conventions."""
        x, y, w, h = box
        self._boxes += 1
        self._outside += max(-x, -y, x + w - size[1], y + h - size[0]) > 1
        for key in ("xyxy", "xywh"):
            x, y, w, h = CONVENTIONS[key](*values)
            if w == 0 or h == 0:  # a mistake in any convention
                continue
            fits = min(x, y) >= 1 - TOLERANCE and min(w, h) > 0 and max(x + w, y + h) <= TOLERANCE
            (self._fits if fits else self._misfits)[key] += 1

    def refuse_other_conventions(self) -> None:
        """Raises DatasetError if many boxes stick out of their pictures, and hardly any would in another convention."""
        if self.options.boxes is not None or self._boxes < MANY or self._outside <= SUSPICIOUS * self._boxes:
            return
        for key, fits in sorted(self._fits.items(), key=lambda item: self._misfits[item[0]]):
            misfits = self._misfits[key]
            if fits >= FITTING * (fits + misfits) and fits * 2 >= self._boxes and misfits <= MISFITS * self._outside:
                raise DatasetError(
                    f"{self._outside} of {self._boxes} boxes stick out of their pictures when read as cx cy w h, {misfits} "
                    f"as {' '.join(key)}; --boxes {key} reads them so, --boxes cxcywh as they are"
                )


def convert_folders(labels: Path, images: Path, classes: Names, options: Options) -> Conversion:
    """A set of ``images`` whose label files lie at the same place below ``labels``.

    Raises:
        DatasetError: no image, or boxes that follow another convention. What one file has is among the ``faults``.
    """
    tally, faults, pairs = Tally(), [], []
    folders = LabelFolders(tally)
    for image in walk(images, SUFFIXES, tally):
        pairs += _pair(folders, (labels / image).parent, image, images, faults)
    if not pairs and not faults:
        raise DatasetError(
            f"no image in {images} was found; it must hold files that end in {', '.join(SUFFIXES)}{tally}"
        )
    _count_orphans(labels, folders, tally)
    conversion = _convert(pairs, images, [os.path.realpath(labels)], Reader(classes, options, tally), faults)
    return Conversion(*conversion, hint=_hint(labels, images, pairs))


def convert_split(split: Split, classes: Names, options: Options) -> Conversion:
    """A split of a data.yaml; label files are where Ultralytics looks for them, see :func:`yolo_yaml.labels_folder`.

    Images are written relative to the split's folder, or to the folder that all its folders have in common.

    Raises:
        DatasetError: as :func:`convert_folders`.
    """
    tally, faults, pairs = Tally(), [], []
    folders = LabelFolders(tally)
    files = [folder / name for folder in split.folders for name in walk(folder, SUFFIXES, tally)] + split.files
    common = _common(split)
    seen = set()
    if split.moved:
        tally.add(MOVED, split.moved)
    for file in files:
        if (key := os.path.abspath(file)) in seen:
            tally.add(TWICE, file)
            continue
        seen.add(key)
        image = Path(os.path.relpath(file, common)).as_posix()
        pairs += _pair(folders, labels_folder(Path(os.path.abspath(file)).parent), image, common, faults)
    if not pairs and not faults:
        raise DatasetError(f"no image in {', '.join(map(str, split.folders)) or common} was found{tally}")
    for folder in split.folders:
        _count_orphans(labels_folder(Path(os.path.abspath(folder))), folders, tally)
    near = {labels_folder(Path(os.path.abspath(folder))) for folder in (common, *split.folders)} | {split.root}
    conversion = _convert(pairs, common, sorted(map(os.path.realpath, near)), Reader(classes, options, tally), faults)
    return Conversion(*conversion, hint=_hint(labels_folder(Path(os.path.abspath(common))), common, pairs))


def _common(split: Split) -> Path:
    """The folder that images of a split are written relative to."""
    folders = [*split.folders, *(file.parent for file in split.files)]
    try:
        return folders[0] if len(folders) == 1 else Path(os.path.commonpath([os.path.abspath(f) for f in folders]))
    except (ValueError, IndexError):  # two drives, an empty list
        raise DatasetError(
            "the split names no images, or images on two drives; convert its folders one by one"
        ) from None


def _pair(folders: LabelFolders, place_of_labels: Path, image: str, root: Path, faults: list[str]) -> list[Pair]:
    try:
        return [Pair(image, folders.find(place_of_labels, image))]
    except DatasetError as error:
        faults.append(f"{root / image}: {error}")
        return []


def _count_orphans(labels: Path, folders: LabelFolders, tally: Tally) -> None:
    for name in walk(labels, (".txt",), tally) if labels.is_dir() else ():
        if labels / name not in folders.used and not _is_no_label(name):
            tally.add(NO_PICTURE, name)


def _is_no_label(name: str) -> bool:
    stem = Path(name).stem.lower()
    return stem in NO_LABELS or stem.startswith("readme")


def _convert(
    pairs: list[Pair], root: Path, label_roots: list[str], reader: Reader, faults: list[str]
) -> tuple[dict, Path, Tally, list[str]]:
    scenes = read_scenes(_sources(pairs, ImageFolder(root), label_roots, reader), faults, [])
    reader.refuse_other_conventions()
    return coco_content(scenes, reader.names), root, reader.tally, faults


def _sources(
    pairs: list[Pair], folder: ImageFolder, label_roots: list[str], reader: Reader
) -> Iterator[tuple[Path, Callable[[], Scene]]]:
    def _load(pair: Pair) -> Scene:
        size = image_size(folder.find(pair.image))
        if pair.labels is None:
            reader.tally.add(NO_LABEL_FILE, pair.image)
            return Scene(pair.image, size, [])
        check_label_file(pair.labels, label_roots)
        return Scene(pair.image, size, reader.read(pair.labels, size))

    for pair in pairs:
        yield pair.labels or Path(pair.image), lambda pair=pair: _load(pair)


def _hint(labels: Path, images: Path, pairs: list[Pair]) -> str:
    """Where the label files of pictures without one would be found, in words."""
    missing = [images / pair.image for pair in pairs if pair.labels is None][:SAMPLE]
    if not missing:
        return ""
    common = Path(os.path.commonpath([path.parent for path in missing]))
    below = [path.relative_to(common).with_suffix(".txt") for path in missing]
    folder, found = best_folder(labels, lambda folder: sum((folder / file).is_file() for file in below))
    if not found:
        return ""
    which = f"the first {SAMPLE}" if len(missing) == SAMPLE else f"the {len(missing)}"
    return (
        f"{found} of {which} pictures without a label file have one in {folder}: "
        f"yolo {folder} {common} OUT.json --names FILE"
    )
