#!/usr/bin/env python3
"""Times COCO's AP by pycocotools, Detectron2's compiled form of it and faster-coco-eval on made-up results.

    python dev/benchmark_evaluation.py
    python dev/benchmark_evaluation.py --images 500 --rounds 3

Sizes are those of val2017: 5000 images, 80 classes, 36,000 objects, 100 detections an image. All get the same detections in
the same process, one after the other. The table has seconds of CPU time for evaluate(), accumulate() and summarize(), the
ratio to the first row, and the largest difference of the precisions, scores and recalls from it. Exit code 2: bad input.
"""

import argparse
import contextlib
import copy
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tabulate import tabulate

from dn_detr_d2 import ConfigError
from dn_detr_d2.command_line import run_command

# isort: split
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr_d2.evaluation.coco_evaluator import eval_class

SIDES = (480, 640)  # height and width of every image
HEADERS = ("by", "seconds", "ratio", "difference")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="images (default 5000)")
    parser.add_argument("--detections", type=int, default=100, metavar="N", help="detections an image (default 100)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of which the median is taken (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the boxes (default 0)")
    return parser.parse_args(argv)


def made_up(images: int, detections: int, seed: int) -> tuple[COCO, COCO]:
    """Ground truth and detections: most detections lie near an object, the others anywhere."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(7.2, images)
    boxes = [_boxes(rng, count) for count in counts]
    labels = [rng.integers(1, 81, count) for count in counts]
    annotations, results = [], []
    for image, (near, kinds) in enumerate(zip(boxes, labels, strict=True), 1):
        for box, label in zip(near.tolist(), kinds.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": int(rng.random() < 0.01)})
        results += _detections(rng, image, near, kinds, detections)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": SIDES[0], "width": SIDES[1]} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        return truth, truth.loadRes(results)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) xywh inside the image."""
    sides = rng.uniform(0.02, 0.6, (count, 2)) ** 1.5 * SIDES[::-1]
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (SIDES[::-1] - sides), sides], 1)


def _detections(rng: np.random.Generator, image: int, near: np.ndarray, labels: np.ndarray, count: int) -> list[dict]:
    boxes, kinds = _boxes(rng, count), rng.integers(1, 81, count)
    if len(near):
        chosen = rng.integers(0, len(near), count * 2 // 3)
        moved = near[chosen] * (1 + rng.normal(0, 0.1, (len(chosen), 4)))
        boxes[: len(chosen)], kinds[: len(chosen)] = moved, labels[chosen]
    scores = rng.random(count)
    return [
        {"image_id": image, "category_id": kind, "bbox": box, "score": score}
        for box, kind, score in zip(boxes.tolist(), kinds.tolist(), scores.tolist(), strict=True)
    ]


def compare(args: argparse.Namespace) -> str:
    """Evaluates by all three; returns the table."""
    for name in ("images", "detections", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    truth, found = made_up(args.images, args.detections, args.seed)
    kinds = {
        "pycocotools": COCOeval,
        "Detectron2 (TEST.COCO_EVAL pycocotools)": eval_class("pycocotools", usual=True),
        "faster-coco-eval (TEST.COCO_EVAL faster_coco_eval)": eval_class("faster_coco_eval", usual=True),
    }
    seconds, results = {name: [] for name in kinds}, {}
    for _ in range(args.rounds):
        for name, kind in kinds.items():
            spent, results[name] = timed(kind, truth, found)
            seconds[name].append(spent)
    first, *_ = kinds
    base = float(np.median(seconds[first]))
    rows = []
    for name in kinds:
        own = float(np.median(seconds[name]))
        gap = max(float(np.abs(results[name][key] - results[first][key]).max()) for key in results[first])
        rows.append([name, f"{own:.1f}", f"{base / own:.2f}x", f"{gap:.0e}"])
    total = len(truth.anns), len(found.anns)
    return f"{args.images} images, {total[0]} objects, {total[1]} detections\n\n" + tabulate(
        rows, HEADERS, tablefmt="github"
    )


def timed(kind, truth: COCO, found: COCO) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds of CPU time of one evaluation, and what it gives."""
    evaluation = kind(copy.copy(truth), copy.copy(found), "bbox")
    evaluation.params.maxDets = [1, 10, 100]
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    spent = time.process_time() - start
    return spent, {key: np.array(evaluation.eval[key]) for key in ("precision", "scores", "recall")}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(compare(args)))


if __name__ == "__main__":
    sys.exit(main())
