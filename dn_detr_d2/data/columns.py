"""The annotations of a file as arrays; all boxes are checked at once, as the mapper's BoxChecker does one by one.

I images, A annotations. Boxes are absolute xyxy in float32, the mapper's precision. A *row* is the index of an entry among
those of its list that are objects.
"""

from dataclasses import dataclass

import numpy as np

from .issues import Issue
from .mapper import ROUNDING
from .normalise import as_box, is_id, objects_of

# In the order in which the mapper checks.
VERDICTS = (None, Issue.NOT_FINITE, Issue.NOT_POSITIVE, Issue.BOX_OUTSIDE, Issue.STICKS_OUT)


@dataclass(frozen=True)
class Columns:
    """A list of annotations as arrays.

    Attributes:
        entries: the A annotations, without those that are no objects.
        image, category: (A,) rows of what they refer to, -1 = nothing.
        crowd: (A,) bool.
        formed: (A,) bool, whether the box is four numbers.
        boxes: (A, 4) float32, absolute xyxy; 0 where it is not formed.
        sizes: (A, 2) float32, (height, width) of the image in pixels; infinite where not known.
    """

    entries: list[dict]
    image: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    formed: np.ndarray
    boxes: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, content: dict, sizes: np.ndarray) -> "Columns":
        """From the content of a file and ``sizes`` (I, 2) of its images."""
        entries = objects_of(content, "annotations")
        image = _rows(entries, "image_id", objects_of(content, "images"))
        raw = [as_box(entry.get("bbox")) for entry in entries]
        formed = np.array([box is not None for box in raw], bool)
        boxes = np.array([box or [0.0] * 4 for box in raw], np.float64).reshape(-1, 4)
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, as in the mapper
            boxes = boxes.astype(np.float32)
            boxes[:, 2:] += boxes[:, :2]
        crowd = np.array([is_crowd(entry) for entry in entries], bool)
        known = np.concatenate([sizes, np.full((1, 2), np.inf)]).astype(np.float32)  # row -1 is unknown
        category = _rows(entries, "category_id", objects_of(content, "categories"))
        return cls(entries, image, category, crowd, formed, boxes, known[image])

    def judged(self) -> np.ndarray:
        """(A,) what happens to each box in training, an index of ``VERDICTS``; 0 for crowds, which are not checked."""
        verdicts = judge_boxes(self.boxes, self.sizes)
        return np.where(self.formed & ~self.crowd & (self.image >= 0), verdicts, 0)


def judge_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What the mapper does with each box: (A, 4) absolute xyxy and (A, 2) heights and widths -> (A,) ``VERDICTS`` index."""
    with np.errstate(invalid="ignore"):
        clipped = clip_boxes(boxes, sizes)
        reach = np.abs(boxes - clipped).max(1, initial=0)
        conditions = (
            ~np.isfinite(boxes).all(1),
            (boxes[:, 2:] <= boxes[:, :2]).any(1),
            (clipped[:, 2:] <= clipped[:, :2]).any(1),
            reach > ROUNDING,
        )
    return np.select(conditions, range(1, len(VERDICTS)), 0)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A, 4) absolute xyxy boxes inside images of (A, 2) heights and widths."""
    low = np.maximum(boxes[:, :2], 0)
    return np.concatenate([low, np.minimum(boxes[:, 2:], sizes[:, ::-1])], 1)


def is_crowd(entry: dict) -> bool:
    """Whether an annotation is marked as a crowd."""
    return entry.get("iscrowd", 0) in (1, True)


def _rows(entries: list[dict], field: str, targets: list[dict]) -> np.ndarray:
    """(A,) the row of the target whose id is in ``field``; -1 = none."""
    rows = {}
    for i, target in enumerate(targets):
        if is_id(target.get("id")):
            rows.setdefault(target["id"], i)
    values = (entry.get(field) for entry in entries)
    return np.array([rows.get(value, -1) if is_id(value) else -1 for value in values], np.int64)
