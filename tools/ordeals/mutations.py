"""Mutated annotation files and images, and what may become of them.

A mutated file is *handled* if it is refused by a DatasetError that names it, or if it is read for what it says. It is
*silent* if something else comes out:

- Annotations: what is read is compared, entry by entry, with what the file says (``json.loads`` of it); boxes that the
  mapper drops or clips must be in its counts. A digit that became another digit is what the file says.
- Images: they must have the size that was annotated. Where the format has check sums (PNG) they must also have the pixels
  that were saved. BMP, PPM, GIF, JPEG, TIFF and WebP have none: a pixel that became another pixel can be told by nobody, and
  is counted as "other pixels".
"""

import copy
import io
import json
import logging
import os
import random
import re
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import DetrDatasetMapper, load_coco_json

SIZE = (20, 30)  # (height, width) of the annotated images
CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 30, "height": 20},
        {"id": 2, "file_name": "b.png", "width": 30, "height": 20},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
        {"id": 4, "image_id": 1, "category_id": 2, "bbox": [0, 0, 30, 20], "area": 600},
        {"id": 5, "image_id": 2, "category_id": 2, "bbox": [5.5, 5, 9, 9], "segmentation": [[1, 2]], "area": 81},
    ],
}
SCRAPS = [None, True, -1, 0, 1.5, 1e999, float("nan"), 10**400, "", "x", "\0", "\ud800", "../a.png", "/", "x" * 5000,
          [], {}, [[]], {"id": 1}, 2, 31, 1e-9, [5, 5, 50, 5], [5, 5, -1, 5], "1", False, 2**63]  # fmt: skip
TWICE = "a key that stood twice"
# The record and the field, or the list, or the place in the text.
NAMED = re.compile(
    r"(image|annotation|category) ('|\"|-?\d|number \d).*"
    r"\b(id|file_name|image_id|category_id|bbox|iscrowd|name|height|width)\b|"
    r"\b(id .{1,200}|ids|names) appears? more than once|has no (images|categories)|must hold an object|"
    r"is not valid JSON: .*|annotations must be a list of objects .* got|image files do not exist|"
    r"lies outside the image folder|image \S+ is \d+x\d+ .* says .*\(width x height\)"
)


def mapper_of(is_train: bool) -> DetrDatasetMapper:
    """A mapper that leaves the image as it is."""
    return DetrDatasetMapper(is_train, image_format="RGB", num_classes=0, flips=[], resizes=[], crops=[])


