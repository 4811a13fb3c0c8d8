"""Lists everything that is wrong with a COCO-format data set and its images, and repairs what needs no judgement.

Of a folder without annotations, such as DATASETS.UNLABELED takes, the images alone are checked.

    dn-detr check train.json images/train --val val.json images/val --num-queries 300
    dn-detr check train.json images/train --fix repaired.json
    dn-detr check train.json images/train --fix repaired.json --drop-bad
    dn-detr check train.json images/train --fix repaired.json --wrong-size scale
    dn-detr check all.json images --split 0.8 --seed 1
    dn-detr check unlabeled_images --val val.json images/val

Exit code: 0 = no problems, 1 = problems, 2 = the file or the folder cannot be read or a file not be written. With --fix the
report and the code are about the repaired file. What is checked and repaired, and how a set is split: docs/datasets.md.
"""

import argparse
import os
from pathlib import Path

from ..command_line import make_parser, run_command
from ..data.check_images import check_overlap
from ..data.check_set import CheckOptions, check_folder, check_set, folder_content, repair_set, write_json
from ..data.coco_custom import load_coco_json, read_content
from ..data.conventions import CHOICES
from ..data.normalise import objects_of
from ..data.report import Report
from ..data.split import split_content
from ..errors import DatasetError, UserError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="COCO format; or a folder of images alone")
    parser.add_argument("folder", metavar="IMAGE_FOLDER", nargs="?", help="what file_name is relative to")
    parser.add_argument("--val", nargs=2, metavar=("JSON", "FOLDER"), help="second set, checked too and compared")
    parser.add_argument("--num-queries", type=int, default=0, metavar="N", help="MODEL.DN_DETR.NUM_QUERIES")
    parser.add_argument(
        "--denoising-budget", type=int, default=0, metavar="N", help="DENOISING.MAX_QUERIES // DENOISING.NUM_GROUPS"
    )
    parser.add_argument("--no-images", action="store_true", help="look at the annotations only")
    parser.add_argument(
        "--masks", action="store_true", help="masks are trained: count and repair what is wrong with them"
    )
    parser.add_argument("--fix", metavar="OUT.json", help="write a repaired copy of ANNOTATIONS.json")
    parser.add_argument(
        "--drop-bad", action="store_true", help="with --fix: leave out images and annotations that cannot be used"
    )
    parser.add_argument(
        "--boxes", choices=CHOICES, help="with --fix: what the boxes are written as; xywh = they are right as they are"
    )
    parser.add_argument(
        "--wrong-size",
        choices=("ignore", "scale"),
        help="with --fix: where images have another size than annotated, the boxes are those of the image (ignore), or of "
        "the annotated size, from which it was resized (scale)",
    )
    parser.add_argument(
        "--split",
        type=float,
        metavar="FRACTION",
        help="write all_train.json with so many of the images, and all_val.json",
    )
    parser.add_argument("--seed", type=int, default=0, help="with --split: which images (default 0)")
    return parser.parse_args(argv)


def read(json_file: str, folder: str) -> dict:
    """The content of an annotation file whose image folder exists; raises DatasetError."""
    content = read_content(Path(json_file))
    if any("segments_info" in entry for entry in objects_of(content, "annotations")):
        raise DatasetError(
            f"{json_file} is a panoptic file, whose annotations have segments_info; this program checks files of instances, "
            "and a training with DATASETS.COCO_PANOPTIC names what is wrong with a panoptic one"
        )
    if not Path(folder).is_dir():
        raise DatasetError(f"image folder {folder} does not exist or is no folder")
    return content


