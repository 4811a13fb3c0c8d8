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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from tabulate import tabulate

from dn_detr_d2 import UserError, setup_cfg
from dn_detr_d2.diagnostics.model_analysis import analyze, measure_memory


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="of the image in pixels"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also run a training step and measure what autograd keeps"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args()
    opts = ["MODEL.DN_DETR.NUM_CLASSES", 91, *args.opts, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    try:
        cfg = setup_cfg(args.config_file, [*opts, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], splits=())
        if min(args.size) < 32:
            raise UserError(f"--size must be at least 32 32, got {args.size[0]} {args.size[1]}")
        table = analyze(cfg, *args.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [[part, f"{x['parameters']:,}", f"{x['trainable']:,}", f"{x['gflops']:.1f}", f"{x['paper_gflops']:.1f}",
             f"{x['mactivations']:.1f}"]
            for part, x in table.items()]  # fmt: skip
    headers = ["part", "parameters", "trainable", "GFLOPs", "as in the papers", "M activations"]
    print(tabulate(rows, headers, tablefmt="github", colalign=("left", *["right"] * 5), disable_numparse=True))
    print(f"one image of {args.size[0]} x {args.size[1]}, {cfg.MODEL.DN_DETR.NUM_CLASSES} classes, inference")
    if args.memory:
        print(
            f"kept for the backward pass of such an image with 7 objects: {measure_memory(cfg, *args.size) / 2**20:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
