#!/usr/bin/env python3
"""Injects faults into trainings and into the files that they read, and counts violations of docs/reliability.md.

    python dev/stress_test.py --quick
    python dev/stress_test.py sigkill --times 200
    python dev/stress_test.py sigkill --times 20 --processes 2 --workers 2

Scenarios, each with its size at a release:

    sigkill         200     kill -9 of a training, half of them while a checkpoint is written; resumed, bitwise identical
    graceful-stop   50      SIGTERM and SIGUSR1 in alternation; exit code 75, resumed, bitwise identical
    write-failure   50      writing a checkpoint fails at a random byte (RLIMIT_FSIZE); resumed, bitwise identical
    full-disk       50      the disk is full (a tmpfs, which only root can mount); resumed, bitwise identical
    bit-flips       3000    flipped bits of a checkpoint, each of which must be detected
    annotations     100000  mutated annotation files
    images          200000  mutated images of all formats
    soak            2000    iterations of one training, whose memory must not grow by more than 1 %
    coco-size       118000  images of an annotation file of COCO's size, which must be checked within 60 s
    crowded-images  7       images of 0 to 3,000 boxes with a limit to the denoising queries

Prints a table. Exit code: 0 = no violation, 1 = violations, 2 = bad input. dev/stress/ defines what a violation is.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork keeps one thread
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.stress import endurance, files, interrupted_runs, mutations
from dev.stress.cases import run_cases
from dev.stress.results import Result, table

FAULTS = {
    "sigkill": interrupted_runs.SigKill,
    "graceful-stop": interrupted_runs.GracefulStop,
    "write-failure": interrupted_runs.WriteFailure,
    "full-disk": interrupted_runs.FullDisk,
}
CASES = {"annotations": mutations.annotation_cases, "images": mutations.image_cases}
RELEASE_SIZES = {
    "sigkill": 200,
    "graceful-stop": 50,
    "write-failure": 50,
    "full-disk": 50,
    "bit-flips": 3000,
    "annotations": 100_000,
    "images": 200_000,
    "soak": 2000,
    "coco-size": files.COCO_IMAGES,
    "crowded-images": len(endurance.BOX_COUNTS),
}
QUICK_SIZES = {
    "sigkill": 6,
    "graceful-stop": 4,
    "write-failure": 4,
    "bit-flips": 300,
    "annotations": 3000,
    "images": 6000,
    "coco-size": 2000,
    "crowded-images": 7,
}


def run_scenario(scenario: str, times: int, args: argparse.Namespace, scratch: Path) -> Result:
    """Runs one scenario in an empty folder."""
    if scenario in FAULTS:
        fault = FAULTS[scenario]
        return interrupted_runs.run_until_done(scratch, fault, times, args.processes, args.workers, args.seed)
    if scenario in CASES:
        start = time.monotonic()
        outcomes, wrong = run_cases(CASES[scenario](args.seed), times, scratch, args.jobs)
        observed = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(outcomes.items()))
        return Result(scenario, times, observed, wrong, time.monotonic() - start)
    if scenario == "bit-flips":
        return files.bit_flips(scratch, times, args.seed)
    if scenario == "coco-size":
        return files.coco_size(scratch, times, args.seed)
    return endurance.soak(scratch, times) if scenario == "soak" else endurance.crowded_images(scratch)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(RELEASE_SIZES)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"some of {names}; none = all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, without soak and full-disk: a few minutes")
    parser.add_argument("--times", type=int, help="size of each scenario, instead of the one at a release")
    parser.add_argument("--processes", type=int, default=1, help="CPU processes of an interrupted training (1)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that read mutated files (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the mutations (0)")
    parser.add_argument("--folder", help="where to work (default /dev/shm, where fsync costs nothing, if there is one)")
    args = parser.parse_args(argv)
    if unknown := set(args.scenarios) - RELEASE_SIZES.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {names}")
    if args.times is not None and args.times < 1:
        parser.error(f"--times must be positive, got {args.times}")
    if min(args.processes, args.jobs) < 1 or args.workers < 0:
        parser.error("--processes and --jobs must be positive, --workers not negative")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args, results = parse_arguments(argv), []
    sizes = QUICK_SIZES if args.quick else RELEASE_SIZES
    folder = args.folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    for scenario in args.scenarios or sizes:
        times = args.times or sizes.get(scenario, RELEASE_SIZES[scenario])
        with tempfile.TemporaryDirectory(prefix="dn_detr_d2-stress-", dir=folder) as scratch:
            results.append(run_scenario(scenario, times, args, Path(scratch)))
        if sys.stderr.isatty():
            print(f"\r{scenario}: {results[-1].seconds:.0f} s", file=sys.stderr)
    print(table(results))
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
