"""Evaluates a trained detector on DATASETS.TEST; the same as dn-detr train --eval-only.

    dn-detr eval --config-file output/quickstart/config.yaml MODEL.WEIGHTS output/quickstart/model_final.pth
    dn-detr eval --config-file output/quickstart/config.yaml --num-gpus 2 MODEL.DEVICE cpu \\
        MODEL.WEIGHTS output/quickstart/model_final.pth

Exit codes: 0 = done, 1 = failed while running, or Ctrl-C, 2 = bad input, 75 = stopped by SIGTERM or SIGUSR1.
"""

import argparse

from . import train


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = train.training_parser(__doc__)
    parser.set_defaults(eval_only=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return train.run(parse_arguments(argv))


def run_and_leave(argv: list[str] | None = None) -> int:
    """As that of trainings."""
    return train.run_and_leave(argv, main)
