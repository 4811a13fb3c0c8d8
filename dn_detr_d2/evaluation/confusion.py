"""For which class a detector takes an object: a matrix of counts, which label noise can be drawn from."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

IOU_THRESHOLD = 0.5


def count_confusions(objects: Iterable[dict], detections: Iterable[dict], num_classes: int) -> np.ndarray:
    """How often an object of one class is detected as another.

    In each image detections are taken in descending order of score, whatever their class. Each finds the object that it
    overlaps most among those not found yet, if their IoU is at least 0.5. So an object counts once, as the class of the
    first detection that finds it, and not at all if none does; there is no threshold for scores. Crowds are left out.

    Args:
        objects: COCO's dicts with ``image_id``, ``category_id`` in 1 .. P, ``bbox`` (x, y, w, h), ``iscrowd``.
        detections: the same with ``score`` and without ``iscrowd``; equal scores keep their order.
        num_classes: P.

    Returns:
        ndarray: (P, P) int64, rows are true classes, columns predicted ones.
    """
    matrix = np.zeros((num_classes, num_classes), np.int64)
    by_image, found = defaultdict(list), defaultdict(list)
    for x in objects:
        if not x["iscrowd"]:
            by_image[x["image_id"]].append(x)
    for x in detections:
        found[x["image_id"]].append(x)
    for image, inside in by_image.items():
        ranked = sorted(found[image], key=lambda x: -x["score"])
        for i, j in _pairs(_boxes(ranked), _boxes(inside)):
            matrix[inside[j]["category_id"] - 1, ranked[i]["category_id"] - 1] += 1
    return matrix


def _pairs(detected: np.ndarray, boxes: np.ndarray) -> Iterable[tuple[int, int]]:
    """(detection, object) found first come, first served, of (D, 4) and (G, 4) xywh boxes."""
    overlap = pairwise_iou(detected, boxes)
    for i in np.flatnonzero((overlap >= IOU_THRESHOLD).any(1)):
        j = int(overlap[i].argmax())
        if overlap[i, j] >= IOU_THRESHOLD:
            overlap[:, j] = -1
            yield int(i), j


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, B) IoU of (A, 4) and (B, 4) xywh boxes; 0 where both have no area."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum((a[:, :2] + a[:, 2:])[:, None], (b[:, :2] + b[:, 2:])[None])
    common = np.clip(high - low, 0, None).prod(2)
    union = a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1)[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _boxes(entries: list[dict]) -> np.ndarray:
    return np.array([x["bbox"] for x in entries], np.float64).reshape(-1, 4)
