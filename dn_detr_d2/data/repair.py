"""An annotation file without what a training would drop, clip or stumble over, where that needs no judgement.

    dn-detr check ANNOTATIONS.json IMAGE_FOLDER --fix OUT.json [--drop-bad] [--boxes CONVENTION]

What the reader reads as the same or leaves out is written that way, see :mod:`.normalise`. Boxes that are not finite, have
no positive width and height or lie outside are dropped, those that stick out are clipped, and annotations without a usable
id of their own get a new number. A missing box is that of the mask, and text that is a number becomes one. References become
the id that is written as the same number, areas that are none width x height; sizes that are no sizes are those of the
images; absolute paths and back slashes become paths below the folder.
Everything else needs a person and stays as it is, or is left out by :func:`without_bad`.
"""

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np

from ..errors import DatasetError
from .columns import VERDICTS, Columns, clip_boxes
from .conventions import declared, other_convention, to_xywh, too_many_to_clip, unit_of
from .images import ImageFolder
from .issues import Issue
from .label_files import number
from .mask_check import box_of_mask
from .masks import MaskFault, decoded, encoded, fault_of_ring
from .normalise import (
    REFERENCES,
    as_box,
    foreign_references,
    is_file_name,
    is_id,
    is_length,
    listed_once,
    normalised,
    objects_of,
    usable_area,
)
from .report import Report

CLIPPED = VERDICTS.index(Issue.STICKS_OUT)
FILLED, RELATIVE = "image without a usable width and height", "file_name that is absolute or has back slashes"
FROM_MASK, FROM_TEXT = "bbox that is made from the mask", "bbox whose numbers were text"


def repaired(content: dict, sizes: np.ndarray) -> tuple[dict, Counter]:
    """A repaired copy of the content of an annotation file.

    Boxes stay as they are where they are all of another convention, see :func:`.conventions.other_convention`.

    Args:
        content: stays as it is; entries that need no repair are shared.
        sizes: (I, 2) heights and widths of its images, see :func:`dn_detr_d2.data.check.annotated_sizes`.

    Returns:
        (content, {kind: entries changed or dropped}).
    """
    content, rows, changes = rewritten(content)
    sizes = sizes[rows]
    content, filled = _with_sizes(content, sizes)
    content, found = _with_boxes_of_masks(content)
    changes += found
    columns = Columns.of(content, sizes)
    changes += filled
    if not columns.entries:
        return content, changes
    entries = list(columns.entries)
    strangers = [entry for entry in content["annotations"] if not isinstance(entry, dict)]
    if declared(content) or not _of_another_convention(columns):
        entries, boxes = _with_boxes_inside(content, columns, sizes)
        changes += boxes
    entries, areas = _with_areas(entries)
    kept, numbered = _renumbered(entries)
    return content | {"annotations": kept + strangers}, changes + areas + numbered


def rewritten(content: dict, folder: ImageFolder | None = None) -> tuple[dict, list[int], Counter]:
    """A copy in which everything is written as the reader understands it; boxes are not checked.

    Args:
        content: stays as it is.
        folder: the image folder; None = paths stay.

    Returns:
        (content, rows of its images among those of the given content, {kind: entries changed or dropped}).
    """
    report = Report()
    content, rows = normalised(content, report)
    content, changes = _with_images(content, folder)
    content, rows = listed_once(content, rows, report)  # paths may have been what differed
    content, referred = _with_own_references(content)
    content, boxes = _with_numbers(content)
    left_out = Counter({kind: count for kind, count in report.counts.items() if kind != Issue.NO_MATCH})
    return content, rows, left_out + changes + referred + boxes


