#!/usr/bin/env python3
"""Plants annotation errors in a COCO-format file, and measures how well find_label_errors.py has found them.

    python dev/plant_errors.py annotations.json --output planted.json --rate 0.05
    python dev/plant_errors.py planted.json --found label_errors/label_errors.csv
    python dev/plant_errors.py planted.json --predictions inference/coco_instances_results.json

The first writes planted.json with four kinds of errors, each for so many of the annotations: another class, drawn uniformly;
a box moved by 30 % to 50 % of its width and height; a box of another object's size around nothing; a box that is left out.
The second measures the ranking made from planted.json: of each kind the area under the ROC curve (the chance that a planted
error is ranked before a right annotation), and precision and recall at several lengths of the list. The third measures the
scores of cleanlab's ObjectLab (pip install 'dn_detr_d2[label-errors]') from a model's detections on planted.json.
"""

import argparse
import csv
import itertools
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from pycocotools import mask as mask_util
from scipy.stats import mannwhitneyu
from tabulate import tabulate

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.command_line import require_new_file, run_command
from dn_detr_d2.diagnostics.annotation_errors import BOX, CLASS, KINDS, MISSING, SPURIOUS

PLANTED = "planted_errors"  # key of the written file: [{"kind", "image_id", "id", "bbox"}], bbox of what is missing
SHIFT = (0.3, 0.5)  # of width and height
FREE_IOU = 0.1  # a box around nothing overlaps no annotated box by more
TRIES = 200
FOUND_IOU = 0.5  # a suggested box that overlaps a missing one by so much has found it
HEADERS = ("kind", "planted", "among", "AUC", *(f"precision, first {part}" for part in ("1/4", "1/2", "all")), "recall")


