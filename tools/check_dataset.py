#!/usr/bin/env python3
"""Lists everything that is wrong with a COCO-format data set and its images, and repairs what needs no judgement.

    python tools/check_dataset.py train.json images/train --val val.json images/val --num-queries 300
    python tools/check_dataset.py train.json images/train --fix repaired.json
    python tools/check_dataset.py train.json images/train --fix repaired.json --drop-bad

Exit code: 0 = no problems, 1 = problems, 2 = the file or the folder cannot be read or the repaired file not be written.
With --fix the report and the code are about the repaired file. What is checked and repaired: docs/datasets.md.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.data.check import annotated_sizes, check_content
from dn_detr_d2.data.check_images import STOPPING, check_images, check_overlap
from dn_detr_d2.data.coco_custom import read_content
from dn_detr_d2.data.conventions import CHOICES
from dn_detr_d2.data.images import ImageFolder
from dn_detr_d2.data.normalise import objects_of
from dn_detr_d2.data.repair import converted, refuse_to_clip, repaired, rewritten, without_bad
from dn_detr_d2.data.report import Report
from dn_detr_d2.utils.files import atomic_write
from dn_detr_d2.utils.text_output import escape_unwritable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="COCO format")
    parser.add_argument("folder", metavar="IMAGE_FOLDER", help="what file_name is relative to")
    parser.add_argument("--val", nargs=2, metavar=("JSON", "FOLDER"), help="second set, checked too and compared")
    parser.add_argument("--num-queries", type=int, default=0, metavar="N", help="MODEL.DN_DETR.NUM_QUERIES")
    parser.add_argument(
        "--denoising-budget", type=int, default=0, metavar="N", help="DENOISING.MAX_QUERIES // DENOISING.NUM_GROUPS"
    )
    parser.add_argument("--no-images", action="store_true", help="look at the annotations only")
    parser.add_argument("--fix", metavar="OUT.json", help="write a repaired copy of ANNOTATIONS.json")
    parser.add_argument(
        "--drop-bad", action="store_true", help="with --fix: leave out images and annotations that cannot be used"
    )
    parser.add_argument(
        "--boxes", choices=CHOICES, help="with --fix: what the boxes are written as; xywh = they are right as they are"
    )
    return parser.parse_args(argv)


def read(json_file: str, folder: str) -> dict:
    """The content of an annotation file whose image folder exists; raises DatasetError."""
    content = read_content(Path(json_file))
    if not Path(folder).is_dir():
        raise DatasetError(f"image folder {folder} does not exist or is no folder")
    return content


def check(content: dict, folder: str, args: argparse.Namespace, fix: bool) -> Report:
    """One data set; with ``fix`` the repaired file is written and reported on."""
    if fix:
        return check_repaired(content, folder, args)
    report, images = Report(), objects_of(content, "images")
    sizes = annotated_sizes(images) if args.no_images else check_images(images, folder, report)
    check_content(content, report, sizes, args.num_queries, args.denoising_budget)
    return report


def check_repaired(content: dict, folder: str, args: argparse.Namespace) -> Report:
    """Writes the repaired file and reports on it."""
    report, unusable = Report(), {}
    content, _, changes = rewritten(content, ImageFolder(folder))
    images = objects_of(content, "images")
    sizes = annotated_sizes(images) if args.no_images else check_images(images, folder, report, unusable)
    if args.drop_bad:
        content, lines, rows = without_bad(content, unusable)
        sizes = sizes[rows]
        for kind in STOPPING:
            del report.counts[kind]
        print(
            "\n".join(
                [*(f"left out: {line}" for line in lines), f"{len(lines)} images, categories and annotations left out"]
            )
        )
    if args.boxes:
        before, content = content, converted(content, sizes, args.boxes)
        changes += Counter({f"box converted from {args.boxes}": count_changed(before, content)})
    refuse_to_clip(content, sizes)
    content, more = repaired(content, sizes)
    write(content, args.fix)
    changes += more
    for kind, count in (+changes).items():
        print(f"repaired: {count} x {kind}")
    print(f"{sum(changes.values())} annotations changed or dropped; written: {args.fix}")
    check_content(content, report, sizes, args.num_queries, args.denoising_budget)
    return report


def count_changed(before: dict, after: dict) -> int:
    """Annotations with another box, of two contents with the same annotations in the same order."""
    entries = zip(objects_of(before, "annotations"), objects_of(after, "annotations"), strict=True)
    return sum(old.get("bbox") is not new.get("bbox") for old, new in entries)


def write(content: dict, path: str) -> None:
    """Writes a JSON file whole or not at all; raises DatasetError."""
    try:
        with atomic_write(path, "w") as file:
            file.write(json.dumps(content))
    except OSError as error:
        raise DatasetError(f"--fix {path} cannot be written: {error.strerror}") from None


def refuse_overwriting(args: argparse.Namespace) -> None:
    """Raises UserError if --fix names a file that is read."""
    read_files = [args.annotations, *(args.val or [])[:1]]
    if args.fix and os.path.realpath(args.fix) in map(os.path.realpath, read_files):
        raise UserError(f"--fix {args.fix} is an input; name another file")
    if (args.drop_bad or args.boxes) and not args.fix:
        raise UserError("--drop-bad and --boxes need --fix OUT.json, which the result is written to")
    if min(args.num_queries, args.denoising_budget) < 0:
        raise UserError(
            f"--num-queries and --denoising-budget must not be negative, got {args.num_queries} and {args.denoising_budget}"
        )


def run(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code. What cannot be read is one sentence on stderr."""
    args = parse_arguments(argv)
    escape_unwritable()
    try:
        refuse_overwriting(args)
        content = read(args.annotations, args.folder)
        other = read(*args.val) if args.val else None
        reports = {args.annotations: check(content, args.folder, args, bool(args.fix))}
        if other is not None:
            reports[args.val[0]] = check(other, args.val[1], args, False)
            images = objects_of(content, "images"), objects_of(other, "images")
            report = reports[args.annotations]
            check_overlap(images[0], args.folder, images[1], args.val[1], report, not args.no_images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, report in reports.items():
        print("\n".join([f"{name}:", *report.lines()]))
    return int(any(report.problems() for report in reports.values()))


if __name__ == "__main__":
    sys.exit(run())
