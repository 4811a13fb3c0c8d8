#!/usr/bin/env python3
"""Shows where queries look in an image, layer by layer of the decoder.

    python tools/visualize_attention.py --config-file output/quickstart/config.yaml \\
        --weights output/quickstart/model_final.pth --input a.jpg --best 3 --output pictures/
    python tools/visualize_attention.py ... --query 17 --output pictures/

Deformable systems: the sampling points of all heads, larger where the attention weight is, coloured by level. Dense systems:
the mean of the heads' attention as heat; with several levels their sum, each with the weight that the query gives it. The
image is resized as for a test. Take the config.yaml that the training wrote: it knows the classes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import add_overrides, add_weights, parse, required_weights, run_command
from dn_detr_d2.visualization.attention import best_queries, draw_attention, verdict
from dn_detr_d2.visualization.images import class_names, title_of, to_rgb
from dn_detr_d2.visualization.models import inference_image, load_model
from dn_detr_d2.visualization.recording import record
from dn_detr_d2.visualization.style import save


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the training")
    add_weights(parser, "model_final.pth of the training")
    parser.add_argument("--input", required=True, metavar="IMAGE", help="an image file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--query", type=int, metavar="N", help="number of a matching query, from 0")
    which.add_argument(
        "--best", type=int, default=3, metavar="K", help="the queries of the K best detections (default 3)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the pictures go; made if need be")
    add_overrides(parser)
    return parse(parser, argv)


def choose_queries(args: argparse.Namespace, seen, names: list[str]) -> list[int]:
    """The queries to draw; raises ConfigError for numbers that do not exist."""
    total = seen.matching.logits.shape[2]
    if args.query is None and args.best < 1:
        raise ConfigError(f"--best must be at least 1, got {args.best}")
    if args.query is not None and not 0 <= args.query < total:
        raise ConfigError(f"--query {args.query} does not exist; the model has queries 0 to {total - 1}")
    return best_queries(seen, args.best, names) if args.query is None else [args.query]


def visualize(args: argparse.Namespace) -> list[str]:
    """Writes a picture for each query; returns a line for each: what the query found, and the path."""
    weights = required_weights(args)
    cfg = setup_cfg(args.config_file, args.opts, splits=())
    image = inference_image(cfg, args.input)
    model = load_model(cfg, weights)
    seen, layers = record(model, image)
    pixels, names = to_rgb(image["image"], cfg.INPUT.FORMAT), class_names(cfg)
    written = []
    for query in choose_queries(args, seen, names):
        figure = draw_attention(seen, layers, query, pixels, names)
        found = f"query {query}: {verdict(seen, query, -1, names)}"
        figure.suptitle(f"{found} - {title_of(args.input, weights)}", fontsize=10)
        path = save(figure, Path(args.output) / f"{Path(args.input).stem}_query{query}.png")
        written.append(f"{found} -> {path}")
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(*visualize(args), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
