#!/usr/bin/env python3
"""Shows what denoising training does to one image: the noise, its removal layer by layer, and the attention mask.

    python tools/visualize_denoising.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --image 3 --output pictures/
    python tools/visualize_denoising.py --config-file configs/dino_R50_4scale_12ep.yaml --dataset shapes_train \\
        --output pictures/

Without --weights the model is random, and the pictures say so. The image is resized as for a test and not augmented.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

import torch

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import add_overrides, add_weights, parse, run_command, weights_of
from dn_detr_d2.visualization.denoising import draw_mask, draw_noise, draw_refinement
from dn_detr_d2.visualization.images import class_names, title_of, to_rgb
from dn_detr_d2.visualization.models import load_model, observe_denoising, training_image
from dn_detr_d2.visualization.style import save


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a system with denoising")
    add_weights(parser, "of a training (default: a random model)")
    parser.add_argument("--dataset", metavar="NAME", help="registered data set (default DATASETS.TRAIN)")
    parser.add_argument(
        "--image", metavar="ID", help="image id, or else its position (default: the first with an object)"
    )
    parser.add_argument("--groups", type=int, default=6, metavar="N", help="show at most so many groups (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of a random model (default 0)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures go; made if need be")
    add_overrides(parser)
    return parse(parser, argv)


def read_config(args: argparse.Namespace):
    """The config with ``--dataset`` as its training set; raises ConfigError where there is no denoising."""
    if args.groups < 1:
        raise ConfigError(f"--groups must be at least 1, got {args.groups}")
    chosen = ["DATASETS.TRAIN", (args.dataset,)] if args.dataset else []
    alone = ["SEMI_SUPERVISED.ENABLED", False]  # images without annotations are not looked at
    cfg = setup_cfg(args.config_file, [*args.opts, *chosen, *alone], splits=("TRAIN",))
    if not cfg.MODEL.DN_DETR.DENOISING.NAME:
        raise ConfigError(
            f"{args.config_file} trains without denoising; choose another config, or set MODEL.DN_DETR.DENOISING.NAME to "
            "DenoisingGenerator or ContrastiveDenoisingGenerator"
        )
    return cfg


def visualize(args: argparse.Namespace) -> list[str]:
    """Writes the three pictures; returns their paths."""
    cfg, weights = read_config(args), weights_of(args)
    record = training_image(cfg, args.image)
    torch.manual_seed(args.seed)
    model = load_model(cfg, weights)
    outputs = observe_denoising(model, record, args.seed)
    pixels, names = to_rgb(record["image"], cfg.INPUT.FORMAT), class_names(cfg)
    figures = {
        "noise": draw_noise(outputs, pixels, names, args.groups),
        "refinement": draw_refinement(outputs, pixels, names),
        "attention_mask": draw_mask(outputs),
    }
    written = []
    for name, figure in figures.items():
        figure.suptitle(title_of(record["file_name"], weights), fontsize=10)
        path = Path(args.output) / f"{Path(record['file_name']).stem}_{name}.png"
        written.append(str(save(figure, path)))
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(*visualize(args), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
