"""Converts a checkpoint of the authors, of detrex or of torchvision for a model of this project.

    dn-detr convert checkpoint checkpoint.pth dn_detr.pth --config-file configs/dn_detr_R50_50ep.yaml
    dn-detr convert checkpoint checkpoint.pth dn_detr.safetensors --config-file ... MODEL.DN_DETR.NUM_CLASSES 91

The source is found by its tensor names. NUM_CLASSES 91 keeps COCO's raw ids, 80 (the default, and
Detectron2's number of COCO classes) makes them contiguous. Every tensor is used or named in an error, and then nothing is
written.
"""

import argparse
from pathlib import Path

from detectron2.modeling import build_model

from ..checkpoint import CheckpointFile, convert_file, write_checkpoint
from ..coco import RAW_IDS
from ..command_line import add_overrides, make_parser, parse, run_command
from ..engine.setup import setup_cfg
from ..errors import UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("source", help=".pth, .pkl or .safetensors")
    parser.add_argument("target", type=Path, help=".pth or .safetensors")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the system that the checkpoint is for")
    parser.add_argument("--classes", type=int, help="of the target; 80 if the config does not say")
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the weights of a training's checkpoint"
    )
    parser.add_argument("--safetensors", action="store_true", help="write .safetensors whatever TARGET ends in")
    add_overrides(parser)
    args = parse(parser, argv)
    if args.classes is not None and args.classes < 1:
        parser.error(f"--classes must be positive, got {args.classes}")
    return args


def run(args: argparse.Namespace) -> None:
    """Reads, converts, writes."""
    opts = list(args.opts)
    if args.classes is not None:
        opts += ["MODEL.DN_DETR.NUM_CLASSES", args.classes]
    opts += ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    cfg = setup_cfg(args.config_file, opts, splits=())
    node, target = cfg.MODEL.DN_DETR, args.target
    if node.NUM_CLASSES is None:
        node.NUM_CLASSES = len(RAW_IDS)
    if args.safetensors and target.suffix != ".safetensors":
        target = target.with_suffix(".safetensors")
    if target.exists():
        raise UserError(f"{target} exists; remove it, or name another target")
    model_state, names = build_model(cfg).state_dict(), list(node.CLASS_NAMES)
    conversion, node.CLASS_NAMES = convert_file(args.source, model_state, node.NUM_CLASSES, names, averaged=args.ema)
    for sentence in conversion.log:
        print(sentence)
    write_checkpoint(target, CheckpointFile(conversion.state, node.CLASS_NAMES, cfg.dump()))
    print(f"wrote {target}: {len(conversion.state)} tensors of {conversion.source}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(lambda: run(parse_arguments(argv)))
