"""A COCO-format data set split in two, with the classes of the whole on both sides.

Images are kept whole. They are placed one by one, those of the rarest class first, each on the side that lacks most of that
class (iterative stratification: Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011); then pairs of images change sides as long
as that brings a class to a side that has none of it.
"""

from collections.abc import Collection

import numpy as np

from ..errors import UserError
from .normalise import normalised, objects_of
from .report import Report

TRIED = 500  # images of the other side that one image may change places with


def split_content(content: dict, fraction: float, seed: int) -> tuple[dict, dict]:
    """The two parts of an annotation file.

    Args:
        content: COCO format, with references that are right.
        fraction: of the images that the first part gets, 0 < fraction < 1; rounded to a whole number of images, but no part
            is empty.
        seed: the same seed makes the same parts.

    Returns:
        (first, second): images and annotations in the order of ``content``, and everything else of it in both.

    Raises:
        UserError: fewer than two images, or a fraction out of range.
    """
    content, _ = normalised(content, Report())
    images, entries = objects_of(content, "images"), objects_of(content, "annotations")
    if not 0 < fraction < 1:
        raise UserError(f"--split must lie between 0 and 1, got {fraction:g}")
    if len(images) < 2:
        raise UserError(f"a data set of {len(images)} images cannot be split")
    rows = {image["id"]: row for row, image in enumerate(images)}
    columns = {category["id"]: column for column, category in enumerate(objects_of(content, "categories"))}
    present = np.zeros((len(images), len(columns)), dtype=np.int64)
    for entry in entries:
        present[rows[entry["image_id"]], columns[entry["category_id"]]] = 1
    first = choose_images(present, fraction, seed)
    return split_by_ids(content, {image["id"] for image, taken in zip(images, first, strict=True) if taken})


def split_by_ids(content: dict, ids: Collection) -> tuple[dict, dict]:
    """The part of an annotation file whose images have these ids, and the rest; see :func:`split_content`."""
    parts = []
    for first in (True, False):
        part = {"images": [image for image in objects_of(content, "images") if (image["id"] in ids) == first]}
        if "annotations" in content:
            entries = objects_of(content, "annotations")
            part["annotations"] = [entry for entry in entries if (entry["image_id"] in ids) == first]
        parts.append(content | part)
    return parts[0], parts[1]


def choose_images(present: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which images the first part gets.

    Args:
        present: (images, classes) of 0 and 1, whether an image has objects of a class.
        fraction, seed: as for :func:`split_content`.

    Returns:
        numpy.ndarray: (images,), bool.
    """
    generator, totals = np.random.default_rng(seed), present.sum(0)
    size = min(max(round(fraction * len(present)), 1), len(present) - 1)
    room = np.array([size, len(present) - size])
    of_first = np.clip(totals * fraction, np.minimum(1, totals / 2), np.maximum(totals - 1, totals / 2))
    wanted = np.stack([of_first, totals - of_first])
    side = np.full(len(present), -1)
    order = generator.permutation(len(present))
    while len(order):
        counts = present[order].sum(0)
        rarest = np.where(counts > 0, counts, len(present) + 1).argmin() if counts.any() else None
        having = order if rarest is None else order[present[order, rarest] > 0]
        for image in having:
            lacks = room / len(present) if rarest is None else wanted[:, rarest]
            chosen = max((0, 1), key=lambda i: (room[i] > 0, lacks[i], room[i]))
            side[image] = chosen
            room[chosen] -= 1
            wanted[chosen] -= present[image]
        order = order[side[order] < 0]
    _bring_to_both_sides(present, side, generator)
    return side == 0


def _bring_to_both_sides(present: np.ndarray, side: np.ndarray, generator: np.random.Generator) -> None:
    """Lets images change places, in ``side``, while that lowers the number of classes that one side lacks."""
    totals = present.sum(0)

    def _lacking(counts):
        return ((totals > 1) & ((counts == 0) | (counts == totals))).sum(-1)

    improved = True
    while improved:
        improved, of_first = False, present[side == 0].sum(0)
        before = _lacking(of_first)
        lacking = np.flatnonzero((totals > 1) & ((of_first == 0) | (of_first == totals)))
        for image in np.flatnonzero(present[:, lacking].any(1)):
            others = generator.permutation(np.flatnonzero(side != side[image]))[:TRIED]
            moved = present[others] - present[image]
            after = _lacking(of_first + (moved if side[image] == 0 else -moved))
            if after.min() < before:
                other = others[after.argmin()]
                side[image], side[other] = side[other], side[image]
                improved = True
                break
