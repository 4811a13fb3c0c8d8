"""Whether the boxes of a file are written in another convention than COCO's [x, y, width, height] in pixels.

Decided over the whole file, and only where the boxes contradict COCO's convention and agree with another one throughout: a
few boxes that stick out, or small objects, say nothing. A file whose ``info`` has ``"bbox_format": "xywh"`` is believed.
"""

import numpy as np

CONVENTIONS = {
    "xyxy": "corners [x0, y0, x1, y1]",
    "cxcywh": "centres [cx, cy, width, height]",
    "yxhw": "[y, x, height, width] (unless it is the annotated widths and heights that are swapped)",
    "yxyx": "corners [y0, x0, y1, x1]",
}
NORMALISED = "normalised to 0..1"
CHOICES = ("xywh", *CONVENTIONS, *(f"{name}-normalised" for name in ("xywh", *CONVENTIONS)))  # of ``--boxes``
SHORTEST_SIDE = 8  # pixels; in a smaller image a pixel is so much that boxes prove nothing
FEWEST, FEWEST_OUT = 4, 3  # boxes, and those of them that stick out, below which nothing is concluded
REACH = 0.05  # by how much of the side of its image a box must stick out to count
SHARE, LARGE_SHARE, MANY = 0.25, 0.02, 100  # of the boxes that must stick out; of MANY and more boxes the smaller share


def declared(content: dict) -> bool:
    """Whether the file says itself that its boxes are COCO's."""
    info = content.get("info")
    return isinstance(info, dict) and info.get("bbox_format") == "xywh"


def to_xywh(boxes: np.ndarray, sizes: np.ndarray, convention: str) -> np.ndarray:
    """(A, 4) boxes of one of ``CHOICES`` in images of (A, 2) height and width -> [x, y, width, height] in pixels."""
    name, _, normal = convention.partition("-")
    a, b, c, d = boxes.T
    if name in ("yxhw", "yxyx"):
        a, b, c, d = b, a, d, c
    if name in ("xyxy", "yxyx"):
        c, d = c - a, d - b
    if name == "cxcywh":
        a, b = a - c / 2, b - d / 2
    height, width = sizes.T
    scales = [width, height] * 2 if normal else [1.0] * 4
    return np.stack([x * scale for x, scale in zip((a, b, c, d), scales, strict=True)], 1)


def other_convention(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What the boxes are instead of COCO's, in words; None where nothing speaks for it.

    Args:
        boxes: (A, 4) as written.
        sizes: (A, 2) height and width of their images, infinite where not known.
    """
    finite = np.isfinite(boxes).all(1)
    boxes, sizes = boxes[finite].astype(np.float64), sizes[finite].astype(np.float64)
    if not len(boxes):
        return None
    if _is_normalised(boxes, sizes):
        return NORMALISED
    known = np.isfinite(sizes).all(1) & (sizes.min(1) >= SHORTEST_SIDE)
    boxes, sizes = boxes[known], sizes[known]
    if len(boxes) < FEWEST or not _sticks_out(boxes, sizes):
        return None
    found = [words for name, words in CONVENTIONS.items() if fits(to_xywh(boxes, sizes, name), sizes).mean() >= 0.995]
    return " or ".join(found[:2]) or None


def only_first_pixels(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether fractional boxes fill 0..100 of images that are far larger, as percentages would."""
    known = np.isfinite(sizes).all(1) & np.isfinite(boxes).all(1)
    boxes, sizes = boxes[known], sizes[known]
    if len(boxes) < MANY or (boxes == np.round(boxes)).all() or sizes.min() < 200:
        return False
    ends = boxes[:, :2] + boxes[:, 2:]
    return bool(((boxes >= 0).all(1) & (ends <= 100.5).all(1)).all() and (ends.max(0) > 90).all())


def _is_normalised(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether at least half of the boxes lie in 0..1 and not all of them on whole numbers, in images of many pixels."""
    inside = ((boxes >= 0) & (boxes <= 1)).all(1) & (boxes[:, 2:] > 0).all(1)
    inside &= sizes.min(1) >= SHORTEST_SIDE
    fractional = (boxes[inside] != np.round(boxes[inside])).any()
    return bool(inside.sum() * 2 >= len(boxes) and fractional)


def _sticks_out(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether so many boxes stick out at the right or the bottom that they cannot be [x, y, width, height]."""
    reach = ((boxes[:, :2] + boxes[:, 2:]) / sizes[:, ::-1]).max(1) - 1
    out = int((reach > REACH).sum())
    return out >= max(FEWEST_OUT, len(boxes) * (SHARE if len(boxes) < MANY else LARGE_SHARE))


def fits(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) whether each xywh box has a positive size and lies in its image, up to a pixel."""
    ends = boxes[:, :2] + boxes[:, 2:]
    return (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] >= -1).all(1) & (ends <= sizes[:, ::-1] + 1).all(1)
