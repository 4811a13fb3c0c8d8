#!/usr/bin/env python3
"""Times a training step and an inference of a config, part by part, and against other implementations.

    python dev/benchmark_detector.py --config-file configs/dino_R50_4scale_12ep.yaml --device cuda --precision bf16
    python dev/benchmark_detector.py --config-file configs/deformable_detr_R50_50ep.yaml --against torch transformers
    python dev/benchmark_detector.py --config-file configs/quickstart.yaml --batch 1 --setting "settled TEST.AMP bf16"
    python dev/benchmark_detector.py --config-file configs/dn_dab_deformable.yaml --size 256 256 --curves
    python dev/benchmark_detector.py --config-file configs/dn_dab_deformable.yaml --size 192 256 --rounds 10 --compile

Images are random pixels of one size, weights are random. Without --threads above 1 the CPU times are CPU time of one thread,
so other programs disturb them little. "floor" is the share of a part's time in matrix products and convolutions, which any
implementation has to compute; "kept" is what autograd keeps for the backward pass; operators are counted below autograd;
"reads" are calls that bring numbers to Python, for which the host waits on a GPU.
Rivals take turns with ours in this process; a ratio is the median over the rounds, with its range: "torch" is ours with
deformable attention out of PyTorch's operators, "transformers" Deformable DETR of Hugging Face with the same sizes.
--setting compares inference under other keys with that of the config, "settled" as the predictor and --eval-only prepare
a model. --curves measures how a training step grows instead, and writes a CSV and a plot. --compile times what
MODEL.DN_DETR.COMPILE makes of a training step and TEST.COMPILE of an inference instead, each value beside a model that is
not compiled. Exit code 2: bad input.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate

from dev.benchmark import timeline
from dev.benchmark.compiled import PASSES, compile_table
from dev.benchmark.detector_curves import CURVES, measure_curves, write_curves
from dev.benchmark.detectors import (
    PRECISIONS,
    RIVALS,
    Case,
    Detector,
    build_accelerated,
    build_ours,
    build_rival,
    config_of,
    seconds,
)
from dev.benchmark.timeline import BACKWARD, FORWARD, Timeline
from dev.benchmark_loader import HEIGHT, OBJECTS, WIDTH, make_images
from dev.compare_runs import machine
from dn_detr_d2 import ConfigError, UserError
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.data import register_coco_json
from dn_detr_d2.data.mapper import DetrDatasetMapper
from dn_detr_d2.data.registered import records_of

HEADERS = ("part", "forward ms", "backward ms", "of the step", "floor", "kept MiB", "operators", "reads")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(400, 667), metavar=("H", "W"), help="in pixels")
    parser.add_argument(
        "--other-size",
        type=int,
        nargs=2,
        action="append",
        default=[],
        metavar=("H", "W"),
        help="several times: images have all these sizes in turn",
    )
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images of a step (default 2)")
    parser.add_argument("--objects", type=int, default=7, metavar="N", help="in each image (default 7)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="default fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default 1)")
    parser.add_argument("--against", nargs="+", choices=RIVALS, default=[], help="what else is timed")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar='"[settled] KEY VALUE ..."',
        help="of inference; several times",
    )
    parser.add_argument("--curves", nargs="*", choices=list(CURVES), help="measure these curves (default: all) instead")
    parser.add_argument(
        "--compile", nargs="*", choices=list(PASSES), help="measure what torch.compile gives (default: both)"
    )
    parser.add_argument("--output", metavar="DIR", default="output/benchmark", help="where curves go")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and boxes (default 0)")
    add_overrides(parser)
    return parse(parser, argv)


def checked_case(args: argparse.Namespace) -> Case:
    """The case of the arguments.

    Raises:
        UserError: numbers out of range, no GPU.
    """
    for name, least in (("batch", 1), ("objects", 0), ("rounds", 1), ("threads", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    for height, width in (args.size, *args.other_size):
        if min(height, width) < 32:
            raise UserError(f"--size and --other-size must be at least 32 32, got {height} {width}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but PyTorch finds no CUDA device; leave it out")
    if "transformers" in args.against and args.precision == "fp16":
        raise UserError("--against transformers has no step with a loss scaler; choose --precision fp32 or bf16")
    if args.other_size and "transformers" in args.against:
        raise UserError("--against transformers takes images of one size; leave --other-size out")
    size, opts, what = tuple(args.size), tuple(args.opts), (args.batch, args.objects, args.precision, args.device)
    return Case(args.config_file, opts, size, *what, args.seed, tuple(map(tuple, args.other_size)))


def time_meter(args: argparse.Namespace) -> timeline.Meter:
    """What measures time on this device with so many threads."""
    if args.device == "cuda":
        return timeline.DeviceTime()
    return timeline.WallTime() if args.threads > 1 else timeline.Meter()


def part_table(detector: Detector, run: Callable[[], object], args: argparse.Namespace, training: bool) -> str:
    """A line for each part of a training step, or of an inference."""
    optimizer = detector.optimizer if training else None

    def cost(meter: timeline.Meter) -> dict[tuple[str, str], float]:
        return Timeline(detector.model, meter, optimizer).costs(run)

    cost(time_meter(args))  # warms up
    rounds = [cost(time_meter(args)) for _ in range(args.rounds)]
    times = {key: median(x.get(key, 0.0) for x in rounds) for key in rounds[0]}
    floor, operators, reads = (
        cost(x) for x in (timeline.Floor(time_meter(args)), timeline.operators(), timeline.reads())
    )
    kept = cost(timeline.kept_bytes(detector.model)) if training else {}
    total = sum(times.values())
    rows = []
    for part in [*dict.fromkeys(part for part, _ in times), None]:
        keys = [key for key in times if part in (key[0], None)]
        ms = {
            which: sum(times[key] for key in keys if (key[1] == BACKWARD) == (which == BACKWARD))
            for which in (FORWARD, BACKWARD)
        }
        sums = [sum(x.get(key, 0.0) for key in keys) for x in (times, floor, kept, operators, reads)]
        share = f"{100 * sums[1] / sums[0]:.0f} %" if sums[0] else ""
        rows.append(
            [
                part or "all",
                f"{ms[FORWARD]:.1f}",
                f"{ms[BACKWARD]:.1f}",
                f"{100 * sums[0] / total:.1f} %",
                share,
                f"{sums[2] / 2**20:.0f}",
                f"{sums[3]:.0f}",
                f"{sums[4]:.0f}",
            ]
        )
    return tabulate(rows, HEADERS, tablefmt="github", colalign=("left", *["right"] * 7), disable_numparse=True)


def data_line(case: Case, args: argparse.Namespace) -> str:
    """What a loader process does for such a step, beside it: CPU time of the mapper, from files of JPEG to tensors."""
    with tempfile.TemporaryDirectory(prefix="benchmark-detector-") as folder:
        make_images(Path(folder), case.batch, case.seed)
        name = Path(folder).name
        register_coco_json(name, str(Path(folder, "annotations.json")), folder)
        size = ["INPUT.MIN_SIZE_TRAIN", (min(case.size),), "INPUT.MAX_SIZE_TRAIN", max(case.size)]
        cfg = config_of(case, *size, "INPUT.CROP.ENABLED", False)
        mapper, records = DetrDatasetMapper(cfg, True), records_of(name, cfg.MODEL.DN_DETR.MASK.ENABLED)
        times = [seconds(lambda: [mapper(record) for record in records], "cpu") for _ in range(args.rounds + 1)][1:]
    return (
        f"data: {1e3 * median(times):.1f} ms of CPU time in a loader process, beside the step, for {case.batch} JPEG files "
        f"of {WIDTH} x {HEIGHT} pixels with {OBJECTS} objects, resized to {min(case.size)}"
    )


def rival_table(ours: Detector, case: Case, args: argparse.Namespace) -> str:
    """Time of each rival over ours."""
    rivals = {"ours": ours} | {name: build_rival(name, case) for name in args.against}
    rows = []
    for what, title in (("step", "training step"), ("detect", "inference")):
        times = interleaved({name: getattr(rival, what) for name, rival in rivals.items()}, args)
        for name in args.against:
            bare = [f"{1e3 * median(times[x]):.0f}" for x in ("ours", name)]
            rows.append([title, name, *bare, *ratio_cells(times[name], times["ours"])])
    return tabulate(
        rows, ("", "against", "ours ms", "its ms", "ratio", "range"), tablefmt="github", disable_numparse=True
    )


def setting_table(ours: Detector, case: Case, args: argparse.Namespace) -> str:
    """Time of inference under each ``--setting`` over that of the config."""
    passes = {"as built": ours.detect}
    for setting in args.setting:
        words = shlex.split(setting)
        settled = words[:1] == ["settled"]
        changed = replace(case, opts=(*case.opts, *words[settled:]))
        passes[setting] = build_accelerated(changed, settled=settled).detect
    times = interleaved(passes, args)
    rows = [[name, f"{1e3 * median(took):.0f}", *ratio_cells(took, times["as built"])] for name, took in times.items()]
    return tabulate(rows, ("setting", "ms", "ratio", "range"), tablefmt="github", disable_numparse=True)


def interleaved(passes: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each pass in each round, after one round that is not counted."""
    times = {name: [] for name in passes}
    for counted in (False, *[True] * args.rounds):
        for name, run in passes.items():
            took = seconds(run, args.device, wall=args.threads > 1)
            if counted:
                times[name].append(took)
    return times


