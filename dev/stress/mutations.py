"""Mutated annotation files and images, and what may become of them.

A mutated file is *handled* if it is refused by a DatasetError that names it, or if it is read for what it says. It is
*silent* if something else comes out:

- Annotations: what is read is compared, entry by entry, with what the file says by docs/datasets.md: :func:`_expected` reads
  ``json.loads`` of it, without the reader's code. What the reader leaves out must be what may be left out, and counted in
  its log; boxes that the mapper drops or clips must be in its counts. A digit that became another digit is what the file
  says.
- Images: they must have the size that was annotated. Where the format has check sums (PNG) they must also have the pixels
  that were saved. BMP, PPM, GIF, JPEG, TIFF and WebP have none: a changed pixel cannot be detected, and is counted as
  "other pixels".
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
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import DetrDatasetMapper
from dn_detr_d2.data.coco_custom import load_with_categories

SIZE = (20, 30)  # (height, width) of the annotated images
CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 30, "height": 20},
        {"id": 2, "file_name": "b.png", "width": 30, "height": 20},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 7, "name": "owl"}],
    "annotations": [
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
        {"id": 4, "image_id": 1, "category_id": 2, "bbox": [0, 0, 30, 20], "area": 600},
        {"id": 5, "image_id": 2, "category_id": 2, "bbox": [5.5, 5, 9, 9], "segmentation": [[1, 2]], "area": 81},
    ],
}
NUMBERS = [True, False, -1, 0, 2, 31, 2**63, 10**400, 0.0, -0.0, 1.0, 1.5, 2.0, 1e-9, 1e999, float("nan")]
TEXTS = ["", "x", "1", "cat", "\0", "\ud800", "/", "../a.png", "._a.png", "x" * 5000]
SCRAPS = [None, *NUMBERS, *TEXTS, [], [[]], [5, 5, 50, 5], [5, 5, -1, 5], {}, {"id": 1}]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PAIR = re.compile(r'"\w+": [^][{},]+')  # of a key and a number or a text
LEFT_OUT = re.compile(r"set\.json: (\d+) x (annotation|category|macOS)")  # in the log
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
    """``value`` with one thing inside it replaced, removed, doubled or made text."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice([*SCRAPS, *[str(value)] * 4])
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


def mutated_text(text: str, draw: random.Random) -> bytes:
    """``text`` in UTF-8, now and then with a byte order mark, or with a key that stands twice, with one value or two."""
    pairs = list(PAIR.finditer(text)) if draw.random() < 0.05 else ()
    if pairs:
        first, second = draw.choice(pairs), draw.choice(pairs)
        value = first[0] if draw.random() < 0.5 else first[0].split(":")[0] + ":" + second[0].split(":", 1)[1]
        text = text[: first.end()] + ", " + value + text[first.end() :]
    mark = BYTE_ORDER_MARK if draw.random() < 0.02 else b""
    return mark + text.encode()


