"""An annotation file without what a training would drop, clip or stumble over, where that needs no judgement.

    python tools/check_dataset.py ANNOTATIONS.json IMAGE_FOLDER --fix OUT.json

Boxes that are not finite, have no positive width and height or lie outside are dropped, those that stick out are clipped,
and annotations without a usable id of their own get a new number. Everything else needs a person and stays as it is.
"""

import itertools
from collections import Counter

import numpy as np

from . import report as r
from .coco_custom import is_id
from .columns import VERDICTS, Columns, clip_boxes

CLIPPED = VERDICTS.index(r.STICKS_OUT)


def repaired(content: dict, sizes: np.ndarray) -> tuple[dict, Counter]:
    """A repaired copy of the content of an annotation file.

    Args:
        content: stays as it is; entries that need no repair are shared.
        sizes: (I, 2) heights and widths of its images, see :func:`dn_detr_d2.data.check.annotated_sizes`.

    Returns:
        (content, {kind of ``REPAIRABLE``: annotations changed or dropped}).
    """
    columns = Columns.of(content, sizes)
    if not columns.entries:
        return content, Counter()
    verdicts, entries = columns.judged(), list(columns.entries)
    clipped, after = np.flatnonzero(verdicts == CLIPPED), np.where(verdicts == CLIPPED, 0, verdicts)
    for row in clipped:
        entries[row] = _with_box(entries[row], clip_boxes(columns.boxes[[row]], columns.sizes[[row]])[0])
    again = content | {"annotations": [entries[row] for row in clipped]}
    after[clipped] = Columns.of(again, sizes).judged()  # a box may be clipped to nothing
    kept = [entry for entry, verdict in zip(entries, after, strict=True) if verdict == 0]
    changes = Counter(VERDICTS[code] for code in verdicts[verdicts > 0])
    kept, numbered = _renumbered(kept)
    strangers = [entry for entry in content["annotations"] if not isinstance(entry, dict)]
    return content | {"annotations": kept + strangers}, changes + numbered


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
            changes[r.SAME_ANNOTATION_ID if is_id(value) else r.ANNOTATION_ID] += 1
            entry = entry | {"id": next(numbers)}
        seen.add(entry["id"])
        result.append(entry)
    return result, changes
