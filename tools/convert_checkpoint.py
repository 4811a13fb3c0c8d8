#!/usr/bin/env python3
"""Converts a checkpoint of the authors, of detrex or of torchvision for a model of this project.

    python tools/convert_checkpoint.py checkpoint.pth dn_detr.pth --config-file configs/dn_detr_R50_50ep.yaml
    python tools/convert_checkpoint.py checkpoint.pth dn_detr.safetensors --config-file ... MODEL.DN_DETR.NUM_CLASSES 91

The source is found by its tensor names. NUM_CLASSES 91 keeps COCO's raw ids, 80 (the default, and
Detectron2's number of COCO classes) makes them contiguous. Every tensor is used or named in an error, and then nothing is
written.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from detectron2.modeling import build_model

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.checkpoint import CheckpointFile, convert, read_checkpoint, write_checkpoint
from dn_detr_d2.coco import NUM_RAW_CLASSES, RAW_IDS, coco_names, raw_names
from dn_detr_d2.command_line import add_overrides, parse, run_command


def run(args) -> None:
    """Reads, converts, writes."""
    opts = list(args.opts)
    if args.classes is not None:
        opts += ["MODEL.DN_DETR.NUM_CLASSES", args.classes]
    cfg = setup_cfg(
        args.config_file, [*opts, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], splits=()
    )
    if cfg.MODEL.DN_DETR.NUM_CLASSES is None:
        cfg.MODEL.DN_DETR.NUM_CLASSES = len(RAW_IDS)
    target = args.target
    if args.safetensors and target.suffix != ".safetensors":
        target = target.with_suffix(".safetensors")
    source = read_checkpoint(args.source, averaged=args.ema)
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    conversion = convert(source.state, build_model(cfg).state_dict(), source.class_names, names)
    if conversion.new_classes:
        raise ConfigError(
            f"the checkpoint lacks {len(conversion.new_classes)} of the {cfg.MODEL.DN_DETR.NUM_CLASSES} classes; convert "
            "it with its own number of classes, and start a training from that: it carries rows over by name"
        )
    for sentence in conversion.log:
        print(sentence)
    number = cfg.MODEL.DN_DETR.NUM_CLASSES
    if not names and len(source.class_names) == number:
        names = source.class_names
    elif not names and number in (len(RAW_IDS), NUM_RAW_CLASSES):
        names = list(coco_names() if number == len(RAW_IDS) else raw_names())
    cfg.MODEL.DN_DETR.CLASS_NAMES = names
    write_checkpoint(target, CheckpointFile(conversion.state, names, cfg.dump()))
    print(f"wrote {target}: {len(conversion.state)} tensors of {conversion.source}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    logging.disable(logging.INFO)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
