#!/usr/bin/env python3
"""Lists the annotations of a data set whose label a trained model believes least.

    python tools/find_label_errors.py --config-file output/quickstart/config.yaml \
        --weights output/quickstart/model_final.pth --dataset shapes_train --output label_errors

Each annotated box enters the model as denoising queries with labels drawn at random, so the class must be read from the
image; the score is the probability of the likeliest other class minus that of the annotated one, in [-1, 1]. --output takes
label_errors.csv with all annotations and pictures of the first --top. How well it works: docs/instruments.md.
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from PIL import Image, ImageDraw
from tabulate import tabulate

from dn_detr_d2 import ConfigError, UserError, setup_cfg
from dn_detr_d2.data import build_probe_loader, check_files, read_image, records_of
from dn_detr_d2.engine import load_for_evaluation
from dn_detr_d2.evaluation import JudgedLabel, judge_labels
from dn_detr_d2.utils.text_output import escape_unwritable

COLUMNS = ("score", "image_id", "annotation", "file_name", "label", "suggested", "x0", "y0", "x1", "y1")
SHORTEST_SIDE = 480  # smaller images are drawn larger, so that the labels can be read
LONGEST_SIDE = 4800  # of an image that is drawn larger


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML config, e.g. config.yaml of a training"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of a model with denoising")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set, or one of COCO_JSON")
    parser.add_argument("--top", type=int, default=50, metavar="N", help="annotations to print and draw (default 50)")
    parser.add_argument(
        "--num-images", type=int, default=0, metavar="N", help="look at so many images; 0 = all (default)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where table and pictures go; without it they are not written"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_intermixed_args(argv)


def judge(args: argparse.Namespace) -> tuple[list[JudgedLabel], list[str]]:
    """All annotations, most suspicious first, and the names of the classes."""
    if min(args.top, args.num_images) < 0:
        raise ConfigError(f"--top and --num-images must not be negative, got {args.top} and {args.num_images}")
    if args.top == 0 and not args.output:
        raise ConfigError("--top 0 without --output shows nothing; give a number, or --output for the table of all")
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ConfigError(f"--output {args.output} is a file; name a folder")
    if "://" not in args.weights and not Path(args.weights).is_file():
        raise ConfigError(f"--weights {args.weights} does not exist")
    used = ["DATASETS.TRAIN", "()", "DATASETS.TEST", (args.dataset,), "MODEL.WEIGHTS", args.weights]
    cfg = setup_cfg(args.config_file, [*args.opts, *used], splits=("TEST",))
    check_files(args.dataset)
    loader = build_probe_loader(cfg, args.dataset, args.num_images)
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES) or MetadataCatalog.get(args.dataset).get("thing_classes", [])
    return judge_labels(load_for_evaluation(cfg), loader), names


def as_rows(judged: list[JudgedLabel], names: list[str], dataset: str) -> list[dict]:
    """One dict an annotation with the keys of ``COLUMNS``; boxes in pixels of the image."""
    records, rows = {record["image_id"]: record for record in records_of(dataset)}, []
    for found in judged:
        record = records[found.image_id]
        annotation = record["annotations"][found.index].get("id", f"number {found.index}")
        label, suggested = (names[i] if i < len(names) else str(i) for i in (found.label, found.suggested))
        values = (round(found.score, 4), found.image_id, annotation, record["file_name"], label, suggested)
        rows.append(dict(zip(COLUMNS, (*values, *(round(x, 1) for x in found.box)), strict=True)))
    return rows


def write(rows: list[dict], top: int, folder: Path) -> None:
    """label_errors.csv with all rows and one picture for each of the first ``top``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "label_errors.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for rank, row in enumerate(rows[:top], 1):
        draw(row).save(
            folder / f"{rank:04d}_{row['label']}_or_{row['suggested']}.png".replace("/", "-").replace(" ", "-")
        )


def draw(row: dict) -> Image.Image:
    """The image with the box, the annotated and the suggested class."""
    picture = Image.fromarray(read_image(row["file_name"], "RGB"))
    scale = max(1.0, min(SHORTEST_SIDE / min(picture.size), LONGEST_SIDE / max(picture.size)))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    box = [row[key] * scale for key in ("x0", "y0", "x1", "y1")]
    pen = ImageDraw.Draw(picture)
    pen.rectangle(box, outline=(255, 0, 0), width=3)
    text = f"annotated {row['label']}, rather {row['suggested']} ({row['score']:+.2f})"
    place = pen.textbbox((4, 4), text, font_size=18)
    pen.rectangle(place, fill=(0, 0, 0))
    pen.text((4, 4), text, fill=(255, 255, 255), font_size=18)
    return picture


def run(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code. A user's mistake is one sentence on stderr."""
    args = parse_arguments(argv)
    escape_unwritable()
    setup_logger(name="dn_detr_d2").setLevel(logging.WARNING)
    try:
        rows = as_rows(*judge(args), args.dataset)
        shown = [[row[key] for key in COLUMNS[:6]] for row in rows[: args.top]]
        print(tabulate(shown, COLUMNS[:6], tablefmt="github", floatfmt="+.3f"))
        doubted = sum(row["score"] > 0 for row in rows)
        print(f"{len(rows)} annotations; for {doubted} of them another class is likelier than the annotated one")
        if args.output:
            write(rows, args.top, Path(args.output))
            print(f"table and pictures: {args.output}")
    except (UserError, FloatingPointError) as error:
        sentence = str(error).strip().splitlines()[-1]  # a loader worker puts its traceback before it
        print(f"error: {sentence.removeprefix('dn_detr_d2.errors.DatasetError: ')}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
