#!/usr/bin/env python3
"""Times self-attention over denoising and matching queries, folded groups against one mask over all pairs.

    python dev/benchmark_self_attention.py
    python dev/benchmark_self_attention.py --matching 900 --device cuda

Forward and backward pass of 256 channels and 8 heads for two images, projections left out. Both take turns in the same
process; the ratio is the median of that of each round, with its range. On the CPU it is one of CPU time. "chosen" is what
training takes at that size. Exit code 2: bad input.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate
from torch import Tensor

from dn_detr_d2 import ConfigError
from dn_detr_d2.command_line import run_command
from dn_detr_d2.denoising import QueryGroups
from dn_detr_d2.layers.attention import attend, attend_folded, pays_to_fold
from dn_detr_d2.structures import IsolatedGroups

HEADS, DIM, IMAGES = 8, 256, 2
SIZES = ((7, 5), (20, 5), (30, 5), (40, 5), (60, 5), (100, 5), (100, 2), (20, 10), (100, 10), (200, 10))
HEADERS = ("queries of a group x groups", "pairs seen", "milliseconds", "ratio", "range", "chosen", "difference")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matching", type=int, default=300, metavar="N", help="matching queries (default 300)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the queries (default 0)")
    return parser.parse_args(argv)


def masked(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
    """(N, Q, C) by the mask over all pairs."""
    return attend(query, key, value, HEADS, blocked)


def folded(query: Tensor, key: Tensor, value: Tensor, groups: IsolatedGroups) -> Tensor:
    """(N, Q, C) by folded groups, whatever their size."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return attend_folded(query, key, value, groups).transpose(1, 2).flatten(2)


def seconds(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor, mask) -> tuple[float, Tensor]:
    """(time of a forward and backward pass, result)."""
    clock = time.perf_counter if weights.is_cuda else time.process_time
    if weights.is_cuda:
        torch.cuda.synchronize()
    started = clock()
    result = function(*inputs, mask)
    torch.autograd.grad((result * weights).sum(), inputs)
    if weights.is_cuda:
        torch.cuda.synchronize()
    return clock() - started, result.detach()


def row(size: int, number: int, args: argparse.Namespace) -> list[str]:
    """A line of the table."""
    groups, total = IsolatedGroups(number, size), size * number + args.matching
    blocked = QueryGroups.isolated(number, 1, size, args.device).attention_mask(args.matching)
    inputs = [torch.randn(IMAGES, total, DIM, device=args.device, requires_grad=True) for _ in range(3)]
    weights = torch.randn(IMAGES, total, DIM, device=args.device)
    ratios, times = [], []
    for warm in (False, *[True] * args.rounds):
        first, expected = seconds(masked, inputs, weights, blocked)
        second, found = seconds(folded, inputs, weights, groups)
        if warm:
            ratios.append(first / second)
            times.append(second)
    return [
        f"{size} x {number}",
        f"{(~blocked).float().mean():.2f}",
        f"{1e3 * median(times):.1f}",
        f"{median(ratios):.2f}x",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        "folded" if pays_to_fold(groups, total) else "masked",
        f"{(found - expected).abs().max():.0e}",
    ]


def measure(args: argparse.Namespace) -> str:
    """The table."""
    for name, least in (("matching", 0), ("rounds", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but PyTorch finds no CUDA device; leave it out")
    torch.manual_seed(args.seed)
    rows = [row(size, number, args) for size, number in SIZES]
    return tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(measure(args)))


if __name__ == "__main__":
    sys.exit(main())
