#!/usr/bin/env python3
"""Plants wrong labels in a COCO-format file, and counts how many of them find_label_errors.py has found.

    python dev/flip_labels.py annotations.json flipped.json --rate 0.1
    python dev/flip_labels.py annotations.json flipped.json --found label_errors/label_errors.csv

The first writes flipped.json, in which so many annotations have another class, drawn uniformly. The second compares the two
files with the ranking made from the second: precision and recall at several lengths of the list, and how often the suggested
class is the original one.
"""

import argparse
import csv
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.command_line import run_command


def flip(content: dict, rate: float, seed: int) -> dict:
    """A COCO-format dict with ``rate`` of its annotations in another class."""
    if not 0 <= rate <= 1:
        raise UserError(f"--rate must lie in [0, 1], got {rate}")
    categories = [category["id"] for category in content["categories"]]
    if len(categories) < 2:
        raise DatasetError("labels can only be flipped where there are at least 2 categories")
    generator, annotations = random.Random(seed), content["annotations"]
    chosen = set(generator.sample(range(len(annotations)), int(rate * len(annotations))))
    flipped = []
    for i, annotation in enumerate(annotations):
        others = [category for category in categories if category != annotation["category_id"]]
        flipped.append(annotation | ({"category_id": generator.choice(others)} if i in chosen else {}))
    return content | {"annotations": flipped}


def score(original: dict, flipped: dict, ranking: list[dict]) -> list[str]:
    """Lines for the user about a ranking (rows of label_errors.csv, most suspicious first)."""
    names = {category["id"]: category["name"] for category in original["categories"]}
    truth = {str(x["id"]): names[x["category_id"]] for x in original["annotations"]}
    planted = {str(x["id"]) for x in flipped["annotations"] if names[x["category_id"]] != truth[str(x["id"])]}
    hits = [row["annotation"] in planted for row in ranking]
    count = sum(hits)
    if not count:
        raise DatasetError(f"none of the {len(ranking)} annotations in the ranking has a planted label")
    lines = [f"{count} of {len(ranking)} annotations have a planted label ({count / len(ranking):.3f} by chance)"]
    for top in (count // 4, count // 2, count, 2 * count):
        found = sum(hits[:top])
        lines.append(f"first {top}: precision {found / max(top, 1):.3f}, recall {found / count:.3f}")
    right = sum(row["suggested"] == truth[row["annotation"]] for row, hit in zip(ranking, hits, strict=True) if hit)
    return [*lines, f"the suggestion is the original class for {right / count:.3f} of the planted labels"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", metavar="JSON", help="annotations in COCO format")
    parser.add_argument("flipped", metavar="JSON", help="the same with planted labels; written unless --found")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the annotations that change (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="which annotations, and to what (default 0)")
    parser.add_argument("--found", metavar="CSV", help="label_errors.csv of find_label_errors.py on the flipped file")
    return parser.parse_args(argv)


def flip_or_score(args: argparse.Namespace) -> None:
    """Writes the flipped file, or prints how much of it was found."""
    original = json.loads(Path(args.original).read_text())
    if not args.found:
        Path(args.flipped).write_text(json.dumps(flip(original, args.rate, args.seed)))
        return
    with open(args.found, newline="") as file:
        ranking = list(csv.DictReader(file))
    print("\n".join(score(original, json.loads(Path(args.flipped).read_text()), ranking)))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: flip_or_score(args), errors=(UserError, OSError, json.JSONDecodeError))


if __name__ == "__main__":
    sys.exit(main())
