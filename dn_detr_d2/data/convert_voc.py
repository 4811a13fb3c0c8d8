"""Pascal VOC annotations: one .xml a picture, with absolute corners that are 1-based and inclusive.

As the exporters of LabelImg, Roboflow, CVAT and Label Studio write them: <filename> may be missing or wrong, <size> may be
0x0, corners may be fractions and in the wrong order, a polygon may stand in the place of a box, tags in any case. Some write
[x, y, width, height] or a centre under the names of the corners.
"""

import contextlib
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from ..errors import DatasetError
from .conventions import fits, to_xywh
from .convert import Conversion, Scene, Thing, bounding_box, coco_content, place, read_scenes
from .images import ImageFolder, image_size
from .label_files import SUFFIXES, Tally, best_folder, check_label_file, normal, number, walk

CORNERS = ("xmin", "ymin", "xmax", "ymax")
CONVENTIONS = {"xywh": "[x, y, width, height]", "cxcywh": "[cx, cy, width, height]"}  # under the names of the corners
MIN_SWAPPED, SHARE_SWAPPED = 3, 0.25  # boxes in the wrong order, up to which they are slips
SHARE_FITTING = 0.95  # of the boxes that must lie in their pictures by another convention
ENCODING = re.compile(rb"""^\s*<\?xml[^>]*\bencoding\s*=\s*["']([\w.-]+)""")
LINE = " line"  # an attribute that no file can have: the line where an element begins

NO_PICTURE = "label files without a picture, left out"
NO_XML = "pictures without an .xml, left out"
BY_STEM = "pictures found by the name of the .xml, because <filename> is missing or names none"
ALIKE = "pictures that <filename> names with another folder or ending, or without"
CROSSED = "pictures found by the name of the .xml, because <filename> names the picture of another .xml"
BY_FILENAME = "pictures found by <filename>, though the .xml has the name of another picture"
SWAPPED = "boxes with corners in the wrong order, put in order"
NO_SIZE = "files without a <size>, or with 0, not compared with the picture"
BELOW_ONE = "objects with a corner below 1, which 1-based corners never are; if yours begin at 0, give --zero-based"
DIFFICULT = "objects marked difficult, kept"
POLYGONS = "polygons, kept as segmentation"
POLYGON_BOXES = "objects without a bndbox, whose box is that of their polygon"


@dataclass(frozen=True)
class Options:
    """``zero_based``: corners begin at 0 and xmax is not inclusive. ``match``: "auto", "stem" or "filename" finds pictures.
    ``wrong_size``: "refuse", "ignore" or "scale" where <size> is not the picture's. ``corners``: what a box's numbers
    are, "swapped", "xywh" or "cxcywh"; "" is corners, and refuses boxes of which many are in the wrong order. ``listed``:
    names of the .xml files to read, without ending; None = all."""

    zero_based: bool = False
    match: str = "auto"
    wrong_size: str = "refuse"
    corners: str = ""
    listed: frozenset[str] | None = None


