#!/usr/bin/env python3
"""Draws a detector's predictions on images.

    python demo.py --config-file output/quickstart/config.yaml --input a.jpg folder/ --output out/ \
        --confidence-threshold 0.5 --json MODEL.WEIGHTS output/quickstart/model_final.pth

A folder means all images in it. A picture has the name of its image, .jpg for JPEG files and .png for the others;
--json adds results.json with every box above the threshold, in pixels of the image. Of a model with masks the pictures show
the panoptic segments if it gives them (MODEL.DN_DETR.MASK.OUTPUTS), else the masks, else the class of each pixel.

--known boxes.json tells the model of objects, and it looks for the others: a list like results.json, of
{"file_name": "a.jpg", "class": 0, "box_xyxy": [x0, y0, x1, y1]}, the class by number or name. --labels circle,square looks
for these classes alone. The model must be trained for it (docs/prompting.md).
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

from dn_detr_d2 import setup_cfg  # before detectron2, whose import alone warns of torch.jit

# isort: split
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances

from dn_detr_d2 import ConfigError, DatasetError, UserError
from dn_detr_d2.command_line import add_overrides, parse
from dn_detr_d2.data import class_number, read_image
from dn_detr_d2.data.images import drawing_scale
from dn_detr_d2.predictor import Predictor
from dn_detr_d2.utils.text_output import escape_unwritable

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; detectron2's demo flags."""
    parser = argparse.ArgumentParser(description="Draw predictions on images.")
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML config, e.g. config.yaml of a training"
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images and folders of images")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures go; made if need be")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="lowest score to show, from 0 to 1 (default 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="also write results.json")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--known", metavar="FILE", help="objects that need not be found, in the form of results.json")
    told.add_argument(
        "--labels", metavar="A,B", help="names or numbers of the classes to look for, with commas between"
    )
    add_overrides(parser)
    return parse(parser, argv)


def list_images(paths: list[str]) -> list[Path]:
    """Files as given and the images of folders, sorted; raises DatasetError for what does not exist."""
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DatasetError(f"--input {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise DatasetError(f"--input {path} does not exist")
    return images


def plan_targets(images: list[Path], output: Path) -> dict[Path, Path]:
    """{image: picture}; raises ConfigError where a picture would overwrite an image or another picture."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder")
    targets, inputs = {}, {image.resolve() for image in images}
    for image in images:
        target = output / f"{image.stem}{'.jpg' if image.suffix.lower() in ('.jpg', '.jpeg') else '.png'}"
        if target.resolve() in inputs:
            raise ConfigError(f"--output {output} would overwrite the image {target}; choose another folder")
        if other := next((known for known, taken in targets.items() if taken == target), None):
            raise ConfigError(f"the pictures of {other} and {image} would both be {target}; draw them into two folders")
        targets[image] = target
    return targets


def class_metadata(cfg) -> Metadata:
    """Class names from the config, or of its test set; without either the pictures show class numbers."""
    if cfg.MODEL.DN_DETR.CLASS_NAMES:
        names = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
        return Metadata(name="demo", thing_classes=names, stuff_classes=names)
    return MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata(name="demo")


def read_known(path: str, images: list[Path], cfg) -> dict[Path, list[tuple[list[float], int]]]:
    """{image: its known boxes and classes} from a file like results.json.

    Raises:
        ConfigError: the file cannot be read, or has another form.
        UserError: an object of another image, or of a class that the model has not.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--known {path} cannot be read as JSON: {error}") from None
    given, found = {image.resolve(): image for image in images}, {}
    for i, record in enumerate(records if isinstance(records, list) else [records]):
        box = record.get("box_xyxy") if isinstance(record, dict) else None
        numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        if not numbers or not isinstance(record.get("file_name"), str) or "class" not in record:
            raise ConfigError(
                f"--known {path}, entry {i} must be an object with file_name, class and box_xyxy of four numbers, got "
                f"{json.dumps(record):.300}"
            )
        image = given.get(Path(record["file_name"]).resolve())
        if image is None:
            raise ConfigError(
                f"--known {path}, entry {i} is of {record['file_name']}, which is not in --input; take it out"
            )
        found.setdefault(image, []).append((box, class_number(record["class"], cfg)))
    return found


def read_prompts(args: argparse.Namespace, images: list[Path], cfg) -> Callable[[Path, tuple[int, int]], dict]:
    """From an image and its (height, width) to what the predictor is told of it."""
    if args.labels is not None:
        names = [name.strip() for name in args.labels.split(",") if name.strip()]
        known_names = cfg.MODEL.DN_DETR.CLASS_NAMES
        labels = [class_number(int(x) if x.isdecimal() and x not in known_names else x, cfg) for x in names]
        return lambda path, size: {"labels": labels}
    if args.known is None:
        return lambda path, size: {}
    known = read_known(args.known, images, cfg)

    def _told(path: Path, size: tuple[int, int]) -> dict:
        boxes, classes = zip(*known[path], strict=True) if path in known else ((), ())
        boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        return {"known": Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64))}

    return _told


