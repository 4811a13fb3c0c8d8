#!/usr/bin/env python3
"""Makes the report of a training, OUTPUT_DIR/report/index.html, again or for the first time.

    python tools/make_report.py --config-file output/quickstart/config.yaml
    python tools/make_report.py --config-file moved/config.yaml OUTPUT_DIR moved

Reads what the training and its last evaluation have written; nothing is evaluated once more. Exit code 2: bad input.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.engine.extras import REPORT_PACKAGES, report_is_possible


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config.yaml of a training")
    add_overrides(parser)
    return parse(parser, argv)


def make(args: argparse.Namespace) -> str:
    """Writes the report and returns its path; raises UserError for bad input."""
    cfg = setup_cfg(args.config_file, args.opts, splits=())
    if not report_is_possible():
        raise ConfigError(f"a report needs {' and '.join(REPORT_PACKAGES)}; pip install 'dn_detr_d2[report]'")
    from dn_detr_d2.report.build import write_report

    return str(write_report(cfg))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(make(args)))


if __name__ == "__main__":
    sys.exit(main())