def plant(content: dict, rate: float, seed: int, kinds: Iterable[str] = KINDS) -> dict:
    """A COCO-format dict with errors, and the list of them under :data:`PLANTED`.

    Args:
        content: left as it is. Crowds stay as they are.
        rate: errors of each kind, as a share of the annotations.
        seed: which annotations, and what becomes of them.
        kinds: of :data:`~dn_detr_d2.diagnostics.annotation_errors.KINDS`.

    Raises:
        UserError: a rate outside of [0, 1 / number of kinds].
        DatasetError: fewer than two categories for wrong classes, or no room for a box.
    """
    kinds = list(kinds)
    if not 0 <= rate <= 1 / len(kinds):
        raise UserError(f"--rate must lie in [0, {1 / len(kinds):g}] for {len(kinds)} kinds of errors, got {rate}")
    categories = [category["id"] for category in content["categories"]]
    if CLASS in kinds and len(categories) < 2:
        raise DatasetError(f"labels can only be changed where there are at least 2 categories, got {len(categories)}")
    generator, annotations = random.Random(seed), content["annotations"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    usable = [i for i, annotation in enumerate(annotations) if not annotation.get("iscrowd", 0)]
    count = int(rate * len(usable))
    chosen = generator.sample(usable, count * len(kinds))
    victims = {kind: set(chosen[k * count : (k + 1) * count]) for k, kind in enumerate(kinds)}
    others = iter(sorted(set(usable) - set(chosen)))
    victims |= {BOX: {with_room(i, others, annotations, sizes) for i in chosen if i in victims.get(BOX, ())}}
    kind_of = {i: kind for kind, of_kind in victims.items() if kind != SPURIOUS for i in of_kind}
    result, planted = [], []
    for i, annotation in enumerate(annotations):
        kind = kind_of.get(i)
        if kind == CLASS:
            others = [category for category in categories if category != annotation["category_id"]]
            annotation = annotation | {"category_id": generator.choice(others)}
        elif kind == BOX:
            annotation = moved(annotation, sizes[annotation["image_id"]], generator)
        if kind:
            planted.append(
                {
                    "kind": kind,
                    "image_id": annotation["image_id"],
                    "id": annotation["id"],
                    "bbox": annotations[i]["bbox"],
                }
            )
        if kind != MISSING:
            result.append(annotation)
    next_id = max((x["id"] for x in annotations), default=0) + 1
    boxes = defaultdict(list)
    for annotation in annotations:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    for i in sorted(victims.get(SPURIOUS, ())):
        image_id, box = free_box(annotations[i]["bbox"][2:], sizes, boxes, generator)
        boxes[image_id].append(box)
        size = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        result.append({"id": next_id, "image_id": image_id, "category_id": generator.choice(categories), **size})
        planted.append({"kind": SPURIOUS, "image_id": image_id, "id": next_id, "bbox": box})
        next_id += 1
    return content | {"annotations": result, PLANTED: planted}


def with_room(chosen: int, others: Iterator[int], annotations: list[dict], sizes: dict) -> int:
    """The annotation that was chosen, or the next of the others, whose box can be moved far enough to be an error.

    Raises:
        DatasetError: there is none left.
    """
    for i in itertools.chain([chosen], others):
        x, y, w, h = annotations[i]["bbox"]
        width, height = sizes[annotations[i]["image_id"]]
        if max(x, width - w - x) >= SHIFT[0] * w and max(y, height - h - y) >= SHIFT[0] * h:
            return i
    raise DatasetError("no other box has room to be moved in its image; lower --rate, or leave --kinds box out")


def moved(annotation: dict, size: tuple[int, int], generator: random.Random) -> dict:
    """The annotation with its box elsewhere in the image (width, height); its mask, if it has one, is left out."""
    x, y, w, h = annotation["bbox"]
    place = []
    for start, length, side in ((x, w, size[0]), (y, h, size[1])):
        shift = generator.uniform(*SHIFT) * length * generator.choice((-1, 1))
        ways = [x for x in (start + shift, start - shift) if 0 <= x <= side - length]
        farthest = max(0, side - length, key=lambda x: abs(x - start))  # where neither way is long enough
        place.append(ways[0] if ways else farthest)
    kept = {key: value for key, value in annotation.items() if key != "segmentation"}
    return kept | {"bbox": [*place, w, h]}


def free_box(wanted: list[float], sizes: dict, boxes: dict, generator: random.Random) -> tuple[int, list[float]]:
    """(image, box) of this width and height that no annotated box overlaps much."""
    w, h = wanted
    for _ in range(TRIES):
        image_id = generator.choice(list(sizes))
        width, height = sizes[image_id]
        if w < width and h < height:
            box = [generator.uniform(0, width - w), generator.uniform(0, height - h), w, h]
            if max(overlaps(box, boxes[image_id]), default=0) <= FREE_IOU:
                return image_id, box
    raise DatasetError(f"no image has room for a box of {w:g} x {h:g} around nothing; leave --kinds spurious out")


def overlaps(box: list[float], others: list[list[float]]) -> list[float]:
    """IoU of a box with each of the others, all (x, y, width, height)."""
    return mask_util.iou([box], others, [0] * len(others))[0].tolist() if others else []


def hits_of(kind: str, ranking: list[dict], planted: list[dict]) -> list[bool]:
    """Whether each row of a ranking of one kind is a planted error of that kind; rows of other planted errors are left out.

    What is missing is found by the first box that overlaps it, of several missing objects the nearest; later boxes are left
    out as well.
    """
    if kind != MISSING:
        ids = defaultdict(set)
        for error in planted:
            ids[error["kind"]].add(str(error["id"]))
        others = set().union(*(ids[other] for other in ids if other != kind))
        return [row["annotation"] in ids[kind] for row in ranking if row["annotation"] not in others]
    wanted, hits = defaultdict(list), []
    for error in planted:
        wanted[str(error["image_id"])].append([error["kind"], error["bbox"], False])
    for row in ranking:
        x0, y0, x1, y1 = (float(row[f"suggested_{key}"]) for key in ("x0", "y0", "x1", "y1"))
        box = [x0, y0, x1 - x0, y1 - y0]
        here = wanted[str(row["image_id"])]
        found = overlaps(box, [error[1] for error in here])
        near = [(iou, error) for error, iou in zip(here, found, strict=True) if iou >= FOUND_IOU]
        left = [pair for pair in near if pair[1][0] == MISSING and not pair[1][2]]
        if left:
            max(left, key=lambda pair: pair[0])[1][2] = True
            hits.append(True)
        elif not near:
            hits.append(False)
    return hits


def measures(hits: list[bool], count: int) -> list[str]:
    """AUC, precision among the first 1/4, 1/2 and all of ``count``, and recall among the first ``count``."""
    places, number = np.arange(len(hits)), sum(hits)
    auc = math.nan
    if 0 < number < len(hits):
        chosen = np.array(hits)
        auc = mannwhitneyu(places[~chosen], places[chosen]).statistic / (number * (len(hits) - number))
    firsts = [max(round(count * part), 1) for part in (0.25, 0.5, 1)]
    return [f"{auc:.3f}", *(f"{sum(hits[:first]) / first:.3f}" for first in firsts), f"{sum(hits[:count]) / count:.3f}"]


def table(rankings: dict[str, list[dict]], planted: list[dict]) -> str:
    """A line for each kind: ``rankings`` of rows as in label_errors.csv, most suspicious first."""
    rows = []
    for kind, ranking in rankings.items():
        count = sum(error["kind"] == kind for error in planted)
        if count:
            hits = hits_of(kind, ranking, planted)
            rows.append([kind, count, len(hits), *measures(hits, count)])
    if not rows:
        raise DatasetError(f"there are no planted errors of the kinds {', '.join(rankings)}")
    return tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def rankings_of(path: str) -> dict[str, list[dict]]:
    """The rows of label_errors.csv by kind."""
    result = defaultdict(list)
    with open(path, newline="", encoding="utf-8", errors="backslashreplace") as file:
        for row in csv.DictReader(file):
            result[row["kind"]].append(row)
    return result


def cleanlab_rankings(
    content: dict, detections: list[dict], low: float = 0.5, high: float = 0.95
) -> dict[str, list[dict]]:
    """Rankings out of the scores of ObjectLab (Tkachenko et al., 2023): swapped, badly located and overlooked boxes.

    Args:
        content: COCO-format dict with planted errors.
        detections: of a model, as Detectron2's evaluation writes them.
        low, high: cleanlab's thresholds of scores: boxes are compared with detections above the first, and where they are
            missing or of another class with those above the second. The defaults are its own.

    Raises:
        UserError: cleanlab is not installed.
    """
    try:
        from cleanlab.object_detection import rank
    except ImportError as error:
        raise UserError("--predictions needs cleanlab; pip install 'dn_detr_d2[label-errors]' brings it") from error
    number = {category["id"]: i for i, category in enumerate(content["categories"])}
    own, found = defaultdict(list), defaultdict(lambda: [[] for _ in number])
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):  # which our ranking does not judge
            own[annotation["image_id"]].append(annotation)
    for x in detections:
        found[x["image_id"]][number[x["category_id"]]].append([*corners(x["bbox"]), x["score"]])
    images = [image["id"] for image in content["images"]]
    labels = [
        {
            "bboxes": np.array([corners(x["bbox"]) for x in own[i]]).reshape(-1, 4),
            "labels": np.array([number[x["category_id"]] for x in own[i]], int),
        }
        for i in images
    ]
    predictions = [
        np.array([np.array(of_class).reshape(-1, 5) for of_class in found[i]] + [None], dtype=object)[:-1]
        for i in images
    ]
    result = {}
    confident = {"high_probability_threshold": high}
    scored = {
        CLASS: partial(rank.compute_swap_box_scores, **confident),
        BOX: partial(rank.compute_badloc_box_scores, low_probability_threshold=low),
    }
    for kind, function in scored.items():
        scores = function(labels=labels, predictions=predictions)
        rows = [
            (quality, {"annotation": str(x["id"])})
            for i, of_image in zip(images, scores, strict=True)
            for x, quality in zip(own[i], of_image, strict=True)
        ]
        result[kind] = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    overlooked, rows = rank.compute_overlooked_box_scores(labels=labels, predictions=predictions, **confident), []
    for i, of_image in zip(images, overlooked, strict=True):
        boxes = [box for of_class in found[i] for box in of_class]
        for box, quality in zip(boxes, of_image, strict=True):
            if not np.isnan(quality):
                place = dict(
                    zip(("suggested_x0", "suggested_y0", "suggested_x1", "suggested_y1"), box[:4], strict=True)
                )
                rows.append((quality, {"image_id": i, **place}))
    result[MISSING] = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return result