def without_bad(content: dict, unusable: dict[int, str]) -> tuple[dict, list[str], list[int]]:
    """A copy without the images and annotations that training would stop at.

    Args:
        content: as :func:`.normalise.normalised` gives it.
        unusable: {row of an image: the reason}, see :func:`.check_images.check_images`.

    Returns:
        (content, one line about each image and annotation that is left out, rows of the images that stay).
    """
    images = objects_of(content, "images")
    counts = Counter(image["id"] for image in images if is_id(image.get("id")))
    lines, rows, dropped = [], [], set()
    for i, image in enumerate(images):
        reason = unusable.get(i) or _fault_of_image(image, counts)
        if reason:
            lines.append(f"image {image.get('id')!r:.60} {image.get('file_name')!r:.200}: {reason}")
            dropped |= {image["id"]} if is_id(image.get("id")) else set()
        else:
            rows.append(i)
    strangers = (
        [x for x in content["images"] if not isinstance(x, dict)] if isinstance(content.get("images"), list) else []
    )
    lines += [f"image {x!r:.60}: is no object" for x in strangers]
    listed_categories = content.get("categories") if isinstance(content.get("categories"), list) else []
    categories = [x for x in listed_categories if isinstance(x, dict) and is_id(x.get("id")) and is_id(x.get("name"))]
    lines += [f"category {x!r:.60}: needs an id and a name" for x in listed_categories if x not in categories]
    known = {x["id"] for x in categories}
    listed = {images[i]["id"] for i in rows}
    kept = []
    for entry in content.get("annotations") if isinstance(content.get("annotations"), list) else []:
        reason = _fault_of_annotation(entry, listed, dropped, known)
        if reason:
            what = f"{entry.get('id')!r:.60}" if isinstance(entry, dict) else f"{entry!r:.60}"
            lines.append(f"annotation {what}: {reason}")
        else:
            kept.append(entry)
    annotations = {"annotations": kept} if isinstance(content.get("annotations"), list) else {}
    return content | {"images": [images[i] for i in rows], "categories": categories} | annotations, lines, rows


def _fault_of_image(image: dict, counts: Counter) -> str:
    if not is_id(image.get("id")):
        return "has no usable id"
    if counts[image["id"]] > 1:
        return "its id appears more than once"
    if not is_file_name(image.get("file_name")):
        return "has no file_name"
    return ""


def _fault_of_annotation(entry, listed: set, dropped: set, known: set) -> str:
    if not isinstance(entry, dict):
        return "is no object"
    image, category, crowd = entry.get("image_id"), entry.get("category_id"), entry.get("iscrowd", 0)
    if is_id(image) and image in dropped:
        return f"its image {image!r:.60} is left out"
    if not is_id(image) or image not in listed:
        return f"image_id {image!r:.60} is not listed"
    if not is_id(category) or category not in known:
        return f"category_id {category!r:.60} is not among the categories"
    if as_box(entry.get("bbox")) is None and not _box_of_own_mask(entry):
        return f"bbox {entry.get('bbox')!r:.80} is not four numbers"
    return "" if type(crowd) is int and crowd in (0, 1) else f"iscrowd {crowd!r:.60} is neither 0 nor 1"


