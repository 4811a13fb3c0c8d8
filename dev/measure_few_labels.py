#!/usr/bin/env python3
"""What do images without annotations give to a set with few? Trains on 5, 10, 20 and 100 % of BCCD's labels.

    python dev/measure_few_labels.py --bccd datasets --output docs/evidence
    python dev/measure_few_labels.py --bccd datasets --output docs/evidence --report

--bccd is the folder that holds bccd/. Which images are annotated is fixed: dev/few_labels/*.txt. All trainings have the
model of configs/bccd.yaml and equally many iterations with annotated images; they differ in what becomes of the images that
are not annotated: nothing, pseudo labels, or a pretraining, as long as the training itself, on regions of all images
(tools/propose_regions.py). Trainings that have ended are taken from --runs; an interrupted one is resumed. Writes
few_labels.md, few_labels.png and few_labels.json, the values of both. What few_labels.json already holds of other seeds is
reported again, so the parts of the plan can be trained on several machines. Exit code 2: bad input.
"""

import argparse
import contextlib
import io
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from dev.ablate_bccd import METRICS, check_arguments, last, train
from dev.compare_runs import machine
from dn_detr_d2 import UserError
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.data import load_coco_json
from dn_detr_d2.data.check_set import write_json
from dn_detr_d2.data.split import split_by_ids
from dn_detr_d2.modeling.postprocess import class_wise_nms
from dn_detr_d2.visualization.curves import spread
from dn_detr_d2.visualization.runs import Run
from dn_detr_d2.visualization.style import colour, new_figure, save
from tools.propose_regions import content_of

RESULTS, SECONDS, SEEDS = "few_labels.json", "seconds an iteration", "seeds"
DISTINCT, NMS_IOU = "AP with NMS", 0.7
LISTS = Path(__file__).resolve().parent / "few_labels"
SHORT = {"SOLVER.MAX_ITER": 800, "TEST.EVAL_PERIOD": 200, "SOLVER.CHECKPOINT_PERIOD": 100, "DATALOADER.NUM_WORKERS": 0}
SHORT |= {"MODEL_EMA.WARMUP": True}  # or the teacher lags behind the model
# With this threshold an image has as many pseudo labels as objects, about 14, from the burn-in on.
SEMI = {"SEMI_SUPERVISED.ENABLED": True, "SEMI_SUPERVISED.BURN_IN": 200, "SEMI_SUPERVISED.THRESHOLD": 0.3}
ALONE, OURS = "annotated images alone", "pseudo labels in matching and denoising"
REGIONS, FROZEN = "pretrained on regions", "pretrained on regions, the backbone frozen"
BACKBONE = {"MODEL.FREEZE": ["backbone"]}  # as DETReg has it: the backbone keeps what ImageNet has taught it
PLAIN = {"SEMI_SUPERVISED.WEIGHTED": False, "SEMI_SUPERVISED.NOISE_GROWTH": 0.0}
AS_STRONGLY = {"SEMI_SUPERVISED.DENOISING_WEIGHT": 4.0}  # as what is matched, SEMI_SUPERVISED.LOSS_WEIGHT
MATCHING, DENOISING = ({"SEMI_SUPERVISED.LOSSES": (name,)} for name in ("matching", "denoising"))
# What becomes of the images without annotations -> the overrides; after a pretraining the weights are added.
PRETRAININGS = {REGIONS: {}, FROZEN: BACKBONE}
KINDS = {
    ALONE: {},
    REGIONS: {},
    FROZEN: {},
    OURS: SEMI,
    "in matching alone": SEMI | MATCHING,
    "in both, denoised as strongly": SEMI | AS_STRONGLY,
    "in denoising alone": SEMI | DENOISING | AS_STRONGLY,
    "in both, without weights": SEMI | PLAIN | AS_STRONGLY,
    "in matching alone, without weights": SEMI | MATCHING | PLAIN,
    "in denoising alone, without weights": SEMI | DENOISING | PLAIN | AS_STRONGLY,
}
# Percent of the labels -> kinds and their seeds.
PLAN = {
    10: {kind: (1, 2) for kind in KINDS if kind not in PRETRAININGS},
    5: {ALONE: (1, 2), OURS: (1,), REGIONS: (1, 2), FROZEN: (1, 2)},
    20: {ALONE: (1, 2), OURS: (1,), FROZEN: (1, 2)},
    100: {ALONE: (1, 2), FROZEN: (1, 2)},
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", metavar="FOLDER", required=True, help="folder that holds bccd/")
    parser.add_argument("--percent", nargs="+", type=int, choices=list(PLAN), default=list(PLAN), help="default: all")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="default: 1 2, as the plan has them")
    parser.add_argument("--report", action="store_true", help="train nothing, report what lies in --runs")
    parser.add_argument("--runs", metavar="DIR", default="output/few_labels", help="where the trainings go")
    parser.add_argument("--output", metavar="DIR", help="where the page goes (default: beside the trainings)")
    add_overrides(parser)
    return parse(parser, argv)


