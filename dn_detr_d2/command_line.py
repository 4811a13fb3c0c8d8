"""What the programs share: overrides of the config on the command line, and exit codes.

Overrides are KEY VALUE pairs at the end, as in Detectron2. Exit code 0: done; 1: done with faults, or failed while running;
2, which is also argparse's: bad input, nothing was done. An error is one sentence on stderr.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError, UserError
from .utils.text_output import escape_unwritable

FAILED = 1
BAD_INPUT = 2


def make_parser(text: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring, and that goes by the name ``dn-detr VERB`` where that runs."""
    called, *rest = [*sys.argv, "", ""]
    prog = f"dn-detr {rest[0]}" if Path(called).stem == "dn-detr" else None
    return argparse.ArgumentParser(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds KEY VALUE pairs at the end of the command line, and ``--opts KEY VALUE ...``; both are read by :func:`parse`."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config, at the end")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], dest="more_opts", help=argparse.SUPPRESS)


def add_weights(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Adds ``--weights FILE``, which is short for the override MODEL.WEIGHTS FILE; see :func:`weights_of`."""
    parser.add_argument("--weights", metavar="FILE", help=f"{help_text}; the same as MODEL.WEIGHTS FILE at the end")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses a command line that ends with overrides; ``opts`` of the result is [key, value, ...]."""
    args = parser.parse_intermixed_args(argv)
    args.opts = [*args.opts, *args.more_opts]
    return args


def weights_of(args: argparse.Namespace) -> str:
    """The file of ``--weights``, or else of the override MODEL.WEIGHTS; "" without either.

    What the config file says does not count: the config.yaml of a training names the weights that it started from.
    """
    overrides = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    return args.weights or overrides.get("MODEL.WEIGHTS", "")


def required_weights(args: argparse.Namespace) -> str:
    """As :func:`weights_of`; raises ConfigError without either."""
    if weights := weights_of(args):
        return weights
    raise ConfigError("no weights are named; add MODEL.WEIGHTS FILE with the model_final.pth of a training")


def require_new_file(path: str, option: str = "") -> None:
    """Raises UserError where a file would be overwritten, such as the input that was mistaken for it.

    Args:
        path: what is to be written.
        option: of the command line that names it, "" for an argument by its place.
    """
    if os.path.lexists(path):
        raise UserError(f"{option} {path} exists; name a new file, or delete it first".lstrip())


def run_command(
    work: Callable[[], int | None],
    *,
    errors: tuple[type[Exception], ...] = (UserError,),
    describe: Callable[[Exception], str] = str,
) -> int:
    """Runs a program and returns its exit code.

    Args:
        work: prints its results and returns an exit code, None = 0.
        errors: that mean bad input.
        describe: the sentence about an error.

    Returns:
        int: what ``work`` returns; BAD_INPUT after one of ``errors``, FAILED after a FloatingPointError, which says that
        the model computed something that is not finite.
    """
    escape_unwritable()
    try:
        return work() or 0
    except (*errors, FloatingPointError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, errors) else FAILED
