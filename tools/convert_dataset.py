#!/usr/bin/env python3
"""Writes a data set in YOLO's or Pascal VOC's format as COCO json, for DATASETS.COCO_JSON.

    python tools/convert_dataset.py yolo labels/train images/train train.json --names data.yaml
    python tools/convert_dataset.py voc Annotations JPEGImages train.json [--names classes.txt] [--zero-based]

One .txt or .xml a picture. YOLO: every image below the image folder, a missing .txt means no objects; lines are
"class cx cy w h" in [0, 1]. VOC: every .xml; corners are 1-based and inclusive unless --zero-based, objects marked
"difficult" are kept. Every file that cannot be used is named in a sentence of its own; then nothing is written (code 1).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.data.images import ImageFolder, image_size

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity: no file is fetched and no text multiplied."""

    def doctype(self, name, pubid, system):
        """Called by the parser where a document type begins."""
        raise DatasetError("it has a document type (<!DOCTYPE>), which is not read; take it out")


def read_names(path: Path) -> list[str]:
    """Class names from ``names`` of a data.yaml, a list or {index: name}, or from a text file with one a line.

    Raises:
        DatasetError: the file cannot be read, or the names are none, doubled or not numbered 0 .. P-1.
    """
    try:
        text = path.read_text()
        names = text.split("\n") if path.suffix not in (".yaml", ".yml") else dict(yaml.safe_load(text))["names"]
        if isinstance(names, dict):
            names = [names[i] for i in range(len(names))]
        names = [str(name).strip() for name in names]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} holds no class names: {' '.join(str(error).split())}") from None
    while names and not names[-1]:
        names.pop()
    if not names or len(set(names)) < len(names) or "" in names:
        raise DatasetError(f"{path} must name each class once, without empty lines between them, got {names[:10]}")
    return names


def read_yolo(file: Path, size: tuple[int, int], names: list[str]) -> list[tuple[str, list[float]]]:
    """(class name, [x, y, width, height] in pixels) of a label file; raises DatasetError or ValueError."""
    height, width = size
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 5:
            raise DatasetError(f"line {number} has {len(fields)} fields, it must be: class cx cy w h")
        label, (cx, cy, w, h) = int(fields[0]), map(float, fields[1:])
        if not 0 <= label < len(names):
            raise DatasetError(f"line {number} has class {label}, but there are {len(names)} class names")
        if not all(map(math.isfinite, (cx, cy, w, h))) or min(w, h) <= 0 or max(cx, cy, w, h) > 1.5:
            raise DatasetError(f"line {number} has the box {fields[1:]}, it must lie in [0, 1] with a positive size")
        found.append((names[label], [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]))
    return found


def read_voc(file: Path, first: int) -> tuple[str, list[tuple[str, list[float]]]]:
    """(image file, objects as of :func:`read_yolo`) of an .xml whose first pixel has the coordinate ``first``."""
    root = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=NoDoctype()))
    found = []
    for number, thing in enumerate(root.iter("object"), 1):
        name, box = thing.findtext("name", "").strip(), thing.find("bndbox")
        corners = (
            [float(box.findtext(key, "nan")) for key in ("xmin", "ymin", "xmax", "ymax")] if box is not None else []
        )
        if not name or len(corners) != 4 or not all(map(math.isfinite, corners)):
            raise DatasetError(
                f"object {number} needs a name and a bndbox with four numbers, got {name!r} and {corners}"
            )
        x0, y0, x1, y1 = corners
        size = [x1 - x0 + first, y1 - y0 + first]  # 1-based corners are inclusive
        if min(size) <= 0:
            raise DatasetError(f"object {number} ({name}) has no positive width and height: {corners}")
        found.append((name, [x0 - first, y0 - first, *size]))
    return root.findtext("filename", "").strip(), found


def scenes(args: argparse.Namespace, names: list[str]):
    """Yields (label file, function that returns its image file, size and objects) of the whole data set."""
    folder = ImageFolder(args.images)

    def yolo(image, labels):
        size = image_size(folder.find(image))
        return image, size, read_yolo(labels, size, names) if labels.is_file() else []

    def voc(labels):
        if not labels.is_file():
            raise DatasetError("it is no regular file")
        image, found = read_voc(labels, int(not args.zero_based))
        return image, image_size(folder.find(image)), found

    if args.format == "voc":
        for labels in sorted(Path(args.labels).glob("*.xml")):
            yield labels, lambda labels=labels: voc(labels)
        return
    for path in sorted(x for x in Path(args.images).rglob("*") if x.suffix.lower() in SUFFIXES):
        image = path.relative_to(args.images)
        labels = (Path(args.labels) / image).with_suffix(".txt")
        yield labels, lambda image=str(image), labels=labels: yolo(image, labels)


def convert(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """(content in COCO format, a sentence for each file that cannot be used)."""
    names, images, objects, faults = read_names(Path(args.names)) if args.names else [], [], [], []
    for file, load in scenes(args, names):
        try:
            image, (height, width), found = load()
            if strangers := {name for name, _ in found} - set(names or (name for name, _ in found)):
                raise DatasetError(f"it has the classes {sorted(strangers)}, which --names does not list")
        except (DatasetError, ValueError, OSError, ElementTree.ParseError) as error:
            faults.append(f"{file}: {' '.join(str(error).split())}")
            continue
        images.append({"id": len(images) + 1, "file_name": image, "height": height, "width": width})
        objects += [(len(images), name, box) for name, box in found]
    if not images and not faults:
        raise DatasetError(
            f"no {'.xml in ' + args.labels if args.format == 'voc' else 'image in ' + args.images} was found"
        )
    categories = {name: i for i, name in enumerate(names or sorted({name for _, name, _ in objects}), 1)}
    annotations = [
        {
            "id": i,
            "image_id": image,
            "category_id": categories[name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, (image, name, box) in enumerate(objects, 1)
    ]
    listed = [{"id": i, "name": name} for name, i in categories.items()]
    return {"images": images, "annotations": annotations, "categories": listed}, faults


def run(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=("yolo", "voc"))
    parser.add_argument("labels", metavar="LABELS", help="folder with .txt or .xml files")
    parser.add_argument("images", metavar="IMAGES", help="image folder")
    parser.add_argument("output", metavar="OUT.json", help="written in COCO format")
    parser.add_argument("--names", metavar="FILE", help="data.yaml, or classes.txt with a name a line; YOLO needs it")
    parser.add_argument("--zero-based", action="store_true", help="VOC corners start at 0 and xmax is not inclusive")
    args = parser.parse_args(argv)
    try:
        if args.format == "yolo" and not args.names:
            raise UserError("yolo needs --names data.yaml or classes.txt: its labels are numbers")
        for folder in (args.labels, args.images):
            if not Path(folder).is_dir():
                raise DatasetError(f"folder {folder} does not exist")
        content, faults = convert(args)
        if not faults:
            Path(args.output).write_text(json.dumps(content))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"error: {fault}" for fault in faults), end="\n" * bool(faults), file=sys.stderr)
    counts = (
        f"{len(content['images'])} images, {len(content['annotations'])} boxes, {len(content['categories'])} classes"
    )
    print(f"{counts}; {f'{len(faults)} bad files, nothing written' if faults else f'written: {args.output}'}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(run())