def write_split(source: Path, names: Iterable[str], folder: Path) -> tuple[Path, Path]:
    """Splits a COCO-format file: the annotated images, and the others without annotations; returns both files.

    Args:
        source: the file.
        names: ``file_name`` of the images that stay annotated.
        folder: where annotated.json and unlabeled.json are written.

    Raises:
        UserError: a name is not in the file.
    """
    content, names = json.loads(source.read_text()), set(names)
    if missing := names - {image["file_name"] for image in content["images"]}:
        raise UserError(f"{source} has no image {min(missing)!r} (of {len(missing)}); is it the BCCD of the lists?")
    annotated, others = split_by_ids(content, {x["id"] for x in content["images"] if x["file_name"] in names})
    del others["annotations"]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "annotated.json", folder / "unlabeled.json"
    for path, part in zip(files, (annotated, others), strict=True):
        write_json(part, str(path))
    return files


def data_overrides(args: argparse.Namespace, percent: int) -> dict:
    """Overrides that put the annotated share, and the rest without annotations, in place of the training set."""
    if percent == 100:
        return {}
    bccd = Path(args.bccd).resolve() / "bccd"
    names = (LISTS / f"bccd_{percent}_percent.txt").read_text().split()
    annotated, unlabeled = write_split(bccd / "train.json", names, Path(args.runs).resolve() / f"{percent}_percent")
    images = str(bccd / "images")
    sets = {f"bccd_{percent}": annotated, f"bccd_{percent}_unlabeled": unlabeled, "bccd_test": bccd / "test.json"}
    return {
        "DATASETS.COCO_JSON": [[name, str(path), images] for name, path in sets.items()],
        "DATASETS.TRAIN": (f"bccd_{percent}",),
        "DATASETS.UNLABELED": (f"bccd_{percent}_unlabeled",),
    }


def pretrained(args: argparse.Namespace, kind: str, seed: int) -> dict:
    """Trains on regions of all training images, unless that has been done; overrides that start from the weights.

    Each seed has a pretraining of its own, so that the range of the results is that of both.
    """
    bccd, runs = Path(args.bccd).resolve() / "bccd", Path(args.runs).resolve()
    file = runs / "regions.json"
    if not file.is_file() and not args.report:
        runs.mkdir(parents=True, exist_ok=True)
        images = [Path(record["file_name"]) for record in load_coco_json(bccd / "train.json", bccd / "images")]
        write_json(content_of(images, bccd / "images", top=30), str(file))
    data = {"DATASETS.COCO_JSON": [["bccd_regions", str(file), str(bccd / "images")]]}
    sets = {"DATASETS.TRAIN": ("bccd_regions",), "DATASETS.TEST": ()}
    run = train(args, kind, SHORT | data | sets | PRETRAININGS[kind], seed)
    return {"MODEL.WEIGHTS": str((run.folder if run else runs) / "model_final.pth")}


