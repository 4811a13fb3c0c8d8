#!/usr/bin/env python3
"""What do known objects and known labels give? Trains, evaluates, and writes a page.

    python dev/measure_prompting.py --seeds 1 2 3 --output docs/evidence/prompting.md
    python dev/measure_prompting.py --seeds 1 2 3 --output docs/evidence/prompting.md --report

For each seed on the embedded shapes: DAB-Deformable-DETR, DN-Deformable-DETR, and the latter with known objects for both
shares of known classes; then DN for an epoch more as it is, with known objects, and with labels. The seed also draws the
known classes. Trainings that are in --runs already are taken from there, and so are evaluations. Exit code 2: bad input.
"""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn

from dev.compare_runs import machine
from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.data import split_classes
from dn_detr_d2.engine import Trainer, load_for_evaluation

CONFIG = Path(__file__).resolve().parent / "compare" / "deformable.yaml"
DENOISING = "MODEL.DN_DETR.DENOISING."
# Queries with the unknown label, which a label can replace; all pairs of query and class are kept, so that those of known
# classes take no place from the others.
SHARED = {
    "MODEL.DN_DETR.QUERY_SOURCE.CONTENT": "unknown",
    "TEST.DETECTIONS_PER_IMAGE": 90,
    "TEST.EVAL_PERIOD": 0,
    "TEST.IMS_PER_BATCH": 8,
}
FRACTIONS = (0.7, 0.5)  # the paper's
LABELS = {f"{DENOISING}LABEL_PROMPTS": True}
TUNING = {"SOLVER.MAX_ITER": 300, "SOLVER.BASE_LR": 1e-4, "SOLVER.WARMUP_ITERS": 0}  # an epoch, a tenth of the rate


def known(fraction: float, seed: int) -> dict:
    """Overrides of a model with known objects."""
    return {f"{DENOISING}KNOWN_FRACTION": fraction, f"{DENOISING}KNOWN_SEED": seed, f"{DENOISING}NUM_GROUPS": 1}


class Experiment:
    """The trainings and evaluations of one seed.

    Args:
        seed: of all of them.
        runs: folder of the trainings.
        opts: [key, value, ...] for all.
        report: whether everything must be there already.
    """

    def __init__(self, seed: int, runs: Path, opts: list, report: bool):
        self.seed, self.runs, self.opts, self.report = seed, runs, opts, report

    def configure(self, name: str, overrides: dict):
        """The config of one training."""
        made = SHARED | {"SEED": self.seed, "OUTPUT_DIR": str(self.runs / f"{name}_seed{self.seed}")} | overrides
        return setup_cfg(str(CONFIG), [*chain(*made.items()), *self.opts])

    def train(self, name: str, overrides: dict) -> Path:
        """Trains, if that has not been done; returns the weights."""
        cfg = self.configure(name, overrides)
        weights = Path(cfg.OUTPUT_DIR, "model_final.pth")
        if not weights.exists():
            self._require(weights)
            print(f"seed {self.seed}: training {name}", file=sys.stderr, flush=True)
            seed_all_rng(cfg.SEED)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=False)
            trainer.train()
        return weights

    def evaluate(self, weights: Path, name: str, overrides: dict, only_present: bool = False) -> float:
        """AP of weights; ``only_present`` leaves out detections of classes that are not in the image."""
        path = weights.with_name(f"ap_{name.replace(' ', '_')}.json")
        if not path.exists():
            self._require(path)
            folder = {"OUTPUT_DIR": str(weights.parent / "evaluation"), "MODEL.WEIGHTS": str(weights)}
            cfg = self.configure(name, overrides | folder)
            model = load_for_evaluation(cfg)
            results = Trainer.test(cfg, OnlyPresent(model) if only_present else model)
            path.write_text(json.dumps(results["bbox"]))
        return json.loads(path.read_text())["AP"]

    def _require(self, path: Path) -> None:
        if self.report:
            raise UserError(f"--report finds no {path}; run without --report first")

    def known_objects(self) -> dict[tuple[float, str], float]:
        """AP of the unknown classes, by share of known classes and model."""
        dab = {f"{DENOISING}NAME": "", "MODEL.DN_DETR.QUERY_SOURCE.CONTENT": "zero"}
        baseline, denoised = self.train("dab", dab), self.train("dn", {})
        tuning = TUNING | {"MODEL.WEIGHTS": str(denoised)}
        longer, found = self.train("dn_longer", tuning), {}
        for fraction in FRACTIONS:
            told = known(fraction, self.seed)
            names = unknown_names(self.configure("known", told))
            untold = {"TEST.AP_CLASSES": names}
            conditioned = self.train(f"known_{fraction}", told)
            tuned = self.train(f"tuned_{fraction}", tuning | told)
            share = f"{fraction} known"
            found[share, "unknown classes"] = ", ".join(names)
            found[share, "DAB"] = self.evaluate(baseline, f"unknown {fraction}", dab | untold)
            for name, weights in {
                "DN": denoised,
                "conditioned from the start": conditioned,
                "DN, an epoch more": longer,
                "DN, an epoch conditioned": tuned,
            }.items():
                found[share, name] = self.evaluate(weights, f"unknown {fraction}", untold)
                found[share, f"{name}, told"] = self.evaluate(weights, f"known {fraction}", told)
        return found

    def known_labels(self) -> dict[str, float]:
        """AP with and without labels, by model."""
        denoised = self.train("dn", {})
        tuning = TUNING | {"MODEL.WEIGHTS": str(denoised)}
        longer, tuned = self.train("dn_longer", tuning), self.train("labels", tuning | LABELS)
        found = {}
        for name, weights in {"DN": denoised, "DN, an epoch more": longer, "DN, an epoch with labels": tuned}.items():
            found |= {
                (name, "no labels"): self.evaluate(weights, "plain", {}),
                (name, "absent classes left out"): self.evaluate(weights, "present", LABELS, only_present=True),
                (name, "asked by label"): self.evaluate(weights, "labels", LABELS),
            }
        return found