@dataclass(frozen=True)
class Annotation:
    """What an .xml says: ``corners`` [x0, y0, x1, y1] and ``polygons`` in the file's coordinates, with names and lines.

    ``written`` says which corners are those of a <bndbox>, not of a polygon."""

    filename: str
    size: tuple[int, int] | None
    names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    corners: list[list[float]] = field(default_factory=list)
    polygons: list[list[float]] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root of a document without a document type, so that no entity is read.

    Elements have their line in ``LINE``, and their tags are in lower case.

    Raises:
        DatasetError: the text is no XML, or has a document type.
    """
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True

    def _refuse(*_):
        raise DatasetError(
            f"line {parser.CurrentLineNumber} has a document type (<!DOCTYPE>), which is not read; take it out"
        )

    parser.StartDoctypeDeclHandler = _refuse
    parser.StartElementHandler = lambda name, keys: builder.start(
        name.lower(), keys | {LINE: str(parser.CurrentLineNumber)}
    )
    parser.EndElementHandler = lambda name: builder.end(name.lower())
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DatasetError(
            f"line {error.lineno} is no XML: {expat.ErrorString(error.code)}{_encoding_hint(data)}"
        ) from None
    except (LookupError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"line 1 names an encoding that is not known: {error}; save the file as UTF-8") from None
    return builder.close()


def _encoding_hint(data: bytes) -> str:
    """The way out for bytes that are not in UTF-8, though the first line of the file does not say so."""
    declared = ENCODING.match(data)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (declared and declared[1].lower() not in (b"utf-8", b"utf8")):
        return ""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return (
            "; it is not in UTF-8, as which it is read: save it as UTF-8, or let it begin with its encoding, as in "
            '<?xml version="1.0" encoding="ISO-8859-1"?>'
        )
    return ""


def read_voc(data: bytes, tally: Tally, where: str) -> Annotation:
    """What an .xml says; objects that cannot be read raise DatasetError with their line."""
    root = parse_xml(data)
    things = list(root.iter("object"))
    if root.tag != "annotation" and not things and root.find("filename") is None:
        raise DatasetError(f"line {root.get(LINE)} begins with <{root.tag}>, not with <annotation>; it is no VOC file")
    annotation = Annotation(_text(root, "filename"), _size(root))
    for thing in things:
        line, name = int(thing.get(LINE)), " ".join(_text(thing, "name").split())
        polygon = _polygon(thing)
        box = thing.find("bndbox")
        try:
            corners = [number(_text(box, key)) for key in CORNERS] if box is not None else []
        except ValueError as error:
            raise DatasetError(f"line {line}: the bndbox of the object {name!r:.60} has {error}") from None
        written = bool(corners)
        if not corners and polygon:
            tally.add(POLYGON_BOXES, f"{where} line {line}")
            x, y, w, h = bounding_box(polygon)
            corners = [x, y, x + w, y + h]
        if not name or not corners:
            raise DatasetError(
                f"line {line}: an object needs a name and a bndbox or polygon, got the name {name!r:.60} and "
                f"{[child.tag for child in thing]}"
            )
        if _text(thing, "difficult").lower() in ("1", "true", "yes"):
            tally.add(DIFFICULT, f"{where} line {line}")
        for values, value in zip(
            (annotation.names, annotation.lines, annotation.corners, annotation.polygons, annotation.written),
            (name, line, corners, polygon, written),
            strict=True,
        ):
            values.append(value)
    return annotation


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width), None where it is missing or 0."""
    texts = [_text(root, f"size/{key}") for key in ("height", "width")]
    try:
        height, width = (number(text) if text else 0 for text in texts)
    except ValueError as error:
        raise DatasetError(
            f"line {root.find('size').get(LINE)}: <size> has {error}; correct it or take it out"
        ) from None
    return (round(height), round(width)) if min(height, width) > 0 else None