def report(args: argparse.Namespace) -> str:
    """Trains, writes the page, and returns it."""
    check_arguments(args)
    output = Path(args.output or args.runs)
    results = read_results(output / RESULTS)
    for percent in args.percent:
        data = data_overrides(args, percent)
        for kind, seeds in PLAN[percent].items():
            runs = {}
            for seed in seeds if kind in args.kinds else ():
                if seed in args.seeds:
                    start = pretrained(args, kind, seed) if kind in PRETRAININGS else {}
                    runs[seed] = train(args, f"{percent} percent {kind}", SHORT | data | KINDS[kind] | start, seed)
            if found := {seed: run for seed, run in runs.items() if run is not None}:
                annotations = Path(args.bccd) / "bccd" / "test.json"
                results[percent, kind] = merged(results.get((percent, kind)), values_of(found, annotations))
    if not results:
        raise UserError(f"--report finds no training in {args.runs}; run it first")
    page = page_of(args, results)
    output.mkdir(parents=True, exist_ok=True)
    (output / "few_labels.md").write_text(page)
    draw({key: values["AP"] for key, values in results.items()}, output / "few_labels.png")
    nested = {
        str(percent): {kind: results[percent, kind] for kind in kinds if (percent, kind) in results}
        for percent, kinds in PLAN.items()
    }
    (output / RESULTS).write_text(json.dumps(nested, indent=2) + "\n")
    return page


def values_of(runs: dict[int, Run], annotations: Path) -> dict[str, list]:
    """Column of the table -> the values of the seeds, rounded as the table needs them; and the seeds, in the same order.

    Args:
        runs: of each seed.
        annotations: of the images that they are evaluated on.
    """
    values = {name: [last(run, metric) for run in runs.values()] for name, metric in METRICS.items()}
    values[SECONDS] = [run.seconds_an_iteration for run in runs.values()]
    values = {name: [round(x, 2) for x in column] for name, column in values.items()}
    return {SEEDS: list(runs)} | values | {DISTINCT: [ap_with_nms(run.folder, annotations) for run in runs.values()]}


