"""Segmentations of COCO's format as bit masks, moved with their image.

A segmentation is a list of polygons [x0, y0, x1, y1, ...] in pixels, or run lengths {"size": [height, width], "counts"} down
the columns, beginning with what lies outside; ``counts`` is a list of numbers or pycocotools' text.
"""

import numpy as np
from detectron2.data import transforms as T
from pycocotools import mask as mask_util

from .issues import Issue
from .normalise import is_length

# Points beyond are moved there: the rasteriser's memory grows with the length of an outline.
REACH = (-10_000.0, 20_000.0)
MAX_COORDINATE = 1e9
NUMBERS = {int, float}


class MaskFault(ValueError):
    """Why a segmentation cannot be used; ``kind`` is MASK_FORM or MASK_SIZE."""

    def __init__(self, text: str, kind: Issue = Issue.MASK_FORM):
        super().__init__(text)
        self.kind = kind


def has_mask(annotation: dict) -> bool:
    """Whether an annotation has a segmentation that is not empty."""
    segmentation = annotation.get("segmentation")
    return segmentation is not None and (not hasattr(segmentation, "__len__") or len(segmentation) > 0)


def draw_mask(
    mask: np.ndarray, segmentation: list | dict | np.ndarray, transforms: T.TransformList, size: tuple[int, int]
) -> None:
    """Draws a mask of an augmented image.

    Polygons are moved and then drawn, which no crop has to cut; run lengths are decoded and then moved.

    Args:
        mask: (H, W) bool of the augmented image, all False; written to.
        segmentation: in pixels of the image as stored; an array of its size is taken as well.
        transforms: that the image has been through.
        size: (height, width) of the image as stored.

    Raises:
        MaskFault: the segmentation is neither polygons nor run lengths, or those of an image of another size.
    """
    if isinstance(segmentation, np.ndarray) and segmentation.shape == tuple(size):
        mask[:] = transforms.apply_segmentation(segmentation.astype(np.uint8)) == 1  # padding may have another value
    elif isinstance(segmentation, dict):
        mask[:] = transforms.apply_segmentation(decoded(segmentation, size)) == 1
    else:
        _draw([transforms.apply_coords(ring.copy()) for ring in polygons(segmentation)], mask)


def boxes_of(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) float32 absolute xyxy around (n, H, W) bool masks, and (n,) which masks are not empty.

    As Detectron2's ``BitMasks.get_bounding_boxes`` and ``nonempty``, in a tenth of the time.
    """
    columns, rows = masks.any(1), masks.any(2)
    ends = [x for flags in (columns, rows) for x in (flags.argmax(1), flags.shape[1] - flags[:, ::-1].argmax(1))]
    boxes = np.stack(ends, 1)[:, [0, 2, 1, 3]].astype(np.float32)
    return boxes, columns.any(1)


def polygons(segmentation) -> list[np.ndarray]:
    """One (n, 2) float64 array of points a polygon; raises MaskFault for what is none."""
    if not isinstance(segmentation, list | tuple) or not segmentation:
        raise MaskFault(f"{segmentation!r:.60} is neither a list of polygons nor run lengths")
    rings = [ring.tolist() if isinstance(ring, np.ndarray) else ring for ring in segmentation]
    for ring in rings:
        if reason := fault_of_ring(ring):
            raise MaskFault(reason)
    return [np.array(ring, np.float64).reshape(-1, 2) for ring in rings]


def fault_of_ring(ring) -> str:
    """Why a list is no polygon, "" if it is one."""
    if not isinstance(ring, list | tuple) or not NUMBERS.issuperset(map(type, ring)):
        return f"polygon {ring!r:.60} is no list of numbers"
    if len(ring) < 6 or len(ring) % 2:
        return f"a polygon has {len(ring)} coordinates; it needs x and y of 3 points or more"
    total = sum(ring)
    if total != total or min(ring) < -MAX_COORDINATE or max(ring) > MAX_COORDINATE:  # NaN equals nothing
        return "a polygon has coordinates that are not finite or beyond any image"
    return ""


def draw_polygons(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool, True inside any of the polygons (n, 2), by pycocotools; what lies outside is cut off."""
    mask = np.zeros(size, bool)
    _draw(rings, mask)
    return mask


