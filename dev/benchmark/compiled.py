"""What ``torch.compile`` gives a detector: seconds of the first step or inference, and the time of the later ones."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch._inductor.config
from tabulate import tabulate
from torch._dynamo.utils import counters

from dn_detr_d2.modeling.compiling import COMPILED

from .detectors import Case, Detector, build_accelerated, seconds

# What is timed -> (attribute of a detector, key of the config, its values; the first one compiles nothing).
PASSES = {
    "training": ("step", "MODEL.DN_DETR.COMPILE", tuple(COMPILED)),
    "inference": ("detect", "TEST.COMPILE", (False, True)),
}
HEADERS = ("", "key", "first: CPU s", "graphs", "breaks", "later: ratio", "range")


def compile_table(which: list[str], case: Case, rounds: int) -> str:
    """A line for each value of the keys that compile.

    Each detector is built anew, and what was compiled before is forgotten. Its first pass includes compilation by this
    process and by the compiler that it calls, without what earlier runs left in caches. Then it takes turns with one that
    is not compiled; the ratio is that of the least times, its range that of the ratios of all rounds. The lines of what
    compiles nothing show how far ratios are off.

    Args:
        which: keys of :data:`PASSES`.
        case: of the detectors.
        rounds: of the later passes, at least 1.
    """
    rows = []
    # A pool of processes would not be in the CPU time of the first pass, and a cache would shorten it.
    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        for title in which:
            what, key, values = PASSES[title]
            plain = getattr(_build(case, key, values[0]), what)
            plain()
            for value in values:
                rows.append([title, f"{key} {value!r}", *_beside(plain, case, what, key, value, rounds)])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)  # some take minutes
    return tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def _beside(plain: Callable[[], object], case: Case, what: str, key: str, value: object, rounds: int) -> list:
    """The cells of a line, from the third."""
    torch._dynamo.reset()
    counters.clear()
    run = getattr(_build(case, key, value), what)
    first = first_seconds(run, case.device)
    times = [(seconds(run, case.device), seconds(plain, case.device)) for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in times]
    least = min(ours for ours, _ in times) / min(theirs for _, theirs in times)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return [f"{first:.1f}", graphs, breaks, f"{least:.2f}x", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def _build(case: Case, key: str, value: object) -> Detector:
    """The detector with one key changed."""
    return build_accelerated(replace(case, opts=(*case.opts, key, value)))


def first_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call: on a CPU the CPU time of this process and of those that it waits for, on a GPU of the clock."""
    if device == "cuda":
        return seconds(run, device)
    before = os.times()
    run()
    return sum(os.times()[:4]) - sum(before[:4])
