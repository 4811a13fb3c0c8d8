"""Converts data sets of other formats to COCO's, and checkpoints of other projects for a model of this one.

    dn-detr convert yolo data.yaml --split train train.json
    dn-detr convert voc Annotations JPEGImages train.json
    dn-detr convert checkpoint checkpoint.pth dn_detr.pth --config-file configs/dn_detr_R50_50ep.yaml

dn-detr convert yolo --help shows the options of both data sets, dn-detr convert checkpoint --help those of checkpoints.
"""

import argparse

from dn_detr_d2_cli import unknown_word

from ..command_line import make_parser
from . import convert_checkpoint, convert_dataset

FROM = ("yolo", "voc", "checkpoint")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: ``source`` and the ``rest``, which is for the converter."""
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="yolo|voc|checkpoint", help="what is converted")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="files and options")
    args = parser.parse_args(argv)
    if args.source not in FROM:
        parser.error(unknown_word(args.source, list(FROM), "source of dn-detr convert"))
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    if args.source == "checkpoint":
        return convert_checkpoint.main(args.rest)
    return convert_dataset.main([args.source, *args.rest])
