"""Writes a trained detector as a file that runs without this package, and checks that it does the same.

    dn-detr export --config-file output/quickstart/config.yaml --format onnx --run-eval --output out \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
    dn-detr export --config-file configs/dino_R50_4scale_12ep.yaml --format onnx --int8 --sample-image photograph.jpg \\
        --output out MODEL.WEIGHTS dino.pth

The file is loaded again, and its detections are compared with those of the model, on the sample image or on the first images
of DATASETS.TEST; only if they agree does it get its name. docs/export.md says what is in it and how it is used.

Exit codes: 0 = done, 1 = there is no file, because it did not agree or could not be written, 2 = bad input.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from ..command_line import FAILED, add_overrides, make_parser, parse, required_weights, run_command
from ..export.formats import FORMATS
from ..export.run import ExportError, Wish, export_model


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of the training")
    parser.add_argument("--format", required=True, choices=list(FORMATS))
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the file; made if need be")
    parser.add_argument(
        "--sample-image", default="", metavar="FILE", help="compare on this image instead of DATASETS.TEST"
    )
    parser.add_argument("--run-eval", action="store_true", help="also evaluate the model and the file on DATASETS.TEST")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX: 18, 19 or 20 (default 20)")
    parser.add_argument("--fp16", action="store_true", help="ONNX: compute in float16; half the size")
    parser.add_argument("--int8", action="store_true", help="ONNX: 8-bit weights, activations quantised as they come")
    add_overrides(parser)
    args = parse(parser, argv)
    args.weights = ""  # they are named by MODEL.WEIGHTS, as in Detectron2's tool
    return args


def export(args: argparse.Namespace) -> int:
    """Exports and prints what came of it; returns the exit code."""
    wish = Wish(
        args.format, Path(args.output), args.opset, args.fp16, args.int8, args.sample_image, evaluate=args.run_eval
    )
    try:
        path, agreement, results = export_model(args.config_file, args.opts, required_weights(args), wish)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if results:
        print(table(results))
    share, size = 100 * agreement.share, path.stat().st_size / 1e6
    print(
        f"{path}: {size:.1f} MB; {share:.1f} % of the model's detections are among its own, whose scores differ by at most "
        f"{agreement.score:.1g}; it takes {agreement.cpu_ratio:.2f} of the model's CPU time"
    )
    return 0


def table(results: dict[str, dict]) -> str:
    """Metrics of the model and of the file side by side."""
    tasks = [(task, name) for task, metrics in results["eager"].items() for name in metrics]
    rows = [[f"{task}/{name}", *(results[one][task][name] for one in results)] for task, name in tasks]
    return tabulate(rows, ["metric", *results], tablefmt="github", floatfmt=".2f")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: export(args))