def converted(content: dict, sizes: np.ndarray, convention: str) -> dict:
    """A copy whose boxes are [x, y, width, height] in pixels and which says so in ``info``.

    An area that was the box's follows the box. Polygons in the same unit become pixels if the boxes do, with their areas.

    Args:
        content: as :func:`.normalise.normalised` gives it.
        sizes: (I, 2) heights and widths of its images.
        convention: one of :data:`.conventions.CHOICES`.

    Raises:
        DatasetError: the size of an image is needed and not known.
    """
    info = content.get("info") if isinstance(content.get("info"), dict) else {}
    content = content | {"info": info | {"bbox_format": "xywh"}}
    columns = Columns.of(content, sizes)
    if convention == "xywh" or not columns.entries:
        return content
    unit = unit_of(convention)
    if unit:
        _refuse_unknown_sizes(columns, convention)
    boxes = np.array([as_box(entry.get("bbox")) or [0.0] * 4 for entry in columns.entries], np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = to_xywh(boxes, columns.sizes.astype(np.float64), convention)
    entries = [
        _with_converted(entry, box if formed else None, [x / unit for x in size] if unit else None, unit or 1)
        for entry, box, size, formed in zip(
            columns.entries, boxes.tolist(), columns.sizes.tolist(), columns.formed, strict=True
        )
    ]
    strangers = [entry for entry in content["annotations"] if not isinstance(entry, dict)]
    return content | {"annotations": entries + strangers}


def with_true_sizes(content: dict, sizes: np.ndarray, *, scale: bool, in_pixels: bool = True) -> tuple[dict, Counter]:
    """A copy whose images have the sizes of their files where another is annotated.

    Args:
        content: as :func:`.normalise.normalised` gives it.
        sizes: (I, 2) heights and widths of the files, infinite where one cannot be read.
        scale: whether boxes, masks and areas are those of an image of the annotated size, and change with it. An image whose
            width and height are exchanged was not resized but turned, and stays as it is.
        in_pixels: whether boxes and polygons are written in pixels; others are shares of the image, whatever its size.

    Returns:
        (content, {kind: images changed}).
    """
    factors, images = {}, []
    for image, (height, width) in zip(objects_of(content, "images"), sizes.tolist(), strict=True):
        said = [image.get(key) for key in ("height", "width")]
        wrong = all(map(is_length, said)) and np.isfinite([height, width]).all() and said != [height, width]
        wrong = wrong and not (scale and said == [width, height])
        if wrong and is_id(image.get("id")):
            factors[image["id"]] = (int(height), int(width)), (height / said[0], width / said[1])
        images.append(image | {"height": int(height), "width": int(width)} if wrong else image)
    if not factors:
        return content, Counter()
    strangers = [entry for entry in content["images"] if not isinstance(entry, dict)]
    content = content | {"images": images + strangers}
    if scale and isinstance(content.get("annotations"), list):
        entries = [_scaled(x, factors, in_pixels) if isinstance(x, dict) else x for x in content["annotations"]]
        content = content | {"annotations": entries}
    return content, Counter({Issue.SIZE: len(factors)})


def _scaled(entry: dict, factors: dict, in_pixels: bool) -> dict:
    """The annotation in an image that was resized: ``factors`` {image id: (its size, (down, right))}."""
    reference, box, mask = entry.get("image_id"), as_box(entry.get("bbox")), entry.get("segmentation")
    if not is_id(reference) or reference not in factors:
        return entry
    size, (y, x) = factors[reference]
    changes, area = {}, usable_area(entry.get("area"))
    if isinstance(mask, dict):
        changes["segmentation"] = _resized(mask, size)
    if in_pixels:
        changes |= {"bbox": [box[0] * x, box[1] * y, box[2] * x, box[3] * y]} if box else {}
        changes |= {"area": area * x * y} if area is not None else {}
        if isinstance(mask, list) and mask and not any(fault_of_ring(ring) for ring in mask):
            changes["segmentation"] = _scaled_rings(mask, y, x)
    return entry | changes


def _scaled_rings(rings: list[list[float]], down: float, right: float) -> list[list[float]]:
    """Polygons [x0, y0, x1, ...] times a factor in each direction."""
    return [[value * (down if i % 2 else right) for i, value in enumerate(ring)] for ring in rings]


def _resized(runs: dict, size: tuple[int, int]) -> dict:
    """Run lengths in an image of another (height, width), each pixel that of the nearest place; as they are if unusable."""
    try:
        mask = decoded(runs, tuple(runs["size"]))
    except (MaskFault, LookupError, TypeError, ValueError):
        return runs
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, mask.shape, strict=True))
    found = encoded(mask[rows[:, None], columns], size)
    return found | {"size": list(size), "counts": found["counts"].decode("ascii")}


def refuse_to_clip(content: dict, sizes: np.ndarray) -> None:
    """Raises DatasetError if :func:`repaired` would clip so many boxes that their convention should be said first.

    Args:
        content: as :func:`.normalise.normalised` gives it.
        sizes: (I, 2) heights and widths of its images.
    """
    columns = Columns.of(content, sizes)
    if declared(content) or _of_another_convention(columns):
        return
    if found := too_many_to_clip(*_used(columns)):
        raise DatasetError(
            f"{found[0]} of {found[1]} boxes stick out of their images by more than 5 % of the side, so they may not be "
            "[x, y, width, height] in pixels; --fix with --boxes xywh clips them, with --boxes CONVENTION converts them"
        )


def _refuse_unknown_sizes(columns: Columns, convention: str) -> None:
    unknown = columns.formed & (columns.image >= 0) & ~np.isfinite(columns.sizes).all(1)
    if unknown.any():
        entry = columns.entries[int(np.flatnonzero(unknown)[0])]
        raise DatasetError(
            f"--boxes {convention} needs the sizes of the images, and that of image {entry['image_id']!r:.60} is not known; "
            "leave out --no-images, and images that cannot be read with --drop-bad"
        )


