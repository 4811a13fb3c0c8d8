"""Ground truth and predictions of the last evaluation as supervision's Detections, image by image."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import supervision as sv
from scipy.optimize import linear_sum_assignment

from ..data.registered import records_of, register_data_sets
from ..errors import DatasetError, UserError
from ..evaluation.coco_evaluator import RESULTS, written_classes, xywh_of


@dataclass
class Evaluated:
    """What a model has found in a data set.

    Attributes:
        name: of the data set.
        classes: names of the classes.
        records: one an image.
        truths: objects of each image, without crowds; ``class_id`` is the place in ``classes``.
        found: detections of each image, of any score.
    """

    name: str
    classes: list[str]
    records: list[dict]
    truths: list[sv.Detections]
    found: list[sv.Detections]


def read_evaluated(cfg, folder: Path) -> Evaluated:
    """What the last evaluation has predicted, with the ground truth of its data set, the first of DATASETS.TEST.

    Args:
        cfg: of the training.
        folder: of that evaluation, see :func:`~dn_detr_d2.evaluation.inference_folder`.

    Raises:
        DatasetError: there are no predictions, the data set has no boxes or is not at hand, or the predictions are of
            another one.
        UserError: the file is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; evaluate a detector (TEST.EVAL_PERIOD, DATASETS.TEST) for it")
    name = cfg.DATASETS.TEST[0]
    register_data_sets(cfg, [name])
    records = records_of(name)
    if not any("annotations" in record for record in records):
        raise DatasetError(f"data set {name!r} has no boxes to compare predictions with")
    names, ids = written_classes(name)
    entries = _read(path)
    ids = ids or sorted({x["category_id"] for x in entries} | {x["category_id"] for x in _annotations(records)})
    numbers = {category: i for i, category in enumerate(ids)}
    by_image = defaultdict(list)
    for x in entries:
        by_image[x["image_id"]].append(x)
    if strange := [x for x in by_image if x not in {record["image_id"] for record in records}]:
        raise DatasetError(f"{path} has predictions for image {strange[0]!r}, which is not in data set {name!r}")
    if strange := [x["category_id"] for x in entries if x["category_id"] not in numbers]:
        raise DatasetError(f"{path} has predictions of category {strange[0]!r}, which data set {name!r} does not have")
    truths = [_truth(record) for record in records]
    found = [_found(by_image[record["image_id"]], numbers) for record in records]
    return Evaluated(name, names or [str(x) for x in ids], records, truths, found)


def _annotations(records: list[dict]) -> list[dict]:
    return [x for record in records for x in record.get("annotations", [])]


def _read(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_text())
        for x in entries:
            if len(x["bbox"]) != 4 or not np.isfinite([*x["bbox"], x["score"]]).all():
                raise ValueError(f"a prediction has the box {x['bbox']} and the score {x['score']}")
            hash((x["image_id"], x["category_id"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}); evaluate once more") from None
    return entries


def _truth(record: dict) -> sv.Detections:
    objects = [x for x in record.get("annotations", []) if not x.get("iscrowd", 0)]
    return _detections([xywh_of(x) for x in objects], [x["category_id"] for x in objects])


def _found(entries: list[dict], numbers: dict) -> sv.Detections:
    labels = [numbers[x["category_id"]] for x in entries]
    found = _detections([x["bbox"] for x in entries], labels, [x["score"] for x in entries])
    if entries and all("segmentation" in x for x in entries):
        found.data["segmentation"] = np.array([x["segmentation"] for x in entries], dtype=object)
    return found


def _detections(boxes: list, labels: list[int], scores: list[float] | None = None) -> sv.Detections:
    """Of (n, 4) xywh boxes."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    confidence = None if scores is None else np.array(scores, np.float64)
    return sv.Detections(corners, class_id=np.array(labels, int), confidence=confidence)


def quality(truth: sv.Detections, found: sv.Detections) -> float:
    """How well the objects of an image are found, 0 to 1: panoptic quality of the boxes, all classes together.

    The sum of the IoU of pairs, over their number and half of what has no partner. A pair has one class and an IoU above
    0.5. 1 for an image without objects and detections.
    """
    if not len(truth) and not len(found):
        return 1.0
    overlap = (
        sv.box_iou_batch(truth.xyxy, found.xyxy) if len(truth) and len(found) else np.zeros((len(truth), len(found)))
    )
    overlap = np.where((truth.class_id[:, None] == found.class_id) & (overlap > 0.5), overlap, 0)
    pairs = overlap[linear_sum_assignment(-overlap)]
    return 2 * float(pairs.sum()) / (len(truth) + len(found))
