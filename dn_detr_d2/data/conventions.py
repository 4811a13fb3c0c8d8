"""Whether the boxes of a file are written in another convention than COCO's [x, y, width, height] in pixels.

Decided over the whole file, and only where many boxes contradict COCO's convention and nearly all agree with another one: a
few boxes that stick out, or small objects, say nothing, and a few bad boxes do not hide the convention of the others. A file
whose ``info`` has ``"bbox_format": "xywh"`` is believed.
"""

import numpy as np

CONVENTIONS = {
    "xyxy": "corners [x0, y0, x1, y1]",
    "cxcywh": "centres [cx, cy, width, height]",
    "yxhw": "[y, x, height, width] (unless it is the annotated widths and heights that are swapped)",
    "yxyx": "corners [y0, x0, y1, x1]",
}
NORMALISED = "normalised to 0..1"
UNITS = {"normalised": 1, "percent": 100, "thousandths": 1000}  # what the side of an image counts
NAMES = ("xywh", *CONVENTIONS)
CHOICES = (*NAMES, *(f"{name}-{unit}" for unit in UNITS for name in NAMES))  # of ``--boxes``
MIN_SIDE = 16  # pixels; in a smaller image a box proves nothing
MIN_BOXES, MIN_OUTSIDE = 4, 3  # boxes, and those of them that stick out, below which nothing is concluded
MIN_UNORDERED, UNORDERED = 12, 24  # boxes where numbers are not ordered as corners are; no misfit below the second
REACH = 0.05  # by how much of the side of its image a box must stick out to count
SHARE, LARGE_SHARE, MANY = 0.25, 0.02, 100  # of the boxes that must stick out; of MANY and more boxes the smaller share
FITTING, MISFITS = 0.9, 0.25  # share of boxes that must fit another convention; misfits for each that sticks out
SLACK = 4  # pixels, and at most REACH of the side, by which a box of another convention may lie outside
MIN_CLIPPED, MAX_CLIPPED = 8, 0.25  # of so many boxes and more, the largest share that is clipped without asking


def unit_of(convention: str) -> int | None:
    """What the side of an image counts in one of :data:`CHOICES`; None = its pixels."""
    return UNITS.get(convention.partition("-")[2])


def declared(content: dict) -> bool:
    """Whether the file says itself that its boxes are COCO's."""
    info = content.get("info")
    return isinstance(info, dict) and info.get("bbox_format") == "xywh"


def to_xywh(boxes: np.ndarray, sizes: np.ndarray, convention: str) -> np.ndarray:
    """(A, 4) boxes of one of ``CHOICES`` in images of (A, 2) height and width -> [x, y, width, height] in pixels."""
    name, _, unit = convention.partition("-")
    a, b, c, d = boxes.T
    if name in ("yxhw", "yxyx"):
        a, b, c, d = b, a, d, c
    if name in ("xyxy", "yxyx"):
        c, d = c - a, d - b
    if name == "cxcywh":
        a, b = a - c / 2, b - d / 2
    height, width = sizes.T
    scales = [width / UNITS[unit], height / UNITS[unit]] * 2 if unit else [1.0] * 4
    return np.stack([x * scale for x, scale in zip((a, b, c, d), scales, strict=True)], 1)