def _draw(rings: list[np.ndarray], mask: np.ndarray) -> None:
    """Draws polygons into a mask; only their surroundings are looked at, which changes no pixel."""
    sides = np.array(mask.shape[::-1])
    # pycocotools rounds to fifths of a pixel, and then towards 0; done before the shift, the shift cannot change it.
    rings = [np.trunc(np.clip(ring, *REACH) * 5 + 0.5) / 5 for ring in rings]
    points = np.concatenate(rings)
    x0, y0 = np.clip(np.floor(points.min(0)) - 1, 0, sides).astype(int)
    x1, y1 = np.clip(np.ceil(points.max(0)) + 2, 0, sides).astype(int)
    if x0 < x1 and y0 < y1:
        window = [np.where(ring < 0, ring - 0.2, ring - (x0, y0)).ravel().tolist() for ring in rings]
        runs = mask_util.frPyObjects(window, y1 - y0, x1 - x0)
        mask[y0:y1, x0:x1] = mask_util.decode(mask_util.merge(runs))


def decoded(segmentation: dict, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8 mask of run lengths; raises MaskFault, see :func:`run_lengths`."""
    runs = run_lengths(segmentation, size)
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(size[1], size[0]).T


def run_lengths(segmentation: dict, size: tuple[int, int] | None) -> np.ndarray:
    """The run lengths as (n,) int64, checked, which pycocotools does not do: it would read and write past its memory.

    Args:
        segmentation: {"size", "counts"}.
        size: (height, width) of the image; None = not known, the run lengths' own is taken.

    Raises:
        MaskFault: the size is not that of the image, or the counts do not decode or do not fill it.
    """
    found, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(map(is_length, found)):
        raise MaskFault(f"run lengths have size {found!r:.60} instead of [height, width]")
    size = size or found
    if tuple(found) != tuple(size):
        raise MaskFault(
            f"run lengths are of a {found[1]}x{found[0]} image, but the image is {size[1]}x{size[0]} (width x height)",
            Issue.MASK_SIZE,
        )
    if isinstance(counts, str | bytes):
        runs = _decompressed(counts.encode("latin-1", "replace") if isinstance(counts, str) else counts)
    elif isinstance(counts, list | tuple) and all(type(x) is int and 0 <= x < 2**31 for x in counts):
        runs = np.array(counts, np.int64)
    else:
        raise MaskFault(f"counts of run lengths are {counts!r:.60}, neither numbers nor text")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise MaskFault(f"run lengths add up to {runs.sum()} pixels, but the image has {size[0] * size[1]}")
    return runs


def _decompressed(text: bytes) -> np.ndarray:
    """(n,) int64 counts of pycocotools' text: 5 bits a character, low ones first, from the third on as differences."""
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise MaskFault(f"counts {text[:40]!r} of run lengths do not decode")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 7:
        raise MaskFault(f"counts {text[:40]!r} of run lengths do not decode")
    place = np.arange(len(codes)) - np.repeat(first, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    values -= np.where(codes[last] & 16, 1 << (5 * lengths), 0)  # the highest bit is the sign
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def encoded(segmentation: list | dict | np.ndarray | None, size: tuple[int, int]) -> dict:
    """pycocotools' compressed run lengths of a segmentation in an image of (height, width); raises ValueError."""
    if isinstance(segmentation, dict):
        run_lengths(segmentation, size)
        whole = isinstance(segmentation["counts"], list | tuple)
        return mask_util.frPyObjects(segmentation, *size) if whole else segmentation
    drawn = segmentation if isinstance(segmentation, np.ndarray) else draw_polygons(polygons(segmentation), size)
    return mask_util.encode(np.asfortranarray(drawn, np.uint8))
