#!/usr/bin/env python3
"""Counts what a config costs: parameters, multiplications, activations and memory, by part, for one image.

    python tools/analyze_model.py --config-file configs/dn_detr_R50_50ep.yaml
    python tools/analyze_model.py --config-file configs/dino_R50_4scale_12ep.yaml --size 800 1066 --memory

GFLOPs are 10^9 multiply-adds. The first column counts all that matters: convolutions, linear layers, products of attention,
deformable attention, norms. The second leaves linear layers and deformable attention out and adds 7 operations for each
attention weight: so the figures of the DAB-DETR and DN-DETR papers come out (docs/parity.md). 91 classes as there unless
NUM_CLASSES says otherwise; the image is 800 x 1333.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from tabulate import tabulate

from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.coco import NUM_RAW_CLASSES
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.config import load_config
from dn_detr_d2.diagnostics.model_analysis import analyze, measure_memory


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="in pixels")
    parser.add_argument(
        "--memory", action="store_true", help="also run a training step and measure what autograd keeps"
    )
    add_overrides(parser)
    return parse(parser, argv)


def report(args: argparse.Namespace) -> None:
    """Prints the table."""
    forced = {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "DATASETS.TRAIN": "()", "DATASETS.TEST": "()"}
    opts = [*args.opts, *chain(*forced.items())]
    if load_config(args.config_file, opts).MODEL.DN_DETR.NUM_CLASSES is None:
        opts += ["MODEL.DN_DETR.NUM_CLASSES", NUM_RAW_CLASSES]
    cfg = setup_cfg(args.config_file, opts, splits=())
    height, width = args.size
    if min(args.size) < 32:
        raise UserError(f"--size must be at least 32 32, got {height} {width}")
    rows = []
    for part, x in analyze(cfg, height, width).items():
        counts = [f"{x['parameters']:,}", f"{x['trainable']:,}"]
        costs = [f"{x[key]:.1f}" for key in ("gflops", "paper_gflops", "mactivations")]
        rows.append([part, *counts, *costs])
    headers = ["part", "parameters", "trainable", "GFLOPs", "as in the papers", "M activations"]
    print(tabulate(rows, headers, tablefmt="github", colalign=("left", *["right"] * 5), disable_numparse=True))
    print(f"one image of {height} x {width}, {cfg.MODEL.DN_DETR.NUM_CLASSES} classes, inference")
    if args.memory:
        kept = measure_memory(cfg, height, width) / 2**20
        print(f"kept for the backward pass of such an image with 7 objects: {kept:.0f} MiB")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