def ap_with_nms(folder: Path, annotations: Path, iou: float = NMS_IOU) -> float | None:
    """AP of the detections that the last evaluation of a training has left, after class-wise NMS, as ``TEST.NMS`` does it.

    Args:
        folder: of the training.
        annotations: COCO-format file of the images.
        iou: above which the better one of two detections is kept.

    Returns:
        In percent; None where there are no detections, as in a part of a folder that was kept.

    Raises:
        UserError: there are detections, but no annotations.
    """
    file = folder / "inference" / "coco_instances_results.json"
    if not file.is_file():
        return None
    if not annotations.is_file():
        raise UserError(
            f"{annotations} does not exist, the annotations of {file}; name the folder above BCCD as --bccd"
        )
    images: dict[int, list[dict]] = {}
    for found in json.loads(file.read_text()):
        images.setdefault(found["image_id"], []).append(found)
    kept = [one for found in images.values() for one in distinct(found, iou)]
    if not kept:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        scores = COCOeval(truth, truth.loadRes(kept), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return round(100 * float(scores.stats[0]), 2)


def distinct(found: list[dict], iou: float) -> list[dict]:
    """Of COCO-format detections of one image those that NMS leaves, best first."""
    boxes, scores, classes = (torch.tensor([x[key] for x in found]) for key in ("bbox", "score", "category_id"))
    boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    return [found[i] for i in class_wise_nms(boxes, scores, classes, iou).tolist()]


def merged(kept: dict | None, found: dict) -> dict:
    """The values of both, of ``found`` where both have a seed.

    Where it is not known which seeds were kept, either all are reported or none.
    """
    if kept is None:
        return found
    if SEEDS not in kept:
        return found if len(found[SEEDS]) >= len(kept["AP"]) else kept
    rows = {}
    for values in (kept, found):
        for i, seed in enumerate(values[SEEDS]):
            row = {DISTINCT: None} | {name: column[i] for name, column in values.items()}
            before = rows.get(seed)
            if row[DISTINCT] is None and before and before["AP"] == row["AP"]:
                row[DISTINCT] = before[DISTINCT]  # of the same training, whose detections are not there any more
            rows[seed] = row
    return {name: [rows[seed][name] for seed in sorted(rows)] for name in found}


def read_results(path: Path) -> dict[tuple[int, str], dict[str, list]]:
    """(percent, kind) -> :func:`values_of` its trainings, from the file that an earlier report has written.

    What was measured before seeds were kept has none.

    Raises:
        UserError: it is not such a file.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        found = {(int(percent), kind): x for percent, kinds in content.items() for kind, x in kinds.items()}
        columns = (*METRICS, SECONDS)
        counts = [{len(x[name]) for name in (*columns, *({SEEDS} & set(x)))} for x in found.values()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of results ({error!r}); delete it, or name another --output") from None
    if any(len(count) != 1 for count in counts) or not all(kind in PLAN.get(percent, ()) for percent, kind in found):
        raise UserError(f"{path} holds results of another plan; delete it, or name another --output")
    return found


def page_of(args: argparse.Namespace, results: dict) -> str:
    """The page: what was trained, and what was not."""
    rows, wanting = [], []
    for percent, kinds in PLAN.items():
        for kind, seeds in kinds.items():
            columns = results.get((percent, kind), {"AP": []})
            count = len(columns["AP"])
            if count < len(seeds):
                wanting.append(f"{percent} % {kind} ({len(seeds) - count} of {len(seeds)} seeds)")
            if count:
                values = [spread(columns[name], ".1f") for name in METRICS]
                known = [x for x in columns.get(DISTINCT, ()) if x is not None]
                values += [of_some(known, count), spread(columns[SECONDS], ".2f")]
                rows.append([f"{percent} %", kind, str(count), *values])
    headers = ["labels", "images without", "seeds", *METRICS, DISTINCT, SECONDS]
    iterations, burn_in = SHORT["SOLVER.MAX_ITER"], SEMI["SEMI_SUPERVISED.BURN_IN"]
    how = (
        f"The last weights on the test split after {iterations} iterations of 2 annotated images, with pseudo labels 2 "
        f"others besides after {burn_in} of them; means over seeds, with the lowest and the highest. Those pretrained on "
        f"regions had {iterations} iterations of them before. Trainings did not take turns, so their times can be compared "
        f"within a few tenths only. {DISTINCT}: of the same detections, where those of one class overlap by an IoU above "
        f"{NMS_IOU}, the best one alone, as with TEST.NMS {NMS_IOU}. Each dot of the picture is a seed."
    )
    lines = [
        "# Few labels, many pictures: BCCD",
        "",
        f"`{command_line(args)}`, {machine()}.",
        "",
        textwrap.fill(how, 118),
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
        *([textwrap.fill(f"Not trained: {'; '.join(wanting)}.", 118), ""] if wanting else []),
        "![AP against labels, and at 10 % of them by the use of pseudo labels](few_labels.png)",
        "",
    ]
    return "\n".join(lines)


def of_some(values: list[float], count: int) -> str:
    """The :func:`~dn_detr_d2.visualization.curves.spread` of the values that are known of ``count`` seeds."""
    return spread(values, ".1f") + (f", {len(values)} of {count}" if 0 < len(values) < count else "")


def draw(ends: dict[tuple[int, str], list[float]], path: Path) -> None:
    """AP against the share of the labels, and at 10 % by the use of pseudo labels.

    Args:
        ends: (percent, kind) -> AP of each seed.
        path: of the picture.
    """
    figure, (left, right) = new_figure(1, 2, (6.4, 3.4))
    for i, kind in enumerate((ALONE, OURS, REGIONS, FROZEN)):
        of_kind = {percent: values for (percent, name), values in sorted(ends.items()) if name == kind and values}
        left.plot(of_kind.keys(), list(map(np.mean, of_kind.values())), color=colour(i), label=kind, linewidth=1.5)
        for percent, values in of_kind.items():
            left.plot([percent] * len(values), values, "o", color=colour(i), markersize=4)
    left.set_xscale("log")
    left.set_xticks(sorted(PLAN), [f"{x} %" for x in sorted(PLAN)])
    left.minorticks_off()
    left.set_xlim(4, 130)
    left.set(xlabel="annotated training images", ylabel="AP on the test split")
    left.legend(frameon=False, fontsize=8)
    kinds = [kind for kind in KINDS if ends.get((10, kind))]
    for place, kind in enumerate(kinds):
        values = ends[10, kind]
        right.plot(values, [place] * len(values), "o", color=colour(place), markersize=5)
        right.plot([np.mean(values)], [place], "|", color=colour(place), markersize=18)
    right.set_yticks(range(len(kinds)), kinds, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="AP on the test split, 10 % of the labels")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    save(figure, path)


def command_line(args: argparse.Namespace) -> str:
    """The call that gives the page, without paths of this machine."""
    return " ".join(["python dev/measure_few_labels.py --bccd datasets", *args.opts])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(report(args)))


if __name__ == "__main__":
    sys.exit(main())
