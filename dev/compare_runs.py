#!/usr/bin/env python3
"""Does denoising do what the papers say? Trains pairs that differ in nothing else, and reports.

    python dev/compare_runs.py --quick                    # one seed, both pairs, under 15 minutes on two cores
    python dev/compare_runs.py --seeds 1 2 3 --output docs/evidence/convergence
    python dev/compare_runs.py --pairs deformable --ablations --seeds 1
    python dev/compare_runs.py --pairs deformable --noise --seeds 1 2
    python dev/compare_runs.py --pairs dense --backbone output/convergence/deformable_matching_alone_seed1/model_final.pth
    DETECTRON2_DATASETS=datasets python dev/compare_runs.py --pairs bccd_deformable --resume
    DETECTRON2_DATASETS=datasets python dev/compare_runs.py --pairs bccd_dino --seeds 1 --variants "with denoising"

Trains DAB-DETR and DN-DETR, DAB-Deformable-DETR and DN-Deformable-DETR (dev/compare/*.yaml), DN also with half the
iterations, on embedded shapes or on BCCD. All trainings of one pair and seed take turns in one process: same images in
the same order, and comparable times. They write checkpoints, from which --resume goes on. With --variants some of them are
trained and nothing is reported: the others are in another process or on another machine, and --report comes last. Writes
OUTPUT/<pair>.md and <pair>.png; the runs themselves, and what pycocotools prints, stay in --runs. Exit code 2: bad input.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate

from dev.compare.keep import keep
from dev.compare.report import HEADERS, check_claims, require_complete, table_rows
from dev.compare.train import folders_of, train_interleaved
from dev.compare.variants import (
    ABLATIONS,
    DENOISED,
    FOLDER,
    HALF,
    HOSTS,
    LONG_PAIRS,
    MATCHING,
    NOISES,
    PAIRS,
    Variant,
    variants_of,
)
from dn_detr_d2 import UserError
from dn_detr_d2.checkpoint import read_checkpoint
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.engine import end_with_parent
from dn_detr_d2.visualization.curves import draw
from dn_detr_d2.visualization.runs import Group, read_run

QUICK_ITERATIONS = 300
DIAGNOSTICS = ["TEST.INSTABILITY.NUM_IMAGES", 100]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one seed, {QUICK_ITERATIONS} iterations")
    parser.add_argument("--pairs", nargs="+", choices=[*PAIRS, *LONG_PAIRS, *HOSTS], default=list(PAIRS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    what = {"ablations": "without one part of denoising at a time", "noise": "with other kinds of noise"}
    names = {"ablations": [variant.name for variant in ABLATIONS], "noise": [variant.name for variant in NOISES]}
    for kind, text in what.items():
        parser.add_argument(
            f"--{kind}", nargs="*", choices=names[kind], help=f"also {text}: all, or those that are named"
        )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[MATCHING, DENOISED, HALF],
        help="train these alone, and report later; their times are not compared",
    )
    parser.add_argument("--report", action="store_true", help="train nothing, report what lies in --runs")
    parser.add_argument("--resume", action="store_true", help="go on with the trainings in --runs that were cut off")
    parser.add_argument(
        "--backbone", metavar="FILE", help="checkpoint of this project whose backbone all trainings start from"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, which share the cores (default 2)")
    parser.add_argument("--threads", type=int, default=0, help="of a process; 0 = what the processes share (default)")
    parser.add_argument(
        "--runs", metavar="DIR", help="where the trainings go (default output/KIND, by what is trained)"
    )
    parser.add_argument(
        "--keep", metavar="DIR", help="copy what a report reads of each training there, to report it with later seeds"
    )
    parser.add_argument("--output", metavar="DIR", help="where tables and pictures go (default: beside the trainings)")
    add_overrides(parser)
    args = parse(parser, argv)
    for kind, known in names.items():
        given = getattr(args, kind)
        setattr(args, kind, known if given == [] else given or [])
    args.runs = args.runs or f"output/{default_name(args)}"
    args.output = args.output or args.runs
    return args


def default_name(args: argparse.Namespace) -> str:
    """Name of the folder, so that comparisons of different kinds do not overwrite each other."""
    what = "ablations" if args.ablations else "noise" if args.noise else "convergence"
    return f"{what}_quick" if args.quick else what


def options(args: argparse.Namespace) -> list:
    """[key, value, ...] for all trainings."""
    found = list(DIAGNOSTICS)
    if args.quick:
        found += ["SOLVER.MAX_ITER", QUICK_ITERATIONS]
    if args.backbone:
        found += ["MODEL.WEIGHTS", str(take_backbone(args.backbone, Path(args.runs)))]
    return [*found, *args.opts]


def take_backbone(checkpoint: str, folder: Path) -> Path:
    """Copies the backbone of a checkpoint, and nothing else, into ``folder``; raises UserError if it has none."""
    state = read_checkpoint(checkpoint).state
    backbone = {name: x for name, x in state.items() if name.startswith("backbone.")}
    if not backbone:
        raise UserError(
            f"--backbone {checkpoint} holds no backbone under this project's names; name a file of its trainings"
        )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": backbone}, folder / "backbone.pth")
    return folder / "backbone.pth"


def chosen_variants(args: argparse.Namespace, pair: str) -> list[Variant]:
    """The variants of a pair that the command line asks for; raises UserError if the pair has none of them."""
    known = variants_of(pair, args.ablations + args.noise)
    found = [variant for variant in known if not args.variants or variant.name in args.variants]
    if not found:
        raise UserError(f"{pair} has no variant of {args.variants}; it has {[variant.name for variant in known]}")
    return found


def train(args: argparse.Namespace) -> dict[str, list[Group]]:
    """Runs all pairs and seeds; {pair: a group of runs for each variant, the baseline first}."""
    opts, seeds = options(args), args.seeds[:1] if args.quick else args.seeds
    threads = args.threads or max((os.cpu_count() or 1) // args.jobs, 1)
    tasks = {
        (pair, seed): (
            FOLDER / f"{pair}.yaml",
            chosen_variants(args, pair),
            seed,
            Path(args.runs),
            opts,
        )
        for pair in args.pairs
        for seed in seeds
    }
    if args.report:
        folders = {key: folders_of(*task) for key, task in tasks.items()}
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=end_with_parent) as pool:
            jobs = {key: pool.submit(train_interleaved, *task, threads, args.resume) for key, task in tasks.items()}
            folders = {key: job.result() for key, job in jobs.items()}
    found = {}
    for pair in args.pairs:
        columns = zip(*(folders[pair, seed] for seed in seeds), strict=True)
        names = [variant.name for variant in chosen_variants(args, pair)]
        found[pair] = [Group(name, [read_run(x) for x in column]) for name, column in zip(names, columns, strict=True)]
        require_complete(found[pair])
    return found


def report(args: argparse.Namespace) -> list[str]:
    """Trains, writes a page and a picture for each pair, and returns the pages."""
    if args.jobs < 1:
        raise UserError(f"--jobs must be positive, got {args.jobs}")
    if args.threads < 0:
        raise UserError(f"--threads must not be negative, got {args.threads}")
    if args.report and args.variants and not {MATCHING, DENOISED} <= set(args.variants):
        raise UserError(
            f"--report compares {MATCHING!r} and {DENOISED!r}; name both in --variants, got {args.variants}"
        )
    if args.keep and Path(args.keep).resolve() == Path(args.runs).resolve():
        raise UserError(f"--keep {args.keep} would cut the trainings in --runs themselves; name another folder")
    start = time.monotonic()
    groups = train(args)
    for run in (run for found in groups.values() for group in found for run in group.runs if args.keep):
        keep(run.folder, Path(args.keep))
    if args.variants and not args.report:
        return [f"trained: {run.folder}" for found in groups.values() for group in found for run in group.runs]
    spent, pages = "" if args.report else f"; {(time.monotonic() - start) / 60:.0f} minutes", []
    for pair, found in groups.items():
        picture = draw(found, Path(args.output) / f"{pair}.png")
        config, seeds = found[0].runs[0].config, [run.config["SEED"] for run in found[0].runs]
        lines = [
            f"# {pair}: {config['DATASETS']['TRAIN'][0]}, {config['SOLVER']['MAX_ITER']} iterations",
            "",
            f"`{command_line()}`, seeds {seeds}, {machine()}{spent}. Evaluated on {config['DATASETS']['TEST'][0]}."
            f"{of_masks(config)}",
            "",
            tabulate(table_rows(found), HEADERS, tablefmt="github", disable_numparse=True),
            "",
            *check_claims(found),
            "",
            f"![Curves]({picture.name})",
            "",
        ]
        pages.append("\n".join(lines))
        (Path(args.output) / f"{pair}.md").write_text(pages[-1])
    return pages


def of_masks(config: dict) -> str:
    """Says of what AP is, where it is not of boxes."""
    masks = config.get("MODEL", {}).get("DN_DETR", {}).get("MASK", {}).get("ENABLED")
    return " AP is that of masks." if masks else ""


def command_line() -> str:
    """What was called."""
    called = sys.argv[1:] if Path(sys.argv[0]).name == Path(__file__).name else []
    return shlex.join(["python", "dev/compare_runs.py", *called])


def machine() -> str:
    """What it ran on."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{device}, PyTorch {torch.__version__}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: print(*report(args), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