def _with_converted(entry: dict, box: list[float] | None, scales: list[float] | None, unit: int) -> dict:
    """The annotation with another ``box``, if it has one; ``scales`` = pixels of a step (down, right) of 1 / ``unit`` of the
    image."""
    mask, old = entry.get("segmentation"), as_box(entry.get("bbox"))
    area, changes = usable_area(entry.get("area")), {"bbox": box} if box else {}
    if scales is not None and _is_within(mask, unit):
        height, width = scales
        changes["segmentation"] = _scaled_rings(mask, height, width)
        if area is not None and area <= unit * unit:
            changes["area"] = area * height * width
    if box and area is not None and (not mask or np.isclose(area, old[2] * old[3], rtol=1e-6, atol=0)):
        changes["area"] = box[2] * box[3]  # what is no area then is written anew by :func:`repaired`
    return entry | changes


def _is_within(mask, unit: int) -> bool:
    """Whether a segmentation consists of polygons in 0..``unit``, up to rounding."""
    if not isinstance(mask, list) or not mask or not all(isinstance(ring, list) for ring in mask):
        return False
    return all(type(x) in (int, float) and -0.01 <= x / unit <= 1.01 for ring in mask for x in ring)


def _used(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(A, 4) boxes as written, and (A, 2) sizes of their images, of annotations that training would look at."""
    rows = np.flatnonzero(columns.formed & ~columns.crowd & (columns.image >= 0))
    boxes = np.array([as_box(columns.entries[row]["bbox"]) for row in rows], np.float64).reshape(-1, 4)
    return boxes, columns.sizes[rows].astype(np.float64)


def _of_another_convention(columns: Columns) -> bool:
    return other_convention(*_used(columns)) is not None


def _with_images(content: dict, folder: ImageFolder | None) -> tuple[dict, Counter]:
    """Images with relative paths."""
    entries = content.get("images")
    if not isinstance(entries, list):
        return content, Counter()
    images = [_with_path(entry, folder) if folder and isinstance(entry, dict) else entry for entry in entries]
    changed = sum(new is not old for new, old in zip(images, entries, strict=True))
    return content | {"images": images}, +Counter({RELATIVE: changed})


def _with_sizes(content: dict, sizes: np.ndarray) -> tuple[dict, Counter]:
    """Images whose width and height are numbers, where ``sizes`` (I, 2) knows them."""
    images = list(content["images"]) if isinstance(content.get("images"), list) else []
    rows, count = iter(sizes), 0
    for i, image in enumerate(images):
        size = next(rows) if isinstance(image, dict) else None
        if size is None or not np.isfinite(size).all() or all(is_length(image.get(x)) for x in ("height", "width")):
            continue
        images[i] = image | dict(zip(("height", "width"), map(int, size), strict=True))
        count += 1
    return (content | {"images": images} if count else content), +Counter({FILLED: count})


def _with_path(image: dict, folder: ImageFolder) -> dict:
    name = image.get("file_name")
    if not is_file_name(name) or "\0" in name:
        return image
    better = folder.with_slashes(name) or (folder.relative(name) if folder.has(name) else name)
    return image if better == name else image | {"file_name": better}


def _with_own_references(content: dict) -> tuple[dict, Counter]:
    """References as their ids are written, and ``iscrowd`` "0" and "1" as numbers."""
    entries, changes = content.get("annotations"), Counter()
    if not isinstance(entries, list):
        return content, changes
    tables = {field: foreign_references(content, field) for field in REFERENCES}
    result = []
    for entry in entries:
        if isinstance(entry, dict):
            new = {
                field: table[entry[field]]
                for field, table in tables.items()
                if is_id(entry.get(field)) and entry[field] in table
            }
            changes[Issue.TEXT_REFERENCE] += len(new)
            if type(entry.get("iscrowd")) is str and entry["iscrowd"] in ("0", "1"):
                new["iscrowd"] = int(entry["iscrowd"])
                changes[Issue.BAD_CROWD] += 1
            entry = entry | new if new else entry
        result.append(entry)
    return content | {"annotations": result}, +changes


def _with_numbers(content: dict) -> tuple[dict, Counter]:
    """Boxes whose numbers are written as text, as numbers."""
    return _with_boxes(content, lambda entry: _as_numbers(entry.get("bbox")), FROM_TEXT)


def _with_boxes_of_masks(content: dict) -> tuple[dict, Counter]:
    """Boxes of annotations that have none, from their masks in pixels: all other boxes must be in pixels too."""
    return _with_boxes(content, _box_of_own_mask, FROM_MASK)


def _with_boxes(content: dict, find: Callable[[dict], list[float] | None], kind: str) -> tuple[dict, Counter]:
    """The content with boxes that ``find`` makes of annotations without one."""
    entries = content.get("annotations")
    if not isinstance(entries, list):
        return content, Counter()
    lacking = {i for i, x in enumerate(entries) if isinstance(x, dict) and as_box(x.get("bbox")) is None}
    found = {i: box for i in lacking if (box := find(entries[i]))}
    result = [entry | {"bbox": found[i]} if i in found else entry for i, entry in enumerate(entries)]
    return content | {"annotations": result}, +Counter({kind: len(found)})


def _box_of_own_mask(entry: dict) -> list[float] | None:
    """The box of the mask of an annotation whose own is missing."""
    return box_of_mask(entry.get("segmentation")) if entry.get("bbox") in (None, []) else None


def _as_numbers(box) -> list[float] | None:
    """Four numbers of which some are text; None if they are no such."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float, str) for x in box):
        return None
    try:
        return [number(x) if type(x) is str else x for x in box]
    except ValueError:
        return None


def _with_areas(entries: list[dict]) -> tuple[list[dict], Counter]:
    result, changes = [], Counter()
    for entry in entries:
        if "area" in entry and usable_area(entry["area"]) is None and (box := as_box(entry.get("bbox"))):
            area = box[2] * box[3]
            entry = {key: value for key, value in entry.items() if key != "area"}
            entry |= {"area": area} if usable_area(area) is not None else {}
            changes[Issue.AREA] += 1
        result.append(entry)
    return result, changes


def _with_boxes_inside(content: dict, columns: Columns, sizes: np.ndarray) -> tuple[list[dict], Counter]:
    """The annotations that training would use, their boxes clipped."""
    verdicts, entries = columns.judged(), list(columns.entries)
    clipped, after = np.flatnonzero(verdicts == CLIPPED), np.where(verdicts == CLIPPED, 0, verdicts)
    for row in clipped:
        entries[row] = _with_box(entries[row], clip_boxes(columns.boxes[[row]], columns.sizes[[row]])[0])
    again = content | {"annotations": [entries[row] for row in clipped]}
    after[clipped] = Columns.of(again, sizes).judged()  # a box may be clipped to nothing
    kept = [entry for entry, verdict in zip(entries, after, strict=True) if verdict == 0]
    return kept, Counter(VERDICTS[code] for code in verdicts[verdicts > 0])


def _with_box(entry: dict, box: np.ndarray) -> dict:
    """The annotation with an absolute xyxy box; the area too, where it is the box's and not a mask's."""
    x0, y0, x1, y1 = box.tolist()
    area = {"area": (x1 - x0) * (y1 - y0)} if "area" in entry and not entry.get("segmentation") else {}
    return entry | {"bbox": [x0, y0, x1 - x0, y1 - y0]} | area


def _renumbered(entries: list[dict]) -> tuple[list[dict], Counter]:
    """New numbers, above all that are taken, for ids that are unusable or were met before."""
    highest = max((entry["id"] for entry in entries if type(entry.get("id")) is int), default=0)
    numbers, seen, changes, result = itertools.count(max(highest, 0) + 1), set(), Counter(), []
    for entry in entries:
        value = entry.get("id")
        if not is_id(value) or value in seen:
            changes[Issue.SAME_ANNOTATION_ID if is_id(value) else Issue.ANNOTATION_ID] += 1
            entry = entry | {"id": next(numbers)}
        seen.add(entry["id"])
        result.append(entry)
    return result, changes
