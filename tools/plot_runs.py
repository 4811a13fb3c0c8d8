#!/usr/bin/env python3
"""Compares trainings: one picture of their curves, one table of their ends.

    python tools/plot_runs.py output/a_seed1 output/a_seed2 output/b --labels "with denoising" without --output runs.png
    python tools/plot_runs.py --group DN=output/a_seed1,output/a_seed2 --group matching=output/b

Runs whose config.yaml is the same but for SEED and OUTPUT_DIR are one group; --group says otherwise. The first group is the
baseline of the table. What is read and how seconds are counted: dn_detr_d2/visualization/runs.py. Exit code 2: bad input.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tabulate import tabulate

from dn_detr_d2 import UserError
from dn_detr_d2.command_line import run_command
from dn_detr_d2.visualization.curves import HEADERS, draw, table
from dn_detr_d2.visualization.runs import Group, Run, group_runs, read_run

__all__ = ["Group", "Run", "collect", "draw", "group_runs", "main", "read_run", "table"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a training, its OUTPUT_DIR")
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=RUN,RUN", help="runs to draw as one, may be repeated"
    )
    parser.add_argument("--labels", nargs="+", default=[], metavar="NAME", help="names of the groups of RUN, in order")
    parser.add_argument("--output", default="runs.png", metavar="FILE", help="picture to write (default runs.png)")
    return parser.parse_args(argv)


def collect(runs: list[str], labels: list[str], named: list[str]) -> list[Group]:
    """The groups of a command line, those of ``--group`` last; raises UserError for what cannot be."""
    groups = group_runs([read_run(folder) for folder in runs])
    if labels and len(labels) != len(groups):
        names = [group.name for group in groups]
        raise UserError(f"--labels has {len(labels)} names for {len(groups)} groups {names}; give one name a group")
    for group, label in zip(groups, labels, strict=False):
        group.name = label
    for text in named:
        name, equals, folders = text.partition("=")
        if not (name and equals and all(folders.split(","))):
            raise UserError(f"--group {text!r} is not NAME=RUN,RUN")
        groups.append(Group(name, [read_run(folder) for folder in folders.split(",")]))
    if not groups:
        raise UserError("no run is named; give the folders of trainings, or --group NAME=RUN,RUN")
    if doubled := {group.name for group in groups if sum(other.name == group.name for other in groups) > 1}:
        raise UserError(f"two groups are called {sorted(doubled)[0]!r}; tell them apart with --labels")
    return groups


def compare(args: argparse.Namespace) -> list[str]:
    """Draws; returns the table and where the picture is."""
    groups = collect(args.runs, args.labels, args.group)
    path = draw(groups, args.output)
    return [tabulate(table(groups), HEADERS, tablefmt="github", disable_numparse=True), f"picture: {path}"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(*compare(args), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