def other_convention(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What the boxes are instead of COCO's, in words; None where nothing speaks for it.

    Args:
        boxes: (A, 4) as written.
        sizes: (A, 2) height and width of their images, infinite where not known.
    """
    finite = np.isfinite(boxes).all(1)
    boxes, sizes = boxes[finite].astype(np.float64), sizes[finite].astype(np.float64)
    if _is_normalised(boxes, sizes):
        return NORMALISED
    boxes, sizes = _voting(boxes, sizes)
    if len(boxes) < MIN_BOXES or not _stick_out(boxes, sizes):
        return None
    out = int((_reach(boxes, sizes) > REACH).sum())
    found = [words for name, words in CONVENTIONS.items() if _agrees(boxes, sizes, name, out)]
    return " or ".join(found[:2]) or None


def too_many_to_clip(boxes: np.ndarray, sizes: np.ndarray) -> tuple[int, int] | None:
    """(boxes that stick out on any side by more than ``REACH`` of it, boxes) if they are so many that one should ask.

    Args:
        boxes: (A, 4) xywh in pixels.
        sizes: (A, 2) height and width of their images, infinite where not known.
    """
    boxes, sizes = _voting(boxes, sizes)
    reach = np.maximum(_reach(boxes, sizes), (-boxes[:, :2] / sizes[:, ::-1]).max(1, initial=-np.inf))
    out = int((reach > REACH).sum())
    return (out, len(boxes)) if len(boxes) >= MIN_CLIPPED and out > MAX_CLIPPED * len(boxes) else None


def only_first_pixels(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether fractional boxes fill 0..100 of images that are far larger, as percentages would."""
    known = np.isfinite(sizes).all(1) & np.isfinite(boxes).all(1)
    boxes, sizes = boxes[known], sizes[known]
    if len(boxes) < MANY or (boxes == np.round(boxes)).all() or sizes.min() < 200:
        return False
    ends = boxes[:, :2] + boxes[:, 2:]
    return bool(((boxes >= 0).all(1) & (ends <= 100.5).all(1)).all() and (ends.max(0) > 90).all())


def _voting(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes that say something about their convention: finite, not degenerate, in images of a known and usable size."""
    chosen = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)  # positive in every convention
    chosen &= np.isfinite(sizes).all(1) & (sizes.min(1, initial=np.inf) >= MIN_SIDE)
    return boxes[chosen].astype(np.float64), sizes[chosen].astype(np.float64)


def _is_normalised(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether at least half of the boxes lie in 0..1 and not all of them on whole numbers, in images of many pixels."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = boxes.astype(np.float32)  # the mapper's precision, in which a box may be degenerate
        positive = ((single[:, :2] + single[:, 2:]) > single[:, :2]).all(1)
    boxes, sizes = boxes[positive], sizes[positive]
    inside = ((boxes >= 0) & (boxes <= 1)).all(1) & (sizes.min(1, initial=np.inf) >= MIN_SIDE)
    fractional = (boxes[inside] != np.round(boxes[inside])).any()
    return bool(inside.sum() * 2 >= len(boxes) and fractional)


def _reach(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) how far each box sticks out at the right or the bottom, of the side of its image."""
    return ((boxes[:, :2] + boxes[:, 2:]) / sizes[:, ::-1]).max(1, initial=0) - 1


def _stick_out(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether so many boxes stick out at the right or the bottom that they cannot be [x, y, width, height]."""
    out = int((_reach(boxes, sizes) > REACH).sum())
    return out >= max(MIN_OUTSIDE, len(boxes) * (SHARE if len(boxes) < MANY else LARGE_SHARE))


def fits(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) whether each xywh box has a positive size and lies in its image, up to a pixel."""
    ends = boxes[:, :2] + boxes[:, 2:]
    return (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] >= -1).all(1) & (ends <= sizes[:, ::-1] + 1).all(1)


def _agrees(boxes: np.ndarray, sizes: np.ndarray, name: str, out: int) -> bool:
    """Whether nearly all boxes have a positive size and lie in their images in a convention, far more than in COCO's.

    Args:
        name: of ``CONVENTIONS``.
        out: how many boxes stick out when read in COCO's convention.
    """
    boxes = to_xywh(boxes, sizes, name)
    chosen = (boxes[:, 2:] != 0).all(1)  # a box of no size is a mistake in any convention
    boxes, sides, count = boxes[chosen], sizes[chosen][:, ::-1], int(chosen.sum())
    ordered = name in ("xyxy", "yxyx")
    if count < (MIN_BOXES if ordered else MIN_UNORDERED) or count * 2 < len(chosen):
        return False
    slack = np.clip(REACH * sides, 1, SLACK)
    fits = (boxes[:, 2:] > 0) & (boxes[:, :2] >= -slack) & (boxes[:, :2] + boxes[:, 2:] <= sides + slack)
    misfits = count - int(fits.all(1).sum())
    if not ordered and count < UNORDERED:
        return misfits == 0
    return misfits <= (1 - FITTING) * count and misfits <= MISFITS * out
