"""Everything that is wrong with an annotation file in COCO format, not only what is met first.

    dn-detr check ANNOTATIONS.json IMAGE_FOLDER

I images, A annotations, P categories. A *row* is the index of an entry in its list.
"""

import itertools
from collections import Counter
from functools import partial

import numpy as np

from .coco_custom import convention_sentence
from .columns import VERDICTS, Columns
from .conventions import declared, only_first_pixels, other_convention
from .issues import Issue
from .mask_check import VERDICTS as MASK_VERDICTS
from .mask_check import judged_masks
from .normalise import (
    as_box,
    foreign_references,
    is_file_name,
    is_id,
    is_length,
    is_unknown,
    normalised,
    objects_of,
    sort_key,
    usable_area,
)
from .report import Report

RANGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1 << 62)  # of the histogram of objects, lower ends


def check_content(content: dict, report: Report, sizes: np.ndarray, num_queries: int = 0, budget: int = 0) -> None:
    """Adds everything that the annotations alone tell to ``report``.

    Args:
        content: of an annotation file.
        report: is added to.
        sizes: (I, 2) of :func:`annotated_sizes`, or of the files.
        num_queries: NUM_QUERIES of the model; 0 = do not compare.
        budget: objects of an image that one denoising group can hold; 0 = do not compare.
    """
    content, rows = normalised(content, report)
    sizes = sizes[rows]
    lists = {
        "images": Issue.NO_IMAGES,
        "categories": Issue.NO_CATEGORIES,
        "annotations": Issue.NO_ANNOTATIONS,
    }
    for name, missing in lists.items():
        entries = content.get(name)
        if name == "annotations" and name not in content:
            report.add(Issue.UNANNOTATED, "there is no 'annotations'")
            continue
        if not isinstance(entries, list) or not (entries or name == "annotations"):
            report.add(missing, f"{name!r} is {entries!r:.60}")
            continue
        bad = [i for i, entry in enumerate(entries) if not isinstance(entry, dict)]
        report.add_rows(
            Issue.NO_OBJECT, bad, lambda i, entries=entries, name=name: f"{name}[{i}] is {entries[i]!r:.60}"
        )
    images, categories = objects_of(content, "images"), objects_of(content, "categories")
    report.num_images, report.num_categories = len(images), len(categories)
    _check_images(images, report)
    _check_categories(categories, report)
    columns = Columns.of(content, sizes)
    report.num_annotations = len(columns.entries)
    _check_annotations(columns, content, report)
    if declared(content) or not _check_convention(columns, report):
        _check_boxes(columns, report)  # which mean nothing as long as their convention is another one
        _check_masks(columns, report)
    _count_objects(columns, images, categories, report, num_queries, budget)
    if "annotations" in content:
        _check_use(columns, report)


def _check_use(columns: Columns, report: Report) -> None:
    """Whether anything is left to learn from."""
    if columns.crowd.all() and len(columns.crowd):
        report.add(
            Issue.ALL_CROWDS, f"{len(columns.entries)} annotations have iscrowd 1; set it to 0 for single objects"
        )
    elif report.num_images and not sum(report.classes.values()):
        report.add(Issue.NOTHING, f"{report.num_images} images, {len(columns.entries)} annotations")


def _check_convention(columns: Columns, report: Report) -> bool:
    """Whether the boxes are of another convention."""
    rows = np.flatnonzero(columns.formed & ~columns.crowd & (columns.image >= 0))
    boxes = np.array([as_box(columns.entries[row]["bbox"]) for row in rows], np.float64).reshape(-1, 4)
    sizes = columns.sizes[rows].astype(np.float64)
    words = other_convention(boxes, sizes)
    if words:
        report.add(Issue.CONVENTION, convention_sentence(words))
    elif only_first_pixels(boxes, sizes):
        report.add(
            Issue.MAYBE_CONVENTION,
            "are they percentages? --fix OUT.json --boxes xywh-percent or xyxy-percent converts them, xywh keeps them",
        )
    return words is not None


def annotated_sizes(images: list[dict]) -> np.ndarray:
    """(I, 2) float64 (height, width) in pixels as annotated, infinite where they are missing or senseless."""
    sizes = [[image.get("height"), image.get("width")] for image in images]
    return np.array([s if all(map(is_length, s)) else [np.inf] * 2 for s in sizes], np.float64).reshape(-1, 2)


def _check_ids(entries: list[dict], name: str, kinds: tuple[str, str], report: Report) -> None:
    """Ids that are missing, of a wrong type, doubled, or text."""
    ids = [entry.get("id") for entry in entries]
    wrong = [i for i, value in enumerate(ids) if not is_id(value)]
    report.add_rows(kinds[0], wrong, lambda i: f"{name}[{i}] has id {ids[i]!r:.60}")
    seen, again = set(), []
    for i, value in enumerate(ids):
        if is_id(value):
            again += [i] * (value in seen)
            seen.add(value)
    report.add_rows(kinds[1], again, lambda i: f"{name}[{i}] has id {ids[i]!r:.60}")
    text = [i for i, value in enumerate(ids) if isinstance(value, str)]
    report.add_rows(Issue.TEXT_ID, text, lambda i: f"{name}[{i}] has id {ids[i]!r:.60}")


def _check_images(images: list[dict], report: Report) -> None:
    _check_ids(images, "images", (Issue.IMAGE_ID, Issue.SAME_IMAGE_ID), report)
    names = Counter()
    for i, image in enumerate(images):
        where, name = f"images[{i}] {name_of(image)}", image.get("file_name")
        if not is_file_name(name):
            report.add(Issue.FILE_NAME, f"images[{i}] has file_name {name!r:.60}")
        else:
            names[name] += 1
            if names[name] == 2:
                report.add(Issue.SAME_FILE_NAME, where)
        size = [image[key] for key in ("width", "height") if key in image and not is_unknown(image[key])]
        if not size:
            report.add(Issue.NO_SIZE, where)
        elif not all(map(is_length, size)):
            report.add(
                Issue.BAD_SIZE, f"{where} has width {image.get('width')!r:.20}, height {image.get('height')!r:.20}"
            )