def check(args: argparse.Namespace) -> dict[str, Report]:
    """Annotation file or folder -> what is wrong with it; with ``--fix`` the first is repaired before."""
    alone = Path(args.annotations).is_dir()
    folder = args.annotations if alone else args.folder
    content = folder_content(folder) if alone else read(args.annotations, folder)
    other = read(*args.val) if args.val else None
    options = CheckOptions(args.num_queries, args.denoising_budget, not args.no_images, args.masks)
    if alone:
        report = check_folder(content, folder)
    elif args.fix:
        report = repair_set(
            content,
            folder,
            args.fix,
            options,
            drop_bad=args.drop_bad,
            boxes=args.boxes,
            wrong_size=args.wrong_size,
        )
    else:
        report = check_set(content, folder, options)
    reports = {args.annotations: report}
    if other is not None:
        reports[args.val[0]] = check_set(other, args.val[1], options)
        images = objects_of(content, "images"), objects_of(other, "images")
        check_overlap(images[0], folder, images[1], args.val[1], report, not args.no_images)
    return reports


NEED_ANNOTATIONS = (
    "fix",
    "drop_bad",
    "boxes",
    "wrong_size",
    "split",
    "masks",
    "num_queries",
    "denoising_budget",
    "no_images",
)


def refuse_inputs(args: argparse.Namespace) -> None:
    """Raises UserError unless there is an annotation file and its folder, or a folder alone with options for it."""
    if not Path(args.annotations).is_dir():
        if args.folder is None:
            if not Path(args.annotations).exists():
                raise UserError(f"{args.annotations} does not exist; paths are relative to the current folder")
            raise UserError(f"name the IMAGE_FOLDER that file_name in {args.annotations} is relative to")
        return
    if args.folder is not None:
        raise UserError(f"{args.annotations} is a folder; give it alone, or ANNOTATIONS.json and then IMAGE_FOLDER")
    if given := [name for name in NEED_ANNOTATIONS if getattr(args, name) not in (None, False, 0)]:
        raise UserError(
            f"--{given[0].replace('_', '-')} needs an annotation file; {args.annotations} is a folder of images"
        )


def refuse_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not fit together, or would overwrite a file."""
    refuse_inputs(args)
    read_files = [args.annotations, *(args.val or [])[:1]]
    if args.fix and os.path.realpath(args.fix) in map(os.path.realpath, read_files):
        raise UserError(f"--fix {args.fix} is an input; name another file")
    for target in split_targets(args) if args.split is not None else ():
        if target.exists():
            raise UserError(
                f"--split would overwrite {target}; move it away, or write the parts elsewhere with --fix OUT.json"
            )
    if (args.drop_bad or args.boxes or args.wrong_size) and not args.fix:
        raise UserError("--drop-bad, --boxes and --wrong-size need --fix OUT.json, which the result is written to")
    if args.wrong_size and args.no_images:
        raise UserError("--wrong-size compares with the images; leave out --no-images")
    if args.split is not None and not 0 < args.split < 1:
        raise UserError(f"--split must lie between 0 and 1, got {args.split:g}")
    if min(args.num_queries, args.denoising_budget) < 0:
        raise UserError(
            f"--num-queries and --denoising-budget must not be negative, got {args.num_queries} and {args.denoising_budget}"
        )


def split_targets(args: argparse.Namespace) -> list[Path]:
    """Where --split writes its two parts: beside the file that is split."""
    source = Path(args.fix or args.annotations)
    return [source.with_name(f"{source.stem}_{name}.json") for name in ("train", "val")]


def split(args: argparse.Namespace) -> None:
    """Writes the two parts of the data set, of the repaired one with --fix; raises UserError."""
    source = Path(args.fix or args.annotations)
    load_coco_json(source, args.folder)  # refuses what a training would refuse
    parts = split_content(read_content(source), args.split, args.seed)
    for part, target in zip(parts, split_targets(args), strict=True):
        write_json(part, str(target))
        print(f"{len(part['images'])} images, {len(part.get('annotations', []))} annotations -> {target}")


def report(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if there are problems."""
    refuse_arguments(args)
    reports = check(args)
    for name, found in reports.items():
        print("\n".join([f"{name}:", *found.lines()]))
    if args.split is not None:
        split(args)
    return int(any(found.problems() for found in reports.values()))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: report(args))