def corners(box: list[float]) -> list[float]:
    """xyxy of (x, y, width, height)."""
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "annotations", metavar="JSON", help="in COCO format; with --found or --predictions what was written"
    )
    parser.add_argument("--output", metavar="JSON", help="write the annotations with errors")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of errors (default: all)")
    parser.add_argument("--rate", type=float, default=0.05, help="errors of each kind over annotations (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="which annotations, and to what (default 0)")
    parser.add_argument("--found", metavar="CSV", help="label_errors.csv of find_label_errors.py on the planted file")
    parser.add_argument("--predictions", metavar="JSON", help="detections on the planted file, for cleanlab's scores")
    parser.add_argument(
        "--thresholds",
        nargs=2,
        type=float,
        default=[0.5, 0.95],
        metavar=("LOW", "HIGH"),
        help="of cleanlab, for a model whose scores are low (default: its own, 0.5 0.95)",
    )
    return parser.parse_args(argv)


def plant_or_measure(args: argparse.Namespace) -> None:
    """Writes the file with errors, or prints how many of them were found."""
    if bool(args.output) == bool(args.found or args.predictions):
        raise UserError("give either --output to plant errors, or --found or --predictions to measure what was found")
    content = json.loads(Path(args.annotations).read_text())
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("annotations"), list)
        or not content.get("categories")
    ):
        raise DatasetError(f"{args.annotations} is no annotation file in COCO format with annotations and categories")
    if args.output:
        require_new_file(args.output, "--output")
        Path(args.output).write_text(json.dumps(plant(content, args.rate, args.seed, args.kinds)))
        return
    if PLANTED not in content:
        raise DatasetError(f"{args.annotations} has no {PLANTED!r}: it was not written by --output; plant errors first")
    if args.found:
        print(table(rankings_of(args.found), content[PLANTED]))
    if args.predictions:
        detections = json.loads(Path(args.predictions).read_text())
        print(table(cleanlab_rankings(content, detections, *args.thresholds), content[PLANTED]))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: plant_or_measure(args), errors=(UserError, OSError, json.JSONDecodeError))


if __name__ == "__main__":
    sys.exit(main())
