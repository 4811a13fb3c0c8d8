"""Writes a data set in YOLO's or Pascal VOC's format as COCO json, for DATASETS.COCO_JSON.

    dn-detr convert yolo data.yaml --split train train.json
    dn-detr convert yolo labels/train images/train train.json --names data.yaml
    dn-detr convert voc Annotations JPEGImages train.json --list ImageSets/Main/train.txt
    dn-detr convert voc Annotations JPEGImages all.json [--names classes.txt] [--zero-based]

One .txt or .xml a picture, sub-folders included. YOLO: every image of the folder, a missing .txt means no objects; lines
are "class cx cy w h" in [0, 1], or class and the points of a polygon. VOC: every .xml, or those of a list; corners are
1-based and inclusive unless --zero-based, objects marked "difficult" are kept. What was dropped, missing or changed is
counted. Every file that cannot be used is named in a sentence of its own; then nothing is written (code 2), or the rest
with --drop-bad (code 0).
"""

import argparse
import sys
from pathlib import Path

from ..command_line import BAD_INPUT, make_parser, run_command
from ..data import convert_voc, convert_yolo
from ..data.check_set import write_json
from ..data.convert import Conversion, refuse_empty
from ..data.yolo_yaml import SPLITS, YAML, read_classes, read_names, read_split
from ..errors import DatasetError, UserError

OF_YOLO = {"--split": "split", "--boxes": "boxes", "--pixels": "pixels", "--ignore-confidence": "ignore_confidence"}
OF_VOC = {
    "--zero-based": "zero_based",
    "--match": "match",
    "--wrong-size": "wrong_size",
    "--corners": "corners",
    "--list": "list",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("format", choices=("yolo", "voc"))
    parser.add_argument("paths", nargs="+", metavar="PATH", help="LABELS IMAGES OUT.json, or data.yaml OUT.json")
    parser.add_argument("--names", metavar="FILE", help="data.yaml, or classes.txt with a name a line; YOLO needs it")
    parser.add_argument(
        "--drop-bad", action="store_true", help="leave out pictures and label files that cannot be used"
    )
    parser.add_argument("--allow-empty", action="store_true", help="write a set without a single box too")
    yolo = parser.add_argument_group("yolo")
    yolo.add_argument("--split", choices=SPLITS, help="the part of data.yaml that is converted")
    yolo.add_argument("--boxes", choices=tuple(convert_yolo.CONVENTIONS), help="the four numbers of a box (cxcywh)")
    yolo.add_argument("--pixels", action="store_true", help="coordinates are pixels, not parts of width and height")
    yolo.add_argument("--ignore-confidence", action="store_true", help="a number after the box is a confidence")
    voc = parser.add_argument_group("voc")
    voc.add_argument("--zero-based", action="store_true", help="corners start at 0 and xmax is not inclusive")
    voc.add_argument(
        "--match", choices=("stem", "filename"), help="find pictures by the .xml's name, or <filename>, only"
    )
    voc.add_argument("--wrong-size", choices=("ignore", "scale"), help="where <size> is not the picture's (refused)")
    of_corners = ("swapped", *convert_voc.CONVENTIONS)
    voc.add_argument("--corners", choices=of_corners, help="xmin to ymax are corners in the wrong order, or are these")
    voc.add_argument("--list", metavar="FILE", help="names of .xml files without ending, one a line: a part of the set")
    return parser.parse_intermixed_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError where options and paths do not fit together."""
    foreign = OF_VOC if args.format == "yolo" else OF_YOLO
    if given := [option for option, name in foreign.items() if getattr(args, name)]:
        raise UserError(f"{', '.join(given)} is not for {args.format}; leave it out")
    *inputs, output = args.paths
    if Path(output).suffix.lower() != ".json" and Path(output).exists():
        raise UserError(f"{output} exists and does not end in .json; name the file to be written last: OUT.json")
    of_yaml = len(inputs) == 1 and args.format == "yolo" and Path(inputs[0]).suffix.lower() in YAML
    if not of_yaml and len(inputs) != 2:
        raise UserError(
            f"got the paths {args.paths}; {args.format} takes LABELS IMAGES OUT.json"
            + (", or data.yaml OUT.json --split train" if args.format == "yolo" else "")
        )
    if of_yaml and not args.split:
        raise UserError(f"{inputs[0]} has several parts; name one with --split {', --split '.join(SPLITS)}")
    if args.split and not of_yaml:
        raise UserError("--split is for data.yaml OUT.json; LABELS and IMAGES name the folders themselves")
    for folder in () if of_yaml else inputs:
        if not Path(folder).is_dir():
            raise DatasetError(f"folder {folder} does not exist")
    if args.format == "yolo" and not of_yaml and not args.names:
        near = [Path(folder) / name for folder in inputs for name in ("classes.txt", "../classes.txt", "../data.yaml")]
        found = next((f"; --names {file} is there" for file in near if file.is_file()), "")
        raise UserError(f"yolo needs --names data.yaml or classes.txt: its labels are numbers{found}")


def read_list(path: Path) -> frozenset[str]:
    """The lines of a list such as VOC's ImageSets/Main/train.txt; raises DatasetError where there are none."""
    try:
        names = frozenset(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--list {path} cannot be read as text: {error}") from None
    if not names:
        raise DatasetError(f"--list {path} names nothing; it needs a name a line")
    return names


def convert(args: argparse.Namespace) -> Conversion:
    """Reads the data set; raises UserError and OSError."""
    *inputs, _ = map(Path, args.paths)
    if args.format == "voc":
        names = read_names(Path(args.names)) if args.names else []
        match, wrong_size = args.match or "auto", args.wrong_size or "refuse"
        listed = read_list(Path(args.list)) if args.list else None
        options = convert_voc.Options(args.zero_based, match, wrong_size, args.corners or "", listed)
        return convert_voc.convert_voc(*inputs, names, options)
    options = convert_yolo.Options(args.boxes, args.pixels, args.ignore_confidence)
    if args.split:
        split = read_split(inputs[0], args.split)
        return convert_yolo.convert_split(split, read_classes(Path(args.names or inputs[0])), options)
    return convert_yolo.convert_folders(*inputs, read_classes(Path(args.names)), options)


def printable(text: object) -> str:
    """A text with escapes for the control characters that file names may hold."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


def write(args: argparse.Namespace) -> int:
    """Converts, writes and reports; the exit code is that of bad input if there are files that cannot be used."""
    check_arguments(args)
    found = convert(args)
    refused = bool(found.faults) and not args.drop_bad
    if not refused:
        refuse_empty(found, args.allow_empty)
        write_json(found.content, args.paths[-1])
    for fault in found.faults:
        print(printable(f"{'error' if refused else 'left out'}: {fault}"), file=sys.stderr)
    for line in [*found.tally.lines(), found.hint]:
        if line:
            print(printable(f"note: {line}"))
    words = {"images": "images", "annotations": "boxes", "categories": "classes"}
    counts = ", ".join(f"{len(found.content[key])} {word}" for key, word in words.items())
    if refused:
        print(f"{counts}; {len(found.faults)} bad files, nothing written; --drop-bad leaves them out")
        return BAD_INPUT
    left_out = f"; {len(found.faults)} bad files left out" if found.faults else ""
    print(printable(f"{counts}{left_out}; written: {args.paths[-1]}, image folder: {found.folder}"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: write(args), errors=(UserError, OSError), describe=printable)
