"""One paragraph about a training set in the log, before the first iteration; no image is read.

It is made from the records that are loaded anyway, and kept in the cache folder under the annotation file's SHA-256 and the
number of images.
"""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..utils.files import atomic_write, sha256_of
from .check import annotated_sizes
from .columns import VERDICTS, judge_boxes
from .issues import Issue
from .semantic import is_semantic
from .shapes import cache_folder

logger = logging.getLogger(__name__)

VERSION = 3  # part of the file's name; raise it when the summary changes


def log_summary(name: str, records: list[dict], num_queries: int) -> int:
    """Says how many images and boxes a training set has, what will be dropped or clipped, and its fullest image.

    Args:
        name: of a registered data set.
        records: its dataset dicts.
        num_queries: NUM_QUERIES of the model, which bounds the objects that an image can have; 0 = it has no queries.

    Returns:
        int: boxes that are trained on, of a semantic set images.
    """
    if records and all(map(is_semantic, records)):
        logger.info("%s: %d images with semantic maps, which are read one by one", name, len(records))
        return len(records)
    found = _cached(name, records)
    problems = "; ".join(f"{count} x {kind}" for kind, count in found["problems"].items()) or "none"
    crowded = 0 < num_queries < found["fullest"]
    logger.log(
        logging.WARNING if crowded else logging.INFO,
        "%s: %d images (%d without boxes), %d boxes, %d crowds; boxes that are dropped or clipped: %s; the fullest image %s "
        "has %d objects%s%s. dn-detr check lists everything and reads the images",
        name,
        found["images"],
        found["empty"],
        found["boxes"],
        found["crowds"],
        problems,
        records[found["fullest_at"]]["file_name"] if records else "",
        found["fullest"],
        f", NUM_QUERIES is {num_queries}" if num_queries else "",
        ": the rest of its objects is not learned" if crowded else "",
    )
    dropped = sum(count for kind, count in found["problems"].items() if kind != Issue.STICKS_OUT)
    return found["boxes"] - dropped


def _cached(name: str, records: list[dict]) -> dict:
    """The summary from the cache if as many images of the annotation file have been summarised before.

    A function of the user's may return a part of the file that its metadata name.
    """
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("panoptic_json") or metadata.get("json_file")
    if not json_file or not os.path.isfile(json_file):
        return summarise(records)
    kept = cache_folder().parent / f"summary-v{VERSION}" / f"{sha256_of(json_file)}-{len(records)}.json"
    if kept.is_file():
        try:
            return json.loads(kept.read_bytes())
        except ValueError:
            logger.warning("%s is damaged and made anew", kept)
    found = summarise(records)
    _write(kept, found)
    return found


def _write(path: Path, found: dict) -> None:
    """Writes the summary atomically; a cache that cannot be written is only a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w", draft=path.with_suffix(f".{os.getpid()}.part")) as file:
            file.write(json.dumps(found))
    except OSError as error:
        logger.warning("the summary of a data set cannot be kept in %s: %s", path.parent, error.strerror)


def summarise(records: list[dict]) -> dict:
    """Counts of dataset dicts, of ``BoxMode.XYWH_ABS`` or ``XYXY_ABS``; boxes are judged as by the mapper."""
    counts, boxes, crowds = [], [], 0
    for record in records:
        usable = [x for x in record.get("annotations", []) if not x.get("iscrowd", 0)]
        crowds += len(record.get("annotations", [])) - len(usable)
        counts.append(len(usable))
        boxes += [_corners(x) for x in usable]
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = annotated_sizes(records).repeat(counts, 0).astype(np.float32)
        judged = judge_boxes(np.array(boxes, np.float32).reshape(-1, 4), sizes)
    problems = Counter(VERDICTS[code] for code in judged[judged > 0])
    fullest = int(np.argmax(counts)) if counts else 0
    return {
        "images": len(records),
        "empty": counts.count(0),
        "boxes": len(boxes),
        "crowds": crowds,
        "problems": {kind: problems[kind] for kind in VERDICTS[1:] if problems[kind]},
        "fullest": max(counts, default=0),
        "fullest_at": fullest,
    }


def _corners(annotation: dict) -> list[float]:
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y + h] if annotation["bbox_mode"] == BoxMode.XYWH_ABS else [x, y, w, h]