def draw(image, found: dict, metadata: Metadata, path: Path) -> None:
    """Writes ``image`` (H, W, 3) BGR with segments, else boxes and masks, else the class of each pixel to ``path``."""
    from detectron2.utils.visualizer import Visualizer

    visualizer = Visualizer(image[:, :, ::-1], metadata, drawing_scale(image.shape[:2]))
    if "panoptic_seg" in found:
        ids, segments = found["panoptic_seg"]
        drawn = visualizer.draw_panoptic_seg(ids.cpu(), segments)
    elif "instances" in found:
        drawn = visualizer.draw_instance_predictions(found["instances"])
    else:
        drawn = visualizer.draw_sem_seg(found["sem_seg"].argmax(0).cpu())
    drawn.save(str(path))


def above(found: dict, threshold: float) -> dict:
    """The instances with a score of at least ``threshold``, if there are instances."""
    if "instances" not in found:
        return {}
    instances = found["instances"].to("cpu")
    return {"instances": instances[instances.scores >= threshold]}


def count_parts(found: dict) -> str:
    """How many things :func:`draw` draws, in words."""
    if "panoptic_seg" in found:
        return f"{len(found['panoptic_seg'][1])} segments"
    if "instances" in found:
        return f"{len(found['instances'])} objects"
    return f"{len(found['sem_seg'].argmax(0).unique())} classes"


def as_records(path: Path, instances: Instances, metadata: Metadata) -> list[dict]:
    """One JSON record a box: file, class index and name, score, [x0, y0, x1, y1] in pixels."""
    names = metadata.get("thing_classes", None)
    boxes, scores = instances.pred_boxes.tensor.tolist(), instances.scores.tolist()
    return [
        {
            "file_name": str(path),
            "class": index,
            "class_name": names[index] if names and index < len(names) else str(index),
            "score": round(score, 4),
            "box_xyxy": [round(x, 2) for x in box],
        }
        for index, score, box in zip(instances.pred_classes.tolist(), scores, boxes, strict=True)
    ]


def check_model(cfg, boxes: bool) -> None:
    """Raises ConfigError where the weights are not there, or ``boxes`` are wanted of a model that gives no instances."""
    weights, node = cfg.MODEL.WEIGHTS, cfg.MODEL.DN_DETR.MASK
    if not weights or ("://" not in weights and not Path(weights).is_file()):
        raise ConfigError(f"MODEL.WEIGHTS = {weights!r} does not exist; add --opts MODEL.WEIGHTS model_final.pth")
    if boxes and node.ENABLED and "instances" not in node.OUTPUTS:
        raise ConfigError(
            f"--json writes boxes of instances, but MODEL.DN_DETR.MASK.OUTPUTS is {list(node.OUTPUTS)}; leave --json out, "
            "or add 'instances'"
        )


def predict(args: argparse.Namespace) -> int:
    """Runs over all images; returns how many have no picture because of an error."""
    if not 0 <= args.confidence_threshold <= 1:  # also not a number
        raise ConfigError(f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold:g}")
    if importlib.util.find_spec("cv2") is None:
        raise ConfigError("drawing needs OpenCV: pip install -e '.[demo]', or pip install opencv-python-headless")
    output = Path(args.output)
    targets = plan_targets(list_images(args.input), output)
    cfg = setup_cfg(args.config_file, args.opts, splits=())
    check_model(cfg, args.json)
    told = read_prompts(args, list(targets), cfg)
    predictor, metadata = Predictor(cfg), class_metadata(cfg)

    output.mkdir(parents=True, exist_ok=True)
    records, failed = [], 0
    for path, target in targets.items():
        try:
            image = read_image(str(path), "BGR")
            found = predictor(image, **told(path, image.shape[:2]))
            found |= above(found, args.confidence_threshold)
            draw(image, found, metadata, target)
        except DatasetError as error:
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
        except Exception as error:  # whatever is wrong with one image, the others are drawn
            print(f"failed: {path}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
        else:
            print(f"{path}: {count_parts(found)} -> {target}")
            records += as_records(path, found["instances"], metadata) if args.json else []
    if args.json:
        (output / "results.json").write_text(json.dumps(records, indent=1))
        print(f"{len(records)} boxes -> {output / 'results.json'}")
    if failed:
        print(f"{failed} of {len(targets)} images have no picture, see above", file=sys.stderr)
    return failed


def run() -> int:
    """Command line; returns the exit code."""
    args = parse_arguments()
    escape_unwritable()
    try:
        return 1 if predict(args) else 0
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
