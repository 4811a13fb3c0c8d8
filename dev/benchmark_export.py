#!/usr/bin/env python3
"""Exports configs of the model zoo with random weights: size, time and difference of the ONNX files from their models.

    python dev/benchmark_export.py dn_detr_R50_50ep dino_R50_4scale_12ep
    python dev/benchmark_export.py mask2former_R50_instance_50ep --size 480 --format torch_export

The image is scikit-image's photograph of a cup, at the config's test size or at --size. Weights are those that a training
starts from plus normal noise of 0.05 outside the backbone, and seeded, because heads start at zero. The table has seconds
of CPU time of the export, megabytes of the file, the largest difference of logits, boxes and masks, the part of the model's
detections that are among those of the file, and the CPU time of one pass divided by that of the model (the median of
--rounds, one after the other). Exit code 2: bad input, 1: an export failed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.env import seed_all_rng
from PIL import Image
from skimage.data import coffee
from tabulate import tabulate
from torch import Tensor, nn

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import run_command
from dn_detr_d2.data import DetrDatasetMapper
from dn_detr_d2.export.detector import TOLERANCES, ExportedDetector, compare
from dn_detr_d2.export.formats import FORMATS, require_onnx
from dn_detr_d2.export.metadata import output_names

HEADERS = ("config", "format", "pixels", "export, s", "MB", "logits", "boxes", "masks", "detections", "time", "range")
NOISE = 0.05  # standard deviation of what is added to the weights


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="names of the model zoo or files")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="shortest edge (default: the config's)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="passes that are timed (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default 1)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what would be found after minutes."""
    for name in ("size", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    if args.format == "onnx":
        require_onnx()


def random_model(config: str, args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model of a config with seeded weights, and Detectron2's dict of the photograph."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DN_DETR.NUM_CLASSES", 80]
    if args.size:
        opts += ["INPUT.MIN_SIZE_TEST", args.size]
    cfg = setup_cfg(config, opts, splits=())
    seed_all_rng(args.seed)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(NOISE * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coffee.png"
        Image.fromarray(coffee()).save(file)
        return model, DetrDatasetMapper(cfg, False)({"file_name": str(file)})


def measure(config: str, args: argparse.Namespace) -> list[str]:
    """The row of one config."""
    model, image = random_model(config, args)
    suffix, write, load = FORMATS[args.format]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        started = time.process_time()
        write(model, path, {})
        export_seconds = time.process_time() - started
        size = path.stat().st_size / 1e6
        run = load(path)
    images = ImageList.from_tensors([image["image"].float()], model.size_divisibility)
    sizes = torch.tensor(images.image_sizes)
    with torch.inference_mode():
        ours, theirs = model.forward_tensors(images.tensor, sizes), run(images.tensor, sizes)
        ratios = []
        for _ in range(args.rounds):
            first = time.process_time()
            model.forward_tensors(images.tensor, sizes)
            between = time.process_time()
            run(images.tensor, sizes)
            ratios.append((time.process_time() - between) / (between - first))
    names = output_names(model)
    gaps = {name: difference(a, b) for name, a, b in zip(names, ours, theirs, strict=True)}
    agreement = compare(model, ExportedDetector(model, names, run), [[image]], TOLERANCES["fp32"])
    return [
        Path(config).stem,
        args.format,
        f"{images.tensor.shape[-2]} x {images.tensor.shape[-1]}",
        f"{export_seconds:.0f}",
        f"{size:.0f}",
        *(gaps.get(name, "-") for name in ("logits", "boxes", "masks")),
        f"{100 * agreement.share:.1f} %",
        f"{median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    ]


def difference(ours: Tensor, theirs: Tensor) -> str:
    """The largest difference of two tensors, with the median in brackets: a swap of two queries is a large one."""
    gaps = (ours - theirs).abs().flatten()
    return f"{gaps.max():.0e} ({gaps.median():.0e})"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)

    def work() -> None:
        check(args)
        rows = []
        for config in args.configs:
            rows.append(measure(config, args))
            print(rows[-1], file=sys.stderr, flush=True)
        print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
