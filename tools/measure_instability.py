#!/usr/bin/env python3
"""Measures how stable the matching of a training was, from its checkpoints: what TEST.INSTABILITY logs while it runs.

    python tools/measure_instability.py --config-file output/x/config.yaml --dataset shapes_val --checkpoints output/x

The instability IS (DN-DETR, Sec. 3.2) of a checkpoint is the number of queries of an image that are matched to another
object than at the checkpoint before; the distance is that between objects and the anchors of their queries. A folder stands
for its numbered checkpoints (model_0000299.pth); SOLVER.CHECKPOINT_PERIOD and SOLVER.CHECKPOINTS_KEPT say which there are.
IS grows with the iterations between two checkpoints, so take equal steps. What the numbers say: docs/diagnostics.md.
"""

import argparse
import json
import logging
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

import numpy as np
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from dn_detr_d2 import ConfigError
from dn_detr_d2.checkpoint.resume import iterations_of, periodic_checkpoints
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.data import build_probe_loader, check_files
from dn_detr_d2.diagnostics import probe, require_queries
from dn_detr_d2.diagnostics.diagnostic_hooks import describe
from dn_detr_d2.engine import load_for_evaluation
from dn_detr_d2.engine.setup import setup_for_evaluation
from dn_detr_d2.utils.files import atomic_write


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the training")
    parser.add_argument(
        "--checkpoints", required=True, nargs="+", metavar="PATH", help="two or more in order, or folders of trainings"
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set, or one of COCO_JSON")
    parser.add_argument(
        "--num-images", type=int, default=0, metavar="N", help="evenly spaced by image id; 0 = all (default)"
    )
    parser.add_argument("--output", metavar="FILE", help="where a line of JSON goes for each checkpoint")
    add_overrides(parser)
    return parse(parser, argv)


def find_checkpoints(paths: list[str]) -> list[Path]:
    """The files, and the numbered ones of each folder in order; raises ConfigError unless there are two that exist."""
    found = []
    for path in map(Path, paths):
        inside = periodic_checkpoints(path) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--checkpoints {path} holds no numbered checkpoint, such as model_0000299.pth")
        found += inside
    if missing := [str(path) for path in found if not path.is_file()]:
        raise ConfigError(f"--checkpoints {missing[0]} does not exist")
    if len(found) < 2:
        raise ConfigError(
            f"--checkpoints takes two or more, got {[str(path) for path in found]}: IS compares two of them"
        )
    return found


def measure(args: argparse.Namespace) -> list[dict]:
    """{name of a scalar of ``TEST.INSTABILITY``: value} of each checkpoint, with ``checkpoint`` and ``iterations``."""
    if args.num_images < 0:
        raise ConfigError(f"--num-images must not be negative, got {args.num_images}")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise ConfigError(f"--output {args.output} lies in a folder that does not exist")
    paths, loader, previous, rows = find_checkpoints(args.checkpoints), None, None, []
    for path in paths:
        used = ["DATASETS.TRAIN", "()", "DATASETS.TEST", (args.dataset,), "MODEL.WEIGHTS", str(path)]
        cfg = setup_for_evaluation(args.config_file, [*args.opts, *used])
        if loader is None:
            check_files(args.dataset)
            loader = build_probe_loader(cfg, args.dataset, args.num_images)
        images = probe(require_queries(load_for_evaluation(cfg)), loader)
        scalars = describe(images, previous, cfg.TEST.INSTABILITY.ATD_K)
        rows.append({"checkpoint": str(path), "iterations": iterations_of(path)} | scalars)
        previous = {image.image_id: image.matched for image in images}
    return rows


def summary(rows: list[dict]) -> str:
    """The mean IS of the last layer, and over which steps it was taken."""
    layers = [name for name in rows[1] if name.startswith("instability/layer_")]
    mean = np.mean([row[layers[-1]] for row in rows[1:]])
    done = [row["iterations"] for row in rows]
    steps = set() if None in done else {after - before for before, after in pairwise(done)}
    apart = f", {', '.join(map(str, sorted(steps)))} iterations apart" if steps else ""
    unequal = "; unequal steps do not compare" if len(steps) > 1 else ""
    return f"mean IS of the last layer, {len(rows)} checkpoints{apart}: {mean:.2f}{unequal}"


def report(args: argparse.Namespace) -> None:
    """Prints the table and the mean, and writes the lines."""
    rows = measure(args)
    names = [name for name in rows[1] if name.startswith("instability/layer_")]
    names += [name for name in rows[1] if name.startswith("anchors/distance")]
    table = [[row["iterations"] or Path(row["checkpoint"]).name, *(row.get(name) for name in names)] for row in rows]
    headers = ["iterations", *(name.replace("instability/layer_", "IS, layer ").replace("/", " ") for name in names)]
    print(tabulate(table, headers, tablefmt="github", floatfmt=".3f"))
    print(summary(rows))
    if args.output:
        with atomic_write(args.output, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        print(f"written: {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    setup_logger(name="dn_detr_d2").setLevel(logging.WARNING)
    return run_command(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