def _check_categories(categories: list[dict], report: Report) -> None:
    _check_ids(categories, "categories", (Issue.CATEGORY_ID, Issue.SAME_CATEGORY_ID), report)
    names = Counter()
    for i, category in enumerate(categories):
        name = category.get("name")
        if not is_id(name):
            report.add(Issue.CATEGORY_NAME, f"categories[{i}] has name {name!r:.60}")
            continue
        name = str(name)
        names[name] += 1
        if names[name] == 2:
            report.add(Issue.SAME_NAME, f"categories[{i}] {name!r:.60}")
    ids = sorted({c["id"] for c in categories if is_id(c.get("id"))}, key=sort_key)
    if ids and ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        report.add(Issue.GAPS, f"{len(ids)} ids from {ids[0]!r:.20} to {ids[-1]!r:.20}")


def _check_annotations(columns: Columns, content: dict, report: Report) -> None:
    entries, _says = columns.entries, partial(_fields_of, columns.entries)
    _check_ids(entries, "annotations", (Issue.ANNOTATION_ID, Issue.SAME_ANNOTATION_ID), report)

    for field, found in (("image_id", columns.image), ("category_id", columns.category)):
        foreign = foreign_references(content, field)
        missing = np.flatnonzero(found < 0).tolist()
        written = [i for i in missing if is_id(x := entries[i].get(field)) and x in foreign]
        report.add_rows(Issue.TEXT_REFERENCE, written, _says(field))
        if field == "category_id":
            report.add_rows(Issue.UNKNOWN_CATEGORY, sorted({*missing} - {*written}), _says(field))
    report.add_rows(Issue.BAD_BOX, np.flatnonzero(~columns.formed), _says("bbox"))
    crowds = [entry.get("iscrowd", 0) for entry in entries]
    bad = [i for i, crowd in enumerate(crowds) if type(crowd) is not int or crowd not in (0, 1)]
    report.add_rows(Issue.BAD_CROWD, bad, _says("iscrowd"))
    areas = [i for i, x in enumerate(entries) if "area" in x and usable_area(x["area"]) is None]
    report.add_rows(Issue.AREA, areas, _says("area"))
    report.add_rows(Issue.CROWD, np.flatnonzero(columns.crowd), _says("image_id"))


def _check_boxes(columns: Columns, report: Report) -> None:
    verdicts, describe = columns.judged(), _fields_of(columns.entries, "image_id", "bbox")
    for code, kind in enumerate(VERDICTS[1:], 1):
        report.add_rows(kind, np.flatnonzero(verdicts == code), describe)


def _check_masks(columns: Columns, report: Report) -> None:
    """What is wrong with masks, where there are any or they are trained; crowds need none."""
    verdicts = judged_masks(columns)
    missing = verdicts == MASK_VERDICTS.index(Issue.NO_MASK)
    verdicts[missing & (columns.crowd | (missing.all() and not report.masks))] = 0
    describe = _fields_of(columns.entries, "image_id", "bbox", "segmentation")
    for code, kind in enumerate(MASK_VERDICTS[1:], 1):
        report.add_rows(kind, np.flatnonzero(verdicts == code), describe)


def _fields_of(entries: list[dict], *fields: str):
    """row -> an annotation in words, with some of its fields."""
    return lambda i: (
        f"annotation {entries[i].get('id')!r:.60}"
        + "".join(f", {field} {entries[i].get(field)!r:.80}" for field in fields)
    )


def _count_objects(columns, images, categories, report: Report, num_queries: int, budget: int) -> None:
    """Objects that training sees: of each image and of each class."""
    dropped = np.isin(columns.judged(), (1, 2, 3))
    used = columns.formed & ~columns.crowd & ~dropped & (columns.image >= 0) & (columns.category >= 0)
    counts = np.bincount(columns.image[used], minlength=len(images))
    if len(images):
        fullest = int(counts.argmax())
        report.fullest = (int(counts[fullest]), name_of(images[fullest]))
    report.objects = histogram(counts)

    def _says(i):
        return f"{name_of(images[i])} has {counts[i]}"

    report.add_rows(Issue.NO_BOXES, np.flatnonzero(counts == 0), _says)
    for kind, limit in ((Issue.CROWDED, num_queries), (Issue.OVER_BUDGET, budget)):
        report.add_rows(kind, np.flatnonzero(counts > limit) if limit else [], _says)
    boxes = np.bincount(columns.category[used], minlength=len(categories))
    names = [f"{category.get('name')!s:.60}" for category in categories]
    for name, n in zip(names, boxes, strict=True):
        report.classes[name] = report.classes.get(name, 0) + int(n)
    report.add_rows(Issue.UNUSED, np.flatnonzero(boxes == 0), lambda i: repr(names[i]))


def histogram(counts: np.ndarray) -> dict[str, int]:
    """{range of objects: images} without empty ranges, from (I,) objects of each image."""
    images, ends = np.histogram(counts, RANGES)
    labels = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(ends)]
    labels[-1] = f"{RANGES[-2]}+"
    return {label: int(n) for label, n in zip(labels, images, strict=True) if n}


def name_of(image: dict) -> str:
    """An image in words."""
    return f"image {image.get('id')!r:.60} {image.get('file_name')!r:.80}"