class _Log(logging.Handler):
    """Keeps the messages."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record: logging.LogRecord):
        self.lines.append(record.getMessage())

    def left_out(self) -> Counter:
        """{"annotation", "category" or "macOS": how many the reader says that it left out}."""
        found = (LEFT_OUT.search(line) for line in self.lines)
        return Counter({match[2]: int(match[1]) for match in found if match})


def annotation_cases(seed: int) -> Callable[[Path], Callable[[int], str]]:
    """Half of the cases change an entry, half the bytes of the file; see ``cases.run_cases``."""

    def make(home: Path) -> Callable[[int], str]:
        log = _Log()
        logging.getLogger().handlers = [log]
        logging.getLogger("dn_detr_d2").setLevel(logging.INFO)
        for name in ("a.png", "b.png"):
            Image.new("RGB", SIZE[::-1]).save(home / name)
        path, whole = home / "set.json", json.dumps(CONTENT).encode()

        def case(number: int) -> str:
            draw = random.Random(f"annotations {seed} {number}")
            if number % 2:
                path.write_bytes(mutated_bytes(whole, draw, whole))
            else:
                path.write_bytes(mutated_text(json.dumps(mutated_entry(CONTENT, draw)), draw))
            log.lines.clear()
            try:
                return read_annotations(path, log)
            except DatasetError as error:
                named = any(name in str(error) for name in ("set.json", "a.png", "b.png")) and NAMED.search(str(error))
                return "refused by name" if named else f"WRONG not named: {str(error)[:300]!r}"
            except Exception as error:
                return f"WRONG {error!r:.300}"

        return case

    return make


def read_annotations(path: Path, log: _Log) -> str:
    """Reads a file as a training does; returns the outcome."""
    records, classes = load_with_categories(path, path.parent)
    twice = []
    content = json.loads(path.read_bytes(), object_pairs_hook=lambda pairs: _noting_pairs(pairs, twice))
    if twice:
        return f"WRONG read, though keys stand twice with two values: {twice}"[:1600]
    expected, left_out = _expected(content)
    actual = _actual(records, list(classes.values()))
    if sorted(map(repr, expected)) != sorted(map(repr, actual)):
        return f"WRONG read as {actual}, but it says {expected}"[:1600]
    if log.left_out() != left_out:
        return f"WRONG {dict(left_out)} are left out, but {dict(log.left_out())} were counted"
    repaired = sum(_trained_on(record) for record in records if "annotations" in record)
    parts = [] if "annotations" in content else ["test set"]
    parts += ["left out and counted"] if left_out else []
    return ", ".join([*parts, "read, bad boxes counted" if repaired else "read for what it says"])


def _trained_on(record: dict) -> bool:
    """Whether the mapper counts bad boxes of ``record``; raises ValueError where one vanishes or changes in silence."""
    mapper = mapper_of(True)
    wanted = [entry for entry in record["annotations"] if not entry["iscrowd"]]
    kept = mapper(record)["instances"]
    counts = mapper.check_box.counts
    dropped = sum(n for kind, n in counts.items() if kind.startswith("dropped"))
    if len(kept) + dropped != len(wanted):
        raise ValueError(f"{len(kept)} boxes kept and {dropped} dropped of {wanted}")
    for box, row in zip(kept.gt_boxes.tensor.tolist(), kept.gt_index.tolist(), strict=True):
        x, y, w, h = record["annotations"][row]["bbox"]
        reach = max(abs(a - b) for a, b in zip(box, (x, y, x + w, y + h), strict=True))
        if reach > 1.001 and not any(kind.startswith("clipped") for kind in counts):
            raise ValueError(f"{[x, y, w, h]} became {box} in silence")
    return bool(counts)


def _noting_pairs(pairs: list, twice: list) -> dict:
    found = dict(pairs)
    twice += [key for key, value in pairs if value != found[key] and repr(value) != repr(found[key])]
    return found


def _expected(content: dict) -> tuple[list, Counter]:
    """(what the file says of each image, class and annotation, how many entries of each kind say nothing)."""
    entries, left_out = content.get("annotations", []), Counter()
    pointed_at = [_plain(entry["image_id"]) for entry in entries if "image_id" in entry]
    expected, known = [], []
    for image in content["images"]:
        identifier, name = _plain(image["id"]), image["file_name"]
        if name.replace("\\", "/").split("/")[-1].startswith("._") and identifier not in pointed_at:
            left_out["macOS"] += 1
            continue
        known.append(identifier)
        expected.append(
            ("image", identifier, os.path.normpath(name), _length(image, "height"), _length(image, "width"))
        )
        expected[-1] += ("annotations" in content,)
    kept = [entry for entry in entries if not _is_of_no_image(_plain(entry.get("image_id")), known)]
    if entries and not kept:
        kept = entries  # not to be left out but refused
    left_out += Counter(annotation=len(entries) - len(kept))
    used = {_plain(entry["category_id"]) for entry in kept}
    names = {}
    for place, category in enumerate(content["categories"]):
        name = "".join(f"\\u{ord(x):x}" if "\ud800" <= x <= "\udfff" else x for x in str(category["name"]))
        names.setdefault(name, []).append((_plain(category["id"]), place))
    classes = {}
    for name, given in names.items():
        chosen = {key for key, _ in given if key in used} or {given[-1][0]}
        left_out["category"] += len(given) - len(chosen)
        classes |= dict.fromkeys(chosen, name)
    ordered = [classes[key] for key in sorted(classes, key=lambda key: (isinstance(key, str), key))]
    expected.append(("classes", ordered))
    for entry in kept:
        box, crowd = [_float(x) for x in entry["bbox"]], entry.get("iscrowd")
        crowd = 0 if crowd is None else int(crowd) if crowd in (0, 1) else crowd
        area = entry.get("area")
        usable = isinstance(area, int | float) and not isinstance(area, bool) and 0 <= area <= 1e10
        area, label = float(area) if usable else box[2] * box[3], classes[_plain(entry["category_id"])]
        expected.append((_plain(entry["id"]), _plain(entry["image_id"]), label, box, crowd, area))
    return expected, +left_out


def _plain(value):
    """2 for 2.0."""
    return int(value) if isinstance(value, float) and value % 1 == 0 else value


def _length(image: dict, key: str):
    """A width or height, None where the file says that it is not known."""
    value = image.get(key)
    return None if value in (None, 0, -1) and value is not False else _plain(value)


def _is_of_no_image(reference, known: list) -> bool:
    """Whether ``reference`` is no id, also where text and numbers are compared, for then it is to be refused."""
    if not isinstance(reference, int | str) or isinstance(reference, bool):
        return True
    number = _number(reference)
    return reference not in known and (number is None or number not in map(_number, known))


def _number(identifier) -> Decimal | None:
    try:
        number = Decimal(identifier)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")


def _actual(records: list[dict], names: list[str]) -> list:
    """The same of what was read."""
    found = [("classes", names)]
    for record in records:
        name = os.path.relpath(record["file_name"], Path(record["file_name"]).parent)
        size = record.get("height"), record.get("width")
        found.append(("image", record["image_id"], name, *size, "annotations" in record))
        for x in record.get("annotations", ()):
            label = names[x["category_id"]]
            found.append((x["id"], record["image_id"], label, x["bbox"], x["iscrowd"], x["area"]))
    return found


def base_images() -> list[tuple[str, bytes]]:
    """(format, bytes) of small valid images of all formats that a training reads."""
    noise = np.random.default_rng(0).integers(0, 256, (14, 18, 3), np.uint8)
    noise[:7] = np.linspace(0, 255, 18, dtype=np.uint8)[:, None]
    colours, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6
    modes = {mode: colours.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK")}
    wanted = [("PNG", mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")]
    wanted += [("PNG", "RGB", {"exif": exif}), ("PNG", "RGB", {"compress_level": 0})]
    wanted += [("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")]
    wanted += [("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"exif": exif, "quality": 95})]
    wanted += [("BMP", mode, {}) for mode in ("RGB", "L", "P", "1")]
    wanted += [("GIF", mode, {}) for mode in ("P", "L")]
    wanted += [("GIF", "P", {"save_all": True, "append_images": [modes["P"]]})]
    wanted += [("PPM", mode, {}) for mode in ("RGB", "L", "1")]
    wanted += [("TIFF", mode, {}) for mode in ("RGB", "L", "CMYK", "1", "P")]
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    wanted += [("TIFF", "RGB", {"compression": name}) for name in compressions]
    wanted += [("TIFF", "1", {"compression": "group4"}), ("TIFF", "RGB", {"exif": exif})]
    wanted += [("WEBP", "RGB", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {})]
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff prints warnings
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
