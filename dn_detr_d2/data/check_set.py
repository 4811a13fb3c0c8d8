"""Checks a COCO-format data set with its images, or repairs it first and checks the result; see docs/datasets.md."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..utils.files import atomic_write
from .check import annotated_sizes, check_content
from .check_images import STOPPING, check_images, header_sizes
from .columns import is_crowd
from .conventions import unit_of
from .images import ImageFolder
from .label_files import SUFFIXES, Tally, walk
from .mask_check import with_repaired_masks
from .masks import has_mask
from .normalise import listed_once, objects_of
from .repair import converted, refuse_to_clip, repaired, rewritten, with_true_sizes, without_bad
from .report import Report


@dataclass(frozen=True)
class CheckOptions:
    """What a data set is compared with.

    Attributes:
        num_queries: MODEL.DN_DETR.NUM_QUERIES, 0 = not compared.
        denoising_budget: DENOISING.MAX_QUERIES // DENOISING.NUM_GROUPS, 0 = not compared.
        read_images: whether the image files are read; else the sizes are those of the annotation file.
        masks: whether masks are trained, so that what is wrong with them is a problem, and repaired.
    """

    num_queries: int = 0
    denoising_budget: int = 0
    read_images: bool = True
    masks: bool = False


def check_set(content: dict, folder: str, options: CheckOptions) -> Report:
    """The problems of one data set.

    Args:
        content: of an annotation file in COCO format.
        folder: what ``file_name`` is relative to.
        options: what it is compared with.
    """
    report, images = Report(masks=options.masks), objects_of(content, "images")
    sizes = check_images(images, folder, report) if options.read_images else annotated_sizes(images)
    check_content(content, report, sizes, options.num_queries, options.denoising_budget)
    return report


def folder_content(folder: str, say: Callable[[str], None] = print) -> dict:
    """The content of an annotation file that lists the images below a folder and annotates none.

    Args:
        folder: hidden files and links to folders in it are left out; links to files are followed.
        say: takes a line about what is left out.

    Raises:
        DatasetError: there is no file whose name ends as those of images do.
    """
    left_out = Tally()
    names = walk(Path(folder), SUFFIXES, left_out)
    for line in left_out.lines():
        say(line)
    if not names:
        raise DatasetError(f"the folder {folder} and its subfolders have no image ({', '.join(SUFFIXES)})")
    return {"images": [{"id": name, "file_name": name} for name in names], "annotations": [], "categories": []}


def check_folder(content: dict, folder: str) -> Report:
    """What is wrong with the images of :func:`folder_content`."""
    report = Report(annotated=False, num_images=len(content["images"]))
    check_images(content["images"], folder, report, links=True)
    return report


def repair_set(
    content: dict,
    folder: str,
    target: str,
    options: CheckOptions,
    *,
    drop_bad: bool = False,
    boxes: str | None = None,
    wrong_size: str | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Writes a repaired copy and returns its problems.

    Args:
        content, folder, options: as for :func:`check_set`; ``content`` stays as it is.
        target: the JSON file to write.
        drop_bad: leave out images, categories and annotations that cannot be used.
        boxes: convention that the boxes are written in, of ``conventions.CHOICES``; None = found out.
        wrong_size: of images with another size than annotated: "ignore" = the boxes are those of the image, "scale" = those
            of the annotated size; None = a problem.
        say: takes a line about each change.

    Raises:
        DatasetError: it needs a decision of the user, or the file cannot be written.
    """
    report, unusable = Report(masks=options.masks), {}
    content, _, changes = rewritten(content, ImageFolder(folder))
    if wrong_size:
        sizes = header_sizes(objects_of(content, "images"), folder)
        in_pixels = unit_of(boxes or "") is None
        content, sized = with_true_sizes(content, sizes, scale=wrong_size == "scale", in_pixels=in_pixels)
        changes += sized
        content, _ = listed_once(content, list(range(len(sizes))), report)  # what differed may have been the size
    images = objects_of(content, "images")
    sizes = check_images(images, folder, report, unusable) if options.read_images else annotated_sizes(images)
    if drop_bad:
        content, lines, rows = without_bad(content, unusable)
        sizes = sizes[rows]
        for kind in STOPPING:
            del report.counts[kind]
        for line in lines:
            say(f"left out: {line}")
        say(f"{len(lines)} images, categories and annotations left out")
    if boxes:
        before, content = content, converted(content, sizes, boxes)
        changes += Counter({f"box converted from {boxes}": _count_changed(before, content)})
    refuse_to_clip(content, sizes)
    content, more = repaired(content, sizes)
    if options.masks:
        content, masks = with_repaired_masks(content, sizes)
        more += masks
        if drop_bad:
            content = _without_unmasked(content, say)
    write_json(content, target)
    changes += more
    for kind, count in (+changes).items():
        say(f"repaired: {count} x {kind}")
    say(f"{sum(changes.values())} annotations changed or dropped; written: {target}")
    check_content(content, report, sizes, options.num_queries, options.denoising_budget)
    return report


def _without_unmasked(content: dict, say: Callable[[str], None]) -> dict:
    """A copy without objects that have no mask; crowds stay."""
    entries = objects_of(content, "annotations")
    lacking = [x for x in entries if not has_mask(x) and not is_crowd(x)]
    for entry in lacking:
        say(f"left out: annotation {entry.get('id')!r:.60}: has no mask")
    dropped = set(map(id, lacking))
    return content | {"annotations": [x for x in entries if id(x) not in dropped]} if lacking else content


def _count_changed(before: dict, after: dict) -> int:
    """Annotations with another box, of two contents with the same annotations in the same order."""
    entries = zip(objects_of(before, "annotations"), objects_of(after, "annotations"), strict=True)
    return sum(old.get("bbox") is not new.get("bbox") for old, new in entries)


def write_json(content: dict, path: str) -> None:
    """Writes a JSON file completely or not at all; raises DatasetError where it cannot be written."""
    try:
        with atomic_write(path, "w") as file:
            file.write(json.dumps(content))
    except OSError as error:
        raise DatasetError(f"{path} cannot be written: {error.strerror}") from None