def mutated_entry(value, draw: random.Random):
    """``value`` with one thing inside it replaced, removed or doubled."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(SCRAPS)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    changed, action = copy.copy(value), draw.random()
    if action < 0.1:
        del changed[key]
    elif action < 0.2 and isinstance(value, list):
        changed.append(value[key])
    else:
        changed[key] = mutated_entry(value[key], draw)
    return changed


def mutated_bytes(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """``data`` with bits flipped, cut off, a piece left out, doubled or taken from ``other``, or a number overwritten."""
    changed, action = bytearray(data), draw.randrange(7)
    head = draw.random() < 0.5
    place = draw.randrange(min(len(data), 64) if head else len(data))
    length = draw.choice((1, 2, 4, 8, 16, len(data) // 4 + 1))
    if action <= 1:
        for _ in range(draw.choice((1, 1, 2, 8))):
            bit = draw.randrange(8 * min(len(data), 64) if head else 8 * len(data))
            changed[bit // 8] ^= 1 << bit % 8
    elif action == 2:
        del changed[draw.randrange(len(data)) :]
    elif action == 3:
        del changed[place : place + length]
    elif action == 4:
        changed[place:place] = data[place : place + length]
    elif action == 5:
        start = draw.randrange(len(other))
        changed[place : place + length] = other[start : start + length]
    else:  # what stands for a length or a count
        number = draw.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, draw.getrandbits(32)))
        form = draw.choice(("<I", ">I", "<H", ">H"))
        changed[place : place + struct.calcsize(form)] = struct.pack(
            form, number & (2 ** (8 * struct.calcsize(form)) - 1)
        )
    return bytes(changed)


def annotation_cases(seed: int) -> Callable[[Path], Callable[[int], str]]:
    """Half of the cases change an entry, half the bytes of the file; see ``cases.run_cases``."""

    def make(home: Path) -> Callable[[int], str]:
        logging.disable(logging.CRITICAL)
        for name in ("a.png", "b.png"):
            Image.new("RGB", SIZE[::-1]).save(home / name)
        path, whole = home / "set.json", json.dumps(CONTENT).encode()

        def case(number: int) -> str:
            draw = random.Random(f"annotations {seed} {number}")
            if number % 2:
                path.write_bytes(mutated_bytes(whole, draw, whole))
            else:
                path.write_text(json.dumps(mutated_entry(CONTENT, draw)))
            try:
                return read_annotations(path)
            except DatasetError as error:
                named = any(name in str(error) for name in ("set.json", "a.png", "b.png")) and NAMED.search(str(error))
                return "refused by name" if named else f"WRONG not named: {str(error)[:300]!r}"
            except Exception as error:
                return f"WRONG {error!r:.300}"

        return case

    return make


def read_annotations(path: Path) -> str:
    """Reads a file as a training does; a word for how it ended."""
    records = load_coco_json(path, path.parent)
    content = json.loads(path.read_bytes(), object_pairs_hook=_all_pairs)
    told = sorted(repr(entry) for entry in _told(content))
    read = sorted(repr(entry) for entry in _read(records, content))
    if told != read or len(records) != len(content["images"]):
        return f"WRONG read as {read}, but it says {told}"[:1600]
    repaired = False
    for record in records:
        mapper = mapper_of(True)
        wanted = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        kept = mapper(record)["instances"]
        counts = mapper.check_box.counts
        dropped = sum(n for kind, n in counts.items() if kind.startswith("dropped"))
        if len(kept) + dropped != len(wanted):
            return f"WRONG {len(kept)} boxes kept and {dropped} dropped of {wanted}"
        for box, row in zip(kept.gt_boxes.tensor.tolist(), kept.gt_index.tolist(), strict=True):
            x, y, w, h = record["annotations"][row]["bbox"]
            reach = max(abs(a - b) for a, b in zip(box, (x, y, x + w, y + h), strict=True))
            if reach > 1.001 and not any(kind.startswith("clipped") for kind in counts):
                return f"WRONG {[x, y, w, h]} became {box} in silence"
        repaired = repaired or bool(counts)
    return "read, bad boxes counted" if repaired else "read for what it says"


def _all_pairs(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        found[TWICE] = [pairs]  # so that it is not equal to what is read
    return found


def _told(content: dict):
    """What the file says of each annotation and image."""
    for image in content["images"]:
        yield "image", image["id"], image["file_name"], image.get("height"), image.get("width"), TWICE in image
    for entry in content["annotations"]:
        box = [
            float(x) if abs(x) < 1e308 else float("inf") * (1 if x > 0 else -1) if x == x else x for x in entry["bbox"]
        ]
        doubled = TWICE in entry
        yield entry["id"], entry["image_id"], entry["category_id"], box, bool(entry.get("iscrowd", 0)), doubled


def _read(records: list[dict], content: dict):
    """The same of what was read."""
    categories = sorted((c["id"] for c in content["categories"]), key=lambda x: (isinstance(x, str), x))
    for record in records:
        name = os.path.relpath(record["file_name"], Path(record["file_name"]).parent)
        yield "image", record["image_id"], name, record.get("height"), record.get("width"), False
        for entry in record["annotations"]:
            category = categories[entry["category_id"]]
            yield entry["id"], record["image_id"], category, entry["bbox"], bool(entry["iscrowd"]), False


def base_images() -> list[tuple[str, bytes]]:
    """(format, bytes) of small valid images of all formats that a training reads."""
    noise = np.random.default_rng(0).integers(0, 256, (14, 18, 3), np.uint8)
    noise[:7] = np.linspace(0, 255, 18, dtype=np.uint8)[:, None]
    colours, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    modes = {mode: colours.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK")}
    wanted = [
        *(("PNG", mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")),
        *(("PNG", "RGB", {"exif": exif}), ("PNG", "RGB", {"compress_level": 0})),
        *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
        *(("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"exif": exif, "quality": 95})),
        *(("BMP", mode, {}) for mode in ("RGB", "L", "P", "1")),
        *(("GIF", "P", {}), ("GIF", "L", {}), ("GIF", "P", {"save_all": True, "append_images": [modes["P"]]})),
        *(("PPM", mode, {}) for mode in ("RGB", "L", "1")),
        *(("TIFF", mode, {}) for mode in ("RGB", "L", "CMYK", "1", "P")),
        *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(("TIFF", "1", {"compression": "group4"}), ("TIFF", "RGB", {"exif": exif})),
        *(("WEBP", "RGB", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {})),
    ]
    made = []
    for name, mode, options in wanted:
        file = io.BytesIO()
        modes[mode].save(file, name, **options)
        made.append((name, file.getvalue()))
    return made


def image_cases(seed: int) -> Callable[[Path], Callable[[int], str]]:
    """Each case is one mutation of one image of :func:`base_images`; see ``cases.run_cases``."""

    def make(home: Path) -> Callable[[int], str]:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff speaks
        images, path, mapper = base_images(), home / "image.bin", mapper_of(False)
        pixels = []
        for _, data in images:
            path.write_bytes(data)
            pixels.append(mapper({"file_name": str(path)})["image"])

        def case(number: int) -> str:
            draw, place = random.Random(f"images {seed} {number}"), number % len(images)
            (name, data), wanted = images[place], pixels[place]
            path.write_bytes(mutated_bytes(data, draw, draw.choice(images)[1]))
            record = {"file_name": str(path), "height": wanted.shape[1], "width": wanted.shape[2]}
            try:
                found = mapper(record)["image"]
            except DatasetError as error:
                return f"{name} refused by name" if "image.bin" in str(error) else f"WRONG not named: {error}"
            except Exception as error:
                return f"WRONG {name} {error!r:.300}"
            if found.equal(wanted):
                return f"{name} same pixels"
            return "WRONG PNG read with other pixels" if name == "PNG" else f"{name} other pixels"

        return case

    return make