class OnlyPresent(nn.Module):
    """A detector whose detections of classes that are not in the image are left out: labels known, but not to the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As Detectron2's models in evaluation."""
        labels = [torch.tensor(x["labels"]) for x in batched_inputs]
        found = self.model([{key: value for key, value in x.items() if key != "labels"} for x in batched_inputs])
        found = [x["instances"].to("cpu") for x in found]
        return [{"instances": x[torch.isin(x.pred_classes, own)]} for x, own in zip(found, labels, strict=True)]


def unknown_names(cfg) -> list[str]:
    """Names of the unknown classes."""
    return [cfg.MODEL.DN_DETR.CLASS_NAMES[i] for i in split_classes(cfg)[1]]


def spread(values: list) -> str:
    """Mean with the lowest and the highest value; of names all."""
    if isinstance(values[0], str):
        return "; ".join(values)
    return f"{sum(values) / len(values):.1f} ({', '.join(f'{x:.1f}' for x in values)})"


def table(rows: list[dict], first: str, *, turned: bool = False) -> str:
    """A table from {(row, column): value} of each seed, or ``turned`` with the columns as rows."""
    rows = [{key[::-1]: value for key, value in row.items()} for row in rows] if turned else rows
    names = list(dict.fromkeys(row for row, _ in rows[0]))
    columns = list(dict.fromkeys(column for _, column in rows[0]))
    lines = [[name, *(spread([row[name, column] for row in rows]) for column in columns)] for name in names]
    return tabulate(lines, [first, *columns], tablefmt="github", disable_numparse=True)


def page(args: argparse.Namespace) -> str:
    """Trains what is missing; the tables."""
    experiments = [Experiment(seed, Path(args.runs), args.opts, args.report) for seed in args.seeds]
    objects = [experiment.known_objects() for experiment in experiments]
    labels = [experiment.known_labels() for experiment in experiments]
    called = f"python dev/measure_prompting.py --seeds {' '.join(map(str, args.seeds))}"
    called += f" --output {args.output}" if args.output else ""
    return "\n".join(
        [
            "# Known objects and known labels: shapes_train",
            "",
            f"`{called}`,",
            f"{machine()}. AP of 0 to 100: means, in brackets the seeds {args.seeds} in this order.",
            "",
            "## AP of the unknown classes",
            "",
            "Each seed draws its own unknown classes, which are named. DAB and DN are trained on all classes, as usual;",
            "conditioned models see the objects of known classes and find the others. *Told*: the evaluation gives the",
            "annotated objects of known classes, an oracle. An epoch is 300 iterations, at a tenth of the learning rate.",
            "",
            table(objects, "model", turned=True),
            "",
            "## AP with labels",
            "",
            "All classes. *Asked by label*: a pass for each class that is annotated in the image, an oracle; *absent",
            "classes left out*: the same knowledge applied to ordinary detections, for comparison.",
            "",
            table(labels, "model"),
            "",
        ]
    )


def report(args: argparse.Namespace) -> None:
    """Prints the tables, and writes them to --output."""
    text = page(args)
    print(text)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(text)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--runs", metavar="DIR", default="output/prompting", help="where the trainings go")
    parser.add_argument("--output", metavar="FILE", help="the page; default: printed only")
    parser.add_argument("--report", action="store_true", help="train and evaluate nothing that is not in --runs")
    add_overrides(parser)
    args = parse(parser, argv)
    return run_command(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
