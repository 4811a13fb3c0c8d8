#!/usr/bin/env python3
"""Maltreats a training and what it reads, and counts what does not end as promised in docs/reliability.md.

    python dev/stress_test.py --quick
    python dev/stress_test.py kill --times 200
    python dev/stress_test.py kill --times 20 --processes 2 --workers 2

Ordeals, each with its size at a release:

    kill         200      kill -9 of a training, half of them while a checkpoint is written; resumed, equal to the bit
    ask          50       SIGTERM and SIGUSR1 by turns; exit code 75, resumed, equal to the bit
    narrow       50       writing a checkpoint fails at a random byte (RLIMIT_FSIZE); resumed, equal to the bit
    full-disk    50       the disk is full (a tmpfs, which only root can mount); resumed, equal to the bit
    flips        3000     bits of a checkpoint flipped, every one to be found
    annotations  100000   mutated annotation files
    images       200000   mutated images of all formats
    soak         2000     iterations of one training, whose memory must not grow by more than 1 %
    coco-size    118000   images of an annotation file of COCO's size, which must be checked within 60 s
    crowds       7        images of 0 to 3,000 boxes under a budget of denoising queries

Prints a table; the exit code is 1 if anything went wrong. What counts as wrong stands in dev/stress/.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork keeps one thread
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dev.stress import endurance, files, lives, mutations  # noqa: E402
from dev.stress.cases import run_cases  # noqa: E402
from dev.stress.results import Result, table  # noqa: E402

HARMS = {"kill": lives.Kill, "ask": lives.Ask, "narrow": lives.NarrowFiles, "full-disk": lives.FullDisk}
CASES = {"annotations": mutations.annotation_cases, "images": mutations.image_cases}
RELEASE = {
    **{"kill": 200, "ask": 50, "narrow": 50, "full-disk": 50, "flips": 3000, "annotations": 100_000, "images": 200_000},
    **{"soak": 2000, "coco-size": files.COCO_IMAGES, "crowds": len(endurance.CROWDS)},
}
QUICK = {"kill": 6, "ask": 4, "narrow": 4, "flips": 300, "annotations": 3000, "images": 6000}
QUICK |= {"coco-size": 2000, "crowds": 7}


def undergo(ordeal: str, times: int, args, scratch: Path) -> Result:
    """One ordeal in an empty folder."""
    if ordeal in HARMS:
        return lives.cut_off(scratch, HARMS[ordeal], times, args.processes, args.workers, args.seed)
    if ordeal in CASES:
        start = time.monotonic()
        words, wrong = run_cases(CASES[ordeal](args.seed), times, scratch, args.jobs)
        seen = ", ".join(f"{n:,} {word}" for word, n in sorted(words.items()))
        return Result(ordeal, times, seen, wrong, time.monotonic() - start)
    if ordeal in ("flips", "coco-size"):
        return (files.flips if ordeal == "flips" else files.coco_size)(scratch, times, args.seed)
    return endurance.soak(scratch, times) if ordeal == "soak" else endurance.crowds(scratch)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ordeals", nargs="*", metavar="ORDEAL", help=f"some of {', '.join(RELEASE)}; none = all")
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, without soak and full-disk: a minute or two"
    )
    parser.add_argument("--times", type=int, help="size of each ordeal, instead of the one at a release")
    parser.add_argument("--processes", type=int, default=1, help="CPU processes of a training that is cut off (1)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that read mutated files (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the mutations (0)")
    parser.add_argument(
        "--folder", help="where to work (default /dev/shm, where syncing costs nothing, if there is one)"
    )
    args = parser.parse_args()
    sizes = QUICK if args.quick else RELEASE
    if unknown := set(args.ordeals) - RELEASE.keys():
        parser.error(f"there is no ordeal {', '.join(sorted(unknown))}; there are {', '.join(RELEASE)}")
    if args.times is not None and args.times < 1:
        parser.error(f"--times must be positive, got {args.times}")
    if min(args.processes, args.jobs) < 1 or args.workers < 0:
        parser.error("--processes and --jobs must be positive, --workers not negative")
    results = []
    for ordeal in args.ordeals or sizes:
        folder = args.folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        with tempfile.TemporaryDirectory(prefix="dn_detr_d2-torture-", dir=folder) as scratch:
            results.append(undergo(ordeal, args.times or sizes.get(ordeal, RELEASE[ordeal]), args, Path(scratch)))
        if sys.stderr.isatty():
            print(f"\r{ordeal}: {results[-1].seconds:.0f} s", file=sys.stderr)
    print(table(results))
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
