#!/usr/bin/env python3
"""Writes boxes around regions that look like objects, for a pretraining without labels.

    python tools/propose_regions.py datasets/cells/images regions.json
    python tools/propose_regions.py datasets/cells/images regions.json --only datasets/cells/train.json

The boxes have one class, "region", and come from a segmentation of the image alone. A training on them, in COCO format,
learns to find and to restore them; one with labels then begins with its weights (docs/few_labels.md). Needs scikit-image:
pip install 'dn_detr_d2[regions]'. Exit code 1: images that a training would refuse were left out, those that cannot be read
and links that lead out of the folder; 2: bad input.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.command_line import FAILED, require_new_file, run_command
from dn_detr_d2.data import load_coco_json, read_image
from dn_detr_d2.data.check_set import write_json
from dn_detr_d2.data.images import ImageFolder
from dn_detr_d2.data.regions import propose_regions
from dn_detr_d2.data.unlabeled import images_below


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="FOLDER", help="of images")
    parser.add_argument("output", metavar="OUT.json", help="COCO-format file to write")
    parser.add_argument(
        "--only", metavar="JSON", help="only the images of this COCO-format file; its boxes are not used"
    )
    parser.add_argument("--top", type=int, default=30, help="regions of an image at most (default 30)")
    return parser.parse_args(argv)


def chosen_images(args: argparse.Namespace) -> list[Path]:
    """The images that regions are wanted of."""
    if args.only:
        return [Path(record["file_name"]) for record in load_coco_json(args.only, args.images)]
    return images_below(Path(args.images))


def content_of(files: list[Path], folder: Path, top: int) -> dict:
    """COCO-format dict of the regions of images, whose names are relative to ``folder``; of those that can be trained on."""
    images, annotations, finder = [], [], ImageFolder(folder)
    for number, file in enumerate(files, 1):
        name = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
        try:
            image = read_image(finder.find(name), "RGB")
        except DatasetError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        boxes, scores = propose_regions(image, top)
        height, width = image.shape[:2]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for (x0, y0, x1, y1), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            found = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": box, "score": score}
            annotations.append(found | {"area": box[2] * box[3], "iscrowd": 0})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "region"}]}


def write(args: argparse.Namespace) -> int:
    """Writes the file, says what is in it, and returns the exit code."""
    if args.top < 1:
        raise UserError(f"--top must be positive, got {args.top}")
    if not Path(args.images).is_dir():
        raise UserError(f"{args.images} is no folder; name a folder of images")
    if not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"{args.output} cannot be written: its folder does not exist; make it first")
    require_new_file(args.output)
    files = chosen_images(args)
    content = content_of(files, Path(args.images), args.top)
    if not content["images"]:
        raise UserError(f"{args.images} holds no image that a training takes")
    write_json(content, args.output)
    print(f"{args.output}: {len(content['annotations'])} regions of {len(content['images'])} images")
    return FAILED if len(content["images"]) < len(files) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())
