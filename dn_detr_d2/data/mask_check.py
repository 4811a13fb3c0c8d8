"""What is wrong with the masks of annotations, and a copy in which it is repaired.

A annotations, R polygons. Outlines of polygons are measured, not drawn, all at once.
"""

from array import array
from collections import Counter

import numpy as np

from ..errors import DatasetError
from .coco_custom import FIX
from .columns import Columns, clip_boxes
from .issues import Issue
from .mapper import ROUNDING
from .masks import MaskFault, fault_of_ring, has_mask, polygons, run_lengths

# In the order in which they are looked for.
VERDICTS = (
    None,
    Issue.NO_MASK,
    Issue.MASK_FORM,
    Issue.MASK_SIZE,
    Issue.MASK_EMPTY,
    Issue.MASK_OUTSIDE,
    Issue.MASK_BOX,
)
# A mask disagrees with its box if the IoU of its own box with it is less, and a side differs by more pixels.
MIN_IOU, MAX_DIFFERENCE = 0.5, 2.0
UNUSABLE = (Issue.MASK_FORM, Issue.MASK_SIZE, Issue.MASK_EMPTY)


def judge_masks(segmentations: list, sizes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """What is wrong with each mask.

    Args:
        segmentations: A of them, as written.
        sizes: (A, 2) heights and widths of their images, infinite where not known.
        boxes: (A, 4) absolute xyxy of their objects, not finite where not known; clipped to the image here.

    Returns:
        numpy.ndarray: (A,) indices of ``VERDICTS``.
    """
    codes, extents, areas = _measured(segmentations, sizes)
    sizes, boxes = sizes.astype(np.float64), boxes.astype(np.float64)
    with np.errstate(invalid="ignore"):
        inside = clip_boxes(extents, sizes)
        empty = (areas == 0) | (inside[:, 2:] <= inside[:, :2]).any(1)
        outside = np.abs(extents - inside).max(1, initial=0) > ROUNDING
        annotated = clip_boxes(boxes, sizes)
        differs = (_iou(inside, annotated) < MIN_IOU) & (np.abs(inside - annotated).max(1, initial=0) > MAX_DIFFERENCE)
        differs &= np.isfinite(boxes).all(1) & (annotated[:, 2:] > annotated[:, :2]).all(1)
    found = np.select([empty, outside, differs], [VERDICTS.index(x) for x in VERDICTS[4:]], 0)
    return np.where(codes > 0, codes, found)


def judged_masks(columns: Columns) -> np.ndarray:
    """(A,) what is wrong with the mask of each annotation, an index of ``VERDICTS``."""
    boxes = np.where(columns.formed[:, None], columns.boxes, np.nan)
    return judge_masks([entry.get("segmentation") for entry in columns.entries], columns.sizes, boxes)


def refuse_unusable_masks(name: str, records: list[dict], key: str) -> None:
    """Raises DatasetError if objects of a data set have no mask that can be used; crowds need none.

    Args:
        name: of the data set.
        records: its dataset dicts; masks that are arrays, or pixels of a png, are not looked at.
        key: what asks for masks.
    """
    annotated = [(r, x) for r in records if "pan_seg_file_name" not in r for x in r.get("annotations", [])]
    objects = [(record, x) for record, x in annotated if not x.get("iscrowd", 0) and not _is_array(x)]
    sizes = np.array([[r.get("height", np.inf), r.get("width", np.inf)] for r, _ in objects], np.float64).reshape(-1, 2)
    masks = [x.get("segmentation") for _, x in objects]
    verdicts = judge_masks(masks, sizes, np.full((len(masks), 4), np.nan))
    for kind in (Issue.NO_MASK, Issue.MASK_FORM, Issue.MASK_SIZE):
        found = np.flatnonzero(verdicts == VERDICTS.index(kind))
        if len(found):
            record, annotation = objects[found[0]]
            raise DatasetError(
                f"data set {name!r}: {len(found)} of {len(objects)} objects: {kind}; first annotation "
                f"{annotation.get('id')!r:.60} of {record['file_name']}; {key} is True, so add the masks, leave the objects "
                f"out with {FIX} --masks --drop-bad, or set it to False",
                kind,
            )


def _is_array(annotation: dict) -> bool:
    """Whether a mask is an array or consists of arrays, as functions of users give them."""
    mask = annotation.get("segmentation")
    return isinstance(mask, np.ndarray) or (isinstance(mask, list) and any(isinstance(x, np.ndarray) for x in mask))


def _measured(segmentations: list, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A,) codes of what has no usable form; (A, 4) xyxy and (A,) areas of the others."""
    codes = np.zeros(len(segmentations), np.int64)
    extents, areas = np.zeros((len(segmentations), 4)), np.ones(len(segmentations))
    rings, owners, numbers = [], [], array("d")
    for i, segmentation in enumerate(segmentations):
        if not has_mask({"segmentation": segmentation}):
            codes[i] = VERDICTS.index(Issue.NO_MASK)
        elif isinstance(segmentation, list) and not any(map(fault_of_ring, segmentation)):
            for ring in segmentation:
                numbers.extend(ring)
                rings.append(len(ring) // 2)
            owners += [i] * len(segmentation)
        elif isinstance(segmentation, dict):
            try:
                extents[i], areas[i] = measure_runs(segmentation, sizes[i])
            except MaskFault as fault:
                codes[i] = VERDICTS.index(fault.kind)
        else:
            codes[i] = VERDICTS.index(Issue.MASK_FORM)
    if rings:
        _measure_rings(np.frombuffer(numbers).reshape(-1, 2), np.array(rings), np.array(owners), extents, areas)
    return codes, extents, areas


def _measure_rings(points: np.ndarray, lengths: np.ndarray, owners: np.ndarray, extents: np.ndarray, areas: np.ndarray):
    """Fills in the rows of annotations with polygons.

    Args:
        points: of all polygons in a row.
        lengths, owners: (R,) points of each polygon, and the annotation that it belongs to, in ascending order.
        extents, areas: (A, 4) xyxy and (A,), written to.
    """
    first = np.cumsum(lengths) - lengths
    following = np.arange(1, len(points) + 1)
    following[first + lengths - 1] = first
    ahead = points[following]
    doubled = np.abs(np.add.reduceat(points[:, 0] * ahead[:, 1] - ahead[:, 0] * points[:, 1], first))
    rows, start = np.unique(owners, return_index=True)
    areas[rows] = np.add.reduceat(doubled, start) / 2
    extents[rows, :2] = np.minimum.reduceat(np.minimum.reduceat(points, first), start)
    extents[rows, 2:] = np.maximum.reduceat(np.maximum.reduceat(points, first), start)


def measure_runs(segmentation: dict, size: np.ndarray) -> tuple[list[int], int]:
    """(xyxy, area) of run lengths; where the size of the image is not known, their own is taken."""
    known = tuple(size.tolist()) if np.isfinite(size).all() else None
    runs = run_lengths(segmentation, known)
    height, ends = segmentation["size"][0], np.cumsum(runs)
    start, stop = ends[:-1:2], ends[1::2]  # of what lies inside, an end for every begin
    start, stop = start[: len(stop)][stop > start[: len(stop)]], stop[stop > start[: len(stop)]] - 1
    if not len(start):
        return [0, 0, 0, 0], 0
    whole = (start // height != stop // height).any()  # a run into the next column reaches top and bottom
    rows = (0, height - 1) if whole else ((start % height).min(), (stop % height).max())
    return [int(start[0] // height), int(rows[0]), int(stop[-1] // height) + 1, int(rows[1]) + 1], int(runs[1::2].sum())


def box_of_mask(segmentation) -> list[float] | None:
    """[x, y, width, height] of what polygons or run lengths cover, None if they are unusable or empty."""
    try:
        if isinstance(segmentation, dict):
            (x0, y0, x1, y1), _ = measure_runs(segmentation, np.full(2, np.inf))
        else:
            points = np.concatenate(polygons(segmentation))
            (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    except MaskFault:
        return None
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(A,) intersection over union of (A, 4) xyxy boxes, pair by pair; NaN where both have no area."""
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    both = sides.clip(min=0).prod(1)
    return both / ((first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - both)


def with_repaired_masks(content: dict, sizes: np.ndarray) -> tuple[dict, Counter]:
    """A copy of the content of a file whose masks can be used; boxes stay.

    Polygons are cut at the image's edge, those that are none are left out of masks with others that are; a mask of which
    nothing is left, and run lengths that cannot be used, are taken out.

    Args:
        content: stays as it is.
        sizes: (I, 2) heights and widths of its images, infinite where not known.

    Returns:
        (content, {kind: masks changed or taken out}).
    """
    columns, changes = Columns.of(content, sizes), Counter()
    entries, sizes, verdicts = columns.entries, columns.sizes, judged_masks(columns)
    result = list(entries)
    for row in np.flatnonzero(np.isin(verdicts, [VERDICTS.index(x) for x in (*UNUSABLE, Issue.MASK_OUTSIDE)])):
        entry, kept = entries[row], []
        if isinstance(entry["segmentation"], list):
            rings = [ring for ring in entry["segmentation"] if not fault_of_ring(ring)]
            kept = [cut for ring in rings if len(cut := cut_polygon(ring, sizes[row].tolist())) >= 6]
        result[row] = {key: value for key, value in entry.items() if key != "segmentation"}
        if kept and judge_masks([kept], sizes[[row]], np.full((1, 4), np.nan))[0] == 0:
            result[row]["segmentation"] = kept
        changes[VERDICTS[verdicts[row]]] += 1
    if not changes:
        return content, changes
    strangers = [entry for entry in content["annotations"] if not isinstance(entry, dict)]
    return content | {"annotations": result + strangers}, changes


def cut_polygon(ring: list[float], size: tuple[float, float]) -> list[float]:
    """What of a polygon [x0, y0, ...] lies in an image of (height, width), by Sutherland and Hodgman; [] = nothing."""
    points = [*zip(ring[::2], ring[1::2], strict=True)]
    for axis, bound, sign in ((0, 0, 1), (0, size[1], -1), (1, 0, 1), (1, size[0], -1)):
        points = _cut(points, axis, bound, sign)
    return [x for point in points for x in point]


def _cut(points: list[tuple], axis: int, bound: float, sign: int) -> list[tuple]:
    """The polygon on that side of a line where ``sign * (coordinate - bound)`` is not negative."""
    kept = []
    for last, point in zip(points[-1:] + points[:-1], points, strict=True):
        inside = sign * (point[axis] - bound) >= 0
        if inside != (sign * (last[axis] - bound) >= 0):
            part = (bound - last[axis]) / (point[axis] - last[axis])
            other = last[1 - axis] + part * (point[1 - axis] - last[1 - axis])
            kept.append((bound, other) if axis == 0 else (other, bound))
        if inside:
            kept.append(point)
    return kept