def ratio_cells(times: list[float], base: list[float]) -> tuple[str, str]:
    """Median of the rounds' ratios, and their range."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return f"{median(ratios):.2f}x", f"{min(ratios):.2f} to {max(ratios):.2f}"


def benchmark(args: argparse.Namespace) -> None:
    """Prints the tables."""
    case = checked_case(args)
    torch.set_num_threads(args.threads)
    print(
        f"{Path(case.config).name}, {case.batch} images of "
        f"{' and '.join(f'{h} x {w}' for h, w in (case.size, *case.others))} with {case.objects} objects, ",
        end="",
    )
    print(f"{case.precision}, {case.device}, {args.threads} threads, seed {case.seed}, {machine()}\n")
    if args.curves is not None:
        write_curves(measure_curves(args.curves or list(CURVES), case, args.rounds), Path(args.output))
        return
    if args.compile is not None:
        print(compile_table(args.compile or list(PASSES), case, args.rounds))
        return
    ours = build_ours(case)
    if args.setting:
        print(setting_table(ours, case, args))
        return
    print("Training step\n\n" + part_table(ours, ours.step, args, training=True))
    if args.device == "cuda":
        print(f"\npeak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    print("\n" + data_line(case, args))
    print("\nInference\n\n" + part_table(ours, ours.detect, args, training=False))
    if args.against:
        print("\nAgainst others\n\n" + rival_table(ours, case, args))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
