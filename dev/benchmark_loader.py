#!/usr/bin/env python3
"""CPU time of a loader process an image: images that leave as uint8 against images that are normalised on the CPU.

    python dev/benchmark_loader.py
    python dev/benchmark_loader.py --dataset shapes_train
    python dev/benchmark_loader.py --json annotations.json --images images/ --config-file configs/dn_detr_R50_50ep.yaml

Both sides read the same images with the same augmentations, each in one loader process of its own that hands them over in
shared memory, and take turns. One is the project's mapper; the other goes on to float32 numbers minus the mean and divided
by the deviation, as many trainers do. A round's CPU time is that of the whole process between the beginnings of two images:
reading, decoding, augmenting, handing over. The ratio is the median of that of each round, with its range. "images/s" is
what a process does that has a core to itself.

Without --dataset or --json, JPEG files of 640 x 480 pixels with seven objects each are made: random colours at four scales,
about as large as COCO's. Images are resized to 800 pixels on the shorter side; KEY VALUE pairs change the config, and
--augment keeps its own sizes and crops. Exit code 2: bad input.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.data import register_coco_json
from dn_detr_d2.data.mapper import DetrDatasetMapper
from dn_detr_d2.data.registered import records_of
from dn_detr_d2.data.stream import Positions, StreamLoader, TrainingStream

ROOT = Path(__file__).resolve().parent.parent
NAME = "benchmark_loader"
WIDTH, HEIGHT, OBJECTS = 640, 480, 7
FIXED = ("INPUT.MIN_SIZE_TRAIN", (800,), "INPUT.CROP.ENABLED", False)
BATCH = 2
HEADERS = ("pixels leave as", "ms CPU an image", "images/s", "ratio", "range")


class Stamped:
    """A mapper whose records say how much CPU time their process has used before.

    Args:
        mapper: of the project.
        normalise: (mean, deviation) of each channel to leave as float32 numbers; None = leave as uint8.
    """

    def __init__(self, mapper: DetrDatasetMapper, normalise: tuple[list[float], list[float]] | None = None):
        self.mapper, self.normalise = mapper, None
        if normalise is not None:
            self.normalise = [torch.tensor(values).view(-1, 1, 1) for values in normalise]

    def __call__(self, record: dict) -> dict:
        """The mapped record with ``stamp``, seconds."""
        stamp = time.process_time()
        found = self.mapper(record)
        if self.normalise is not None:
            mean, deviation = self.normalise
            found["image"] = found["image"].float().sub_(mean).div_(deviation)
        return {**found, "stamp": stamp}


def make_images(folder: Path, number: int, seed: int) -> None:
    """JPEG files and ``annotations.json`` of COCO's form, each object with a polygon of 40 corners."""
    generator, images, annotations = np.random.default_rng(seed), [], []
    for i in range(number):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cells, weight in ((4, 70), (16, 40), (80, 25), (320, 15)):
            coarse = generator.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += (np.asarray(smooth, np.float32) - 127.5) * (weight / 75)
        name = f"{i:04d}.jpg"
        Image.fromarray((pixels + 127.5).clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
        images.append({"id": i + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for _ in range(OBJECTS):
            centre, radius = generator.uniform((100, 100), (WIDTH - 100, HEIGHT - 100)), generator.uniform(20, 90)
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0}
            annotation |= {"bbox": [*(centre - radius), 2 * radius, 2 * radius], "area": np.pi * radius**2}
            annotations.append(annotation | {"segmentation": [corners.ravel().tolist()]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(content))


def rounds(loader: StreamLoader, number: int) -> Iterator[float]:
    """Endless: seconds of CPU time of the loader process an image, each over ``number`` images."""
    stamps = (record["stamp"] for batch in loader for record in batch)
    for _ in range(4 * BATCH):  # imports, page faults of the first images
        last = next(stamps)
    while True:
        for _ in range(number):
            stamp = next(stamps)
        yield (stamp - last) / number
        last = stamp


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "dn_detr_R50_50ep.yaml"), metavar="FILE")
    parser.add_argument("--dataset", metavar="NAME", help="a registered data set instead of made images")
    parser.add_argument("--json", metavar="FILE", help="annotations of COCO's form instead of made images")
    parser.add_argument("--images", metavar="FOLDER", help="where the images of --json are")
    parser.add_argument("--number", type=int, default=20, metavar="N", help="images of a side in a round (default 20)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--augment", action="store_true", help="sizes and crops of the config")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    add_overrides(parser)
    return parse(parser, argv)


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The table."""
    for name in ("number", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if (args.json is None) != (args.images is None):
        raise ConfigError("--json and --images belong together: annotations, and the folder of their images")
    torch.set_num_threads(1)
    dataset = args.dataset
    if dataset is None:
        if args.json is None:
            make_images(folder, min(args.number * args.rounds, 32), args.seed)
        dataset = NAME
        register_coco_json(NAME, args.json or str(folder / "annotations.json"), args.images or str(folder))
    fixed = () if args.augment else FIXED
    cfg = setup_cfg(
        args.config_file, ["MODEL.DEVICE", "cpu", *fixed, "DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (), *args.opts]
    )
    records = records_of(dataset)
    sides = {"uint8": None, "float32": (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)}
    iterators = {}
    for side, normalise in sides.items():
        mapper = Stamped(DetrDatasetMapper(cfg, True), normalise)
        iterators[side] = rounds(
            StreamLoader(TrainingStream(records, mapper, args.seed), Positions(BATCH), 1), args.number
        )
    seconds = [{side: next(iterator) for side, iterator in iterators.items()} for _ in range(args.rounds)]
    ratios = [each["float32"] / each["uint8"] for each in seconds]
    rows = []
    for side in sides:
        typical = median(each[side] for each in seconds)
        compared = (
            [f"{median(ratios):.2f}x", f"{min(ratios):.2f} to {max(ratios):.2f}"] if side == "uint8" else ["1", ""]
        )
        rows.append([side, f"{1e3 * typical:.1f}", f"{1 / typical:.0f}", *compared])
    return tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        return run_command(lambda: print(measure(args, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