def _polygon(thing: ElementTree.Element) -> list[float]:
    """[x, y, x, y, ...] of <polygon> with <x1>, <y1>, <x2> ... or with <pt><x/><y/></pt>; [] if there is none."""
    polygon = thing.find("polygon")
    if polygon is None:
        return []
    points = polygon.findall("pt") or polygon.findall("point")
    pairs = [(_text(point, "x"), _text(point, "y")) for point in points]
    for i in range(1, len(polygon) // 2 + 1) if not points else ():
        pairs.append((_text(polygon, f"x{i}"), _text(polygon, f"y{i}")))
    try:
        values = [number(text) for pair in pairs for text in pair]
    except ValueError as error:
        raise DatasetError(f"line {polygon.get(LINE)}: a polygon has {error}") from None
    return values if len(values) >= 6 else []


def _parent(file: str) -> str:
    """The folder of a relative path, "" if there is none."""
    return file.rpartition("/")[0]


class Pictures:
    """Finds pictures by what an .xml says, among ``files`` relative to ``folder``."""

    def __init__(self, folder: ImageFolder, files: list[str]):
        self._folder = folder
        self._paths = {normal(file): file for file in files}
        self._names, self._stems = defaultdict(list), defaultdict(list)
        for file in files:
            path = PurePosixPath(normal(file))
            self._names[path.name].append(file)
            self._stems[path.stem].append(file)

    def by_filename(self, filename: str, parent: str) -> str | None:
        """The picture that <filename> of an .xml in the folder ``parent`` names, None if it names none.

        Looked for as it is written, then by its last part, in ``parent`` first, there also with another ending.

        Raises:
            DatasetError: several pictures fit.
        """
        if not filename:
            return None
        name = PurePosixPath(normal(filename.replace("\\", "/")))
        stem = name.stem if name.suffix.lower() in SUFFIXES else name.name
        for path in (
            PurePosixPath(parent, name),
            name if len(name.parts) > 1 else None,
            PurePosixPath(parent, name.name),
        ):
            if str(path) in self._paths:
                return self._paths[str(path)]
        beside = [file for file in self._stems.get(stem, []) if _parent(file) == parent]
        if found := self._only(beside or self._names.get(name.name, []), parent, filename):
            return found
        return filename if self._is_file(filename) else self.by_stem(stem, parent)

    def by_stem(self, stem: str, parent: str) -> str | None:
        """The picture called ``stem``, in ``parent`` first; raises DatasetError if there are several."""
        return self._only(self._stems.get(normal(stem), []), parent, stem)

    def alike(self, stem: str, parent: str) -> list[str]:
        """The pictures called ``stem``: those in ``parent``, or else all."""
        files = self._stems.get(normal(stem), [])
        return [file for file in files if _parent(file) == parent] or files

    def _is_file(self, filename: str) -> bool:
        try:
            self._folder.find(filename)
        except DatasetError:
            return False
        return not os.path.isabs(filename)

    @staticmethod
    def _only(files: list[str], parent: str, name: str) -> str | None:
        files = [file for file in files if _parent(file) == parent] or files
        if len(files) > 1:
            raise DatasetError(
                f"the pictures {files[0]} and {files[1]} fit the name {name!r:.200}; write the path of the right one into "
                "<filename>"
            )
        return files[0] if files else None


def convert_voc(labels: Path, images: Path, names: list[str], options: Options) -> Conversion:
    """Every .xml below ``labels``, with its picture below ``images``; ``names`` are the classes, [] = those that occur.

    Raises:
        DatasetError: no .xml, corners that are not in pixels, or boxes that seem to be no corners. What one
            file has is among the ``faults``.
    """
    tally, faults = Tally(), []
    files = walk(labels, (".xml",), tally)
    if not files:
        raise DatasetError(f"no .xml in {labels} was found{tally}")
    wanted = options.listed
    if wanted is not None:
        files = [file for file in files if PurePosixPath(file).stem in wanted]
        if lacking := sorted(wanted - {PurePosixPath(file).stem for file in files}):
            raise DatasetError(
                f"{len(lacking)} of {len(wanted)} listed names have no .xml in {labels}, first {lacking[0]!r}"
            )
    folder, real = ImageFolder(images), [os.path.realpath(labels)]
    found = walk(images, SUFFIXES, tally if os.path.realpath(images) != real[0] else Tally())
    annotations = {}
    for file in files:
        try:
            check_label_file(labels / file, real)
            annotations[file] = read_voc((labels / file).read_bytes(), tally, file)
        except (DatasetError, OSError) as error:
            faults.append(f"{labels / file}: {error}")
    _refuse_normalised(annotations)
    pictures = Pictures(folder, found)
    claims = _claims(annotations, pictures, options.match, tally, faults, labels)
    if not options.corners:
        _refuse_other_conventions(annotations, claims, folder, options)
    bad = [PurePosixPath(file) for file in files if file not in annotations]  # each is a fault, so has its sentence
    theirs = {picture for path in bad for picture in pictures.alike(path.stem, _parent(str(path)))}
    for picture in sorted(set(found) - set(claims) - theirs):
        if wanted is None or PurePosixPath(picture).stem in wanted:
            tally.add(NO_XML, picture)
    sources = (
        (
            labels / file,
            lambda file=file, picture=picture: _scene(file, annotations[file], picture, folder, options, tally),
        )
        for picture, [file, *others] in sorted(claims.items())
        if not others
    )
    scenes = read_scenes(sources, faults, names)
    return Conversion(coco_content(scenes, names), images, tally, faults, _hint(images, files) if not claims else "")


def _refuse_normalised(annotations: dict[str, Annotation]) -> None:
    values = [v for annotation in annotations.values() for corners in annotation.corners for v in corners]
    if values and min(values) >= 0 and max(values) <= 1 and any(v != int(v) for v in values):
        raise DatasetError(
            "all corners lie in [0, 1], so they are parts of the width and the height; VOC's are pixels: multiply them by "
            "the size of the picture, and give --zero-based"
        )


def _refuse_other_conventions(
    annotations: dict[str, Annotation], claims: dict[str, list[str]], folder: ImageFolder, told: Options
) -> None:
    """Many boxes in the wrong order are no slips, if all would fit as a position with width and height."""
    first, boxes, sizes = int(not told.zero_based), [], []
    for picture, [file, *_] in claims.items():
        annotation = annotations[file]
        found = [c for c, written in zip(annotation.corners, annotation.written, strict=True) if written]
        boxes += found
        sizes += [(picture, annotation.size)] * len(found)
    swapped = [corners for corners in boxes if _is_swapped(corners, first)]
    if len(swapped) < MIN_SWAPPED or len(swapped) <= SHARE_SWAPPED * len(boxes):
        return
    known = {}
    for picture, said in set(sizes):
        with contextlib.suppress(DatasetError, OSError):  # reading the picture raises it again
            size = image_size(folder.find(picture))
            known[picture, said] = said if said and told.wrong_size == "scale" else size
    rows = [i for i, key in enumerate(sizes) if key in known]
    shapes = np.array([known[sizes[i]] for i in rows], np.float64).reshape(-1, 2)
    values = np.array([boxes[i] for i in rows], np.float64).reshape(-1, 4)
    values[:, :2] -= first
    fitting = [x for x in CONVENTIONS if rows and fits(to_xywh(values, shapes, x), shapes).mean() >= SHARE_FITTING]
    if fitting:
        words, options = " or ".join(CONVENTIONS[x] for x in fitting), " or --corners ".join(fitting)
        raise DatasetError(
            f"{len(swapped)} of {len(boxes)} boxes have xmax below xmin or ymax below ymin, first {swapped[0]}, and as "
            f"{words} they fit their pictures; say what they are with --corners {options}, or, if they are "
            "corners in the wrong order, with --corners swapped"
        )


def _claims(
    annotations: dict[str, Annotation],
    pictures: Pictures,
    match: str,
    tally: Tally,
    faults: list[str],
    labels: Path,
) -> dict[str, list[str]]:
    """{picture: its .xml}; two .xml of one picture, and names that fit several pictures, are faults.

    ``annotations`` loses the latter.
    """
    named, own = {}, {}
    for file, annotation in list(annotations.items()):
        path, parent = PurePosixPath(file), _parent(file)
        try:
            named[file] = pictures.by_filename(annotation.filename, parent) if match != "stem" else None
            own[file] = _own(pictures, path.stem, parent, named[file]) if match != "filename" else None
        except DatasetError as error:
            named.pop(file, None)
            del annotations[file]
            faults.append(f"{labels / file}: {error}")
    counts, owners = Counter(named.values()), set(own.values())
    claims = defaultdict(list)
    for file, by_filename in named.items():
        picture, kind = _decide(by_filename, own[file], counts[by_filename] == 1 and by_filename in owners)
        if (kind and match == "auto") or kind == NO_PICTURE:
            tally.add(kind, file)
        if picture is None:
            continue
        claims[picture].append(file)
        if picture == by_filename and annotations[file].filename not in (picture, PurePosixPath(picture).name):
            tally.add(ALIKE, file)
    for picture, claiming in claims.items():
        if len(claiming) > 1:
            differ = match == "auto" and len({own[file] for file in claiming} - {None}) == len(claiming)
            way_out = "correct <filename>, or find pictures by the names of the .xml with --match stem"
            faults.append(
                f"{labels / claiming[1]}: its picture is {picture}, as that of {labels / claiming[0]}; "
                + (way_out if differ else "correct <filename> or take one of them away")
            )
    return claims


def _own(pictures: Pictures, stem: str, parent: str, named: str | None) -> str | None:
    """The picture that has the name of the .xml; where <filename> is enough, several are none."""
    try:
        return pictures.by_stem(stem, parent)
    except DatasetError:
        if named is None:
            raise
        return None


def _decide(by_filename: str | None, own: str | None, taken: bool) -> tuple[str | None, str]:
    """(picture, what is counted): by <filename>, unless that names the picture of another .xml and this has its own."""
    if by_filename is None:
        return own, BY_STEM if own is not None else NO_PICTURE
    if own is None or own == by_filename:
        return by_filename, ""
    return (own, CROSSED) if taken else (by_filename, BY_FILENAME)


def _scene(
    file: str, annotation: Annotation, picture: str, folder: ImageFolder, options: Options, tally: Tally
) -> Scene:
    size = image_size(folder.find(picture))
    scale = _scale(annotation.size, size, options.wrong_size)
    if annotation.size is None:
        tally.add(NO_SIZE, file)
    first, things = int(not options.zero_based), []
    for name, line, corners, polygon, written in zip(
        annotation.names, annotation.lines, annotation.corners, annotation.polygons, annotation.written, strict=True
    ):
        where = f"{file} line {line}"
        box = _box(corners, first, options.corners if written else "", tally, where)
        inner = [value - first / 2 for value in polygon]  # the middle of a pixel
        thing = place(Thing(name, _scaled(box, scale), _scaled(inner, scale)), size, tally, where)
        if thing is not None:
            things.append(thing)
            if polygon:
                tally.add(POLYGONS, where)
    return Scene(picture, size, things)


def _box(corners: list[float], first: int, convention: str, tally: Tally, where: str) -> list[float]:
    """[x, y, width, height] of corners, of which the second is inclusive if ``first`` is 1, or of one of CONVENTIONS."""
    x0, y0, x1, y1 = corners
    if min(corners[:2] if convention in CONVENTIONS else corners) < first:
        tally.add(BELOW_ONE, where)
    if convention in CONVENTIONS:
        half = 0.5 if convention == "cxcywh" else 0
        return [x0 - first - half * x1, y0 - first - half * y1, x1, y1]
    if _is_swapped(corners, first):
        tally.add(SWAPPED, where)
        x0, x1 = sorted((x0, x1)) if x1 - x0 + first < 0 else (x0, x1)
        y0, y1 = sorted((y0, y1)) if y1 - y0 + first < 0 else (y0, y1)
    return [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]  # 1-based corners are inclusive


def _is_swapped(corners: list[float], first: int) -> bool:
    x0, y0, x1, y1 = corners
    return x1 - x0 + first < 0 or y1 - y0 + first < 0


def _scaled(values: list[float], scale: tuple[float, float]) -> list[float]:
    return values if scale == (1, 1) else [value * scale[i % 2] for i, value in enumerate(values)]


def _scale(said: tuple[int, int] | None, size: tuple[int, int], wrong_size: str) -> tuple[float, float]:
    """(x, y) factors from the file's pixels to the picture's; raises DatasetError if <size> is wrong and that is refused."""
    if said is None or said == size or wrong_size == "ignore":
        return 1, 1
    if wrong_size == "scale":
        return size[1] / said[1], size[0] / said[0]
    turned = (
        ", the same turned, so the file was perhaps labelled without its EXIF orientation" if said == size[::-1] else ""
    )
    raise DatasetError(
        f"<size> says {said[1]}x{said[0]} pixels, but the picture has {size[1]}x{size[0]}{turned}; if the boxes fit the "
        "picture, --wrong-size ignore reads them; if it was resized, --wrong-size scale"
    )


def _hint(images: Path, files: list[str]) -> str:
    """Where pictures with the names of ``files`` lie, in words."""
    stems = {PurePosixPath(file).stem for file in files}

    def _score(folder: Path) -> int:
        names = (name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES))
        return sum(os.path.splitext(name)[0] in stems for name in names)

    folder, found = best_folder(images, _score)
    return f"{found} pictures with the names of the .xml lie in {folder}; give that folder as IMAGES" if found else ""
