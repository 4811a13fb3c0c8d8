#!/usr/bin/env python3
"""What gives a small set of photographs its AP? Trains configs/bccd.yaml, and with one choice at a time taken back.

    python dev/ablate_bccd.py --bccd datasets --seeds 1 2 3 --output docs/evidence
    python dev/ablate_bccd.py --bccd datasets --seeds 1 2 3 --output docs/evidence --report

--bccd is the folder that holds bccd/. The choices are compared on the validation split, on a short schedule with the
first seed; then the recipe is trained as it is, and from random weights, and evaluated on the test split. Trainings that
have ended are taken from --runs; an interrupted one is resumed. Writes bccd.md, bccd.png and bccd_ap50.png. Exit code 2:
bad input.
"""

import argparse
import os
import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tabulate import tabulate

from dev.compare.report import is_evaluated
from dev.compare_runs import machine
from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.visualization.curves import AP50, draw
from dn_detr_d2.visualization.runs import Group, Run, read_run

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "bccd.yaml"
SHORT = {"SOLVER.MAX_ITER": 400, "TEST.EVAL_PERIOD": 200, "DATASETS.TEST": ("bccd_val",)}
SCRATCH = {"MODEL.WEIGHTS": "", "MODEL.BACKBONE.FREEZE_AT": 0, "SOLVER.BACKBONE_MULTIPLIER": 1.0}
COARSE = {"MODEL.DN_DETR.IN_FEATURES": ("res3", "res4", "res5"), "MODEL.DN_DETR.NUM_FEATURE_LEVELS": 3}
# What is taken back -> the overrides that do it.
RECIPE = "the recipe"
CHOICES = {
    RECIPE: {},
    "from random weights, nothing frozen": SCRATCH,
    "100 queries": {"MODEL.DN_DETR.NUM_QUERIES": 100},
    "without denoising": {"MODEL.DN_DETR.DENOISING.NAME": ""},
    "learned anchors (as DN-Deformable-DETR)": {"MODEL.DN_DETR.QUERY_SOURCE.NAME": "LearnedAnchors"},
    "batch norms as loaded (FrozenBN)": {"MODEL.TIMM.NORM": "FrozenBN"},
    "levels from stride 8": COARSE,
    "192 to 256 pixels, tested at 224": {"INPUT.MIN_SIZE_TRAIN": (192, 224, 256), "INPUT.MIN_SIZE_TEST": 224},
    "learning rate 0.00035": {"SOLVER.BASE_LR": 0.00035},
    "class weight 1": {"MODEL.DN_DETR.LOSS.CLASS_WEIGHT": 1.0},
    "horizontal flips only": {"INPUT.RANDOM_FLIP": "horizontal"},
    "batch 4, half the iterations": {
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 200,
        "SOLVER.WARMUP_ITERS": 100,
        "TEST.EVAL_PERIOD": 100,
    },
}
KINDS = {"moving average": "ema/", "last weights": ""}
METRICS = {"AP": "AP", "AP50": "AP50", "platelets": "AP-Platelets", "red cells": "AP-RBC", "white cells": "AP-WBC"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", metavar="FOLDER", required=True, help="folder that holds bccd/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the whole recipe (default 1 2 3)")
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES), help="default: all")
    parser.add_argument("--report", action="store_true", help="train nothing, report what lies in --runs")
    parser.add_argument("--runs", metavar="DIR", default="output/bccd_runs", help="where the trainings go")
    parser.add_argument("--output", metavar="DIR", help="where page and picture go (default: beside the trainings)")
    add_overrides(parser)
    return parse(parser, argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses, before hours of training, a misspelt key (ConfigError) and a folder without BCCD (UserError)."""
    setup_cfg(str(CONFIG), args.opts, splits=())
    if not (Path(args.bccd) / "bccd" / "train.json").is_file():
        raise UserError(f"--bccd {args.bccd} holds no bccd/train.json; name the folder above BCCD in COCO format")


def folder_name(name: str) -> str:
    """A name of a choice as that of a folder."""
    return "".join(c if c.isalnum() else "_" for c in name)


def train(args: argparse.Namespace, name: str, overrides: dict, seed: int) -> Run | None:
    """The training of that name, done now if it has not been; None if a report finds that it has not ended.

    Raises:
        UserError: it fails.
    """
    folder = Path(args.runs) / f"{folder_name(name)}_seed{seed}"
    if not has_ended(folder, evaluated=overrides.get("DATASETS.TEST") != ()):
        if args.report:
            return None
        print(f"training {name}, seed {seed}", file=sys.stderr, flush=True)
        opts = chain(*({"SEED": seed, "OUTPUT_DIR": folder} | overrides).items())
        command = [sys.executable, ROOT / "train_net.py", "--config-file", CONFIG, "--resume", *opts, *args.opts]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("ab") as output:
            environment = os.environ | {"DETECTRON2_DATASETS": args.bccd}
            done = subprocess.run(map(str, command), env=environment, stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"the training of {name!r} ended with code {done.returncode}; see {folder / 'output.txt'}")
    return read_run(folder)


def has_ended(folder: Path, *, evaluated: bool) -> bool:
    """Whether a training has written its last weights and, if it is ``evaluated``, its AP with them, which comes later."""
    if not (folder / "model_final.pth").exists():
        return False
    run = read_run(folder)
    return not evaluated or is_evaluated(run, max(points[-1, 0] for points in run.curves.values()))


def last(run: Run, metric: str, prefix: str = "") -> float:
    """The value of a metric at the end of a training."""
    return run.curves[f"{prefix}bbox/{metric}"][-1, 1]


def row(name: str, run: Run, base: Run | None = None, prefix: str = "") -> list[str]:
    """A line of a table; with ``base`` the difference of the AP50 too."""
    values = [f"{last(run, metric, prefix):.1f}" for metric in METRICS.values()]
    gained = [f"{last(run, 'AP50', prefix) - last(base, 'AP50', prefix):+.1f}"] if base else []
    return [name, *values, *gained, f"{run.seconds_an_iteration:.2f}"]


def report(args: argparse.Namespace) -> str:
    """Trains, writes page and picture, and returns the page."""
    check_arguments(args)
    first = args.seeds[0]
    short = {name: train(args, f"short {name}", SHORT | CHOICES[name], first) for name in args.choices}
    whole = {f"seed {seed}": train(args, "recipe", {}, seed) for seed in args.seeds}
    scratch = {f"from random weights, seed {first}": train(args, "scratch", SCRATCH, first)}
    wanting = [name for name, run in (short | whole | scratch).items() if run is None]
    short, whole, scratch = ({name: run for name, run in x.items() if run} for x in (short, whole, scratch))
    base = short.get(RECIPE)
    if not whole or not base:
        raise UserError(
            f"--report finds neither a whole nor a short training of the recipe in {args.runs}; run it first"
        )
    groups = [Group("from random weights", [*scratch.values()])] if scratch else []
    output = Path(args.output or args.runs)
    groups.append(Group("from ImageNet weights", [*whole.values()]))
    picture = draw(groups, output / "bccd.png")
    draw(groups, output / "bccd_ap50.png", [AP50])
    rows = [
        row(f"{name}, {kind}", run, None, prefix)
        for kind, prefix in KINDS.items()
        for name, run in (whole | scratch).items()
    ]
    choices = [row(name, run, base) for name, run in short.items()]
    ends = [last(run, "AP50", "ema/") for run in whole.values()]
    headers = ["", *METRICS, "AP50 against the recipe", "seconds an iteration"]
    page = f"""# BCCD: what a small set of photographs gains from what

`{command_line(args)}`, {machine()}.

## The recipe on the test split

{tabulate(rows, ["training", *METRICS, "seconds an iteration"], tablefmt="github", disable_numparse=True)}

AP50 of the moving average over {len(ends)} seeds: mean {sum(ends) / len(ends):.1f}, {min(ends):.1f} to {max(ends):.1f}.

![Curves]({picture.name})

## One choice at a time taken back

On the validation split, {SHORT["SOLVER.MAX_ITER"]} iterations, seed {first}, last weights. Warm-up is half of so short a
training, so the rate reaches half of SOLVER.BASE_LR.

{tabulate(choices, headers, tablefmt="github", disable_numparse=True)}
"""
    page += "\n" + textwrap.fill(f"Not trained: {'; '.join(wanting)}.", 118) + "\n" if wanting else ""
    (output / "bccd.md").write_text(page)
    return page


def command_line(args: argparse.Namespace) -> str:
    """The call that gives the page, without paths of this machine."""
    seeds = " ".join(map(str, args.seeds))
    return " ".join(["python dev/ablate_bccd.py --bccd datasets --seeds", seeds, *args.opts])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(report(args)))


if __name__ == "__main__":
    sys.exit(main())
