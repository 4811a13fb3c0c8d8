#!/usr/bin/env python3
"""Lists the annotations of a data set that a trained model believes least, and objects that are not annotated.

    python tools/find_label_errors.py --config-file output/quickstart/config.yaml \
        --weights output/quickstart/model_final.pth --dataset shapes_train --output label_errors

Four kinds of errors, each with its own ranking. "class" and "box": each annotated box enters the model as denoising queries
with labels drawn at random, so class and box must be read from the image; the score is the probability of the likeliest
other class minus that of the annotated one, in [-1, 1], and 1 minus the IoU of the annotated with the restored box.
"spurious": no detection speaks for the box. "missing": a detection that no box covers. --output takes label_errors.csv with
everything and pictures of the first --top of each kind. How well it works: docs/diagnostics.md.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from dn_detr_d2 import ConfigError
from dn_detr_d2.command_line import add_overrides, add_weights, parse, required_weights, run_command
from dn_detr_d2.data import build_probe_loader, check_files
from dn_detr_d2.diagnostics import Suspicion, judge_annotations
from dn_detr_d2.diagnostics.annotation_errors import CLASS, KINDS
from dn_detr_d2.diagnostics.label_errors import COLUMNS, as_rows, write_report
from dn_detr_d2.engine import load_for_evaluation
from dn_detr_d2.engine.setup import setup_for_evaluation


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML config, e.g. config.yaml of a training"
    )
    add_weights(parser, "checkpoint of a model with denoising")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set, or one of COCO_JSON")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of errors; all that the model can judge by default")
    parser.add_argument("--top", type=int, default=50, metavar="N", help="of each kind to print and draw (default 50)")
    parser.add_argument(
        "--num-images", type=int, default=0, metavar="N", help="look at so many images; 0 = all (default)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where table and pictures go; without it they are not written"
    )
    add_overrides(parser)
    return parse(parser, argv)


def judge(args: argparse.Namespace) -> tuple[list[Suspicion], list[str]]:
    """All annotations by kind of error, most suspicious first, and the names of the classes."""
    if min(args.top, args.num_images) < 0:
        raise ConfigError(f"--top and --num-images must not be negative, got {args.top} and {args.num_images}")
    if args.top == 0 and not args.output:
        raise ConfigError("--top 0 without --output shows nothing; give a number, or --output for the table of all")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ConfigError(f"--output {args.output} is a file; name a folder")
    weights = required_weights(args)
    if "://" not in weights and not Path(weights).is_file():
        raise ConfigError(f"--weights {weights} does not exist")
    used = ["DATASETS.TRAIN", "()", "DATASETS.TEST", (args.dataset,), "MODEL.WEIGHTS", weights]
    cfg = setup_for_evaluation(args.config_file, [*args.opts, *used])
    check_files(args.dataset)
    loader = build_probe_loader(cfg, args.dataset, args.num_images)
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES) or MetadataCatalog.get(args.dataset).get("thing_classes", [])
    return judge_annotations(load_for_evaluation(cfg), loader, kinds=args.kinds), names


def report(args: argparse.Namespace) -> None:
    """Prints the first of each kind, and writes the table and the pictures."""
    rows = as_rows(*judge(args), args.dataset)
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            shown = [[row[key] for key in COLUMNS[:7]] for row in of_kind[: args.top]]
            print(tabulate(shown, COLUMNS[:7], tablefmt="github", floatfmt="+.3f"))
        if kind == CLASS and of_kind:
            doubted = sum(row["score"] > 0 for row in of_kind)
            print(f"{len(of_kind)} annotations; for {doubted} of them another class is likelier than the annotated one")
    if args.output:
        write_report(rows, args.top, Path(args.output))
        print(f"table and pictures: {args.output}")


def last_line(error: Exception) -> str:
    """The sentence of an error; a loader process puts its traceback and the error's class before it."""
    return str(error).strip().splitlines()[-1].removeprefix("dn_detr_d2.errors.DatasetError: ")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    setup_logger(name="dn_detr_d2").setLevel(logging.WARNING)
    return run_command(lambda: report(args), describe=last_line)


if __name__ == "__main__":
    sys.exit(main())
