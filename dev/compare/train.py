"""Trains several configs side by side in one process, step by step in turn, so that their times can be compared.

Each has random streams of its own that start from the same seed: the order of the images and their augmentation are the
same for all, whatever else they draw.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from dn_detr_d2 import setup_cfg
from dn_detr_d2.checkpoint.resume import has_checkpoints, set_aside
from dn_detr_d2.engine import Trainer
from dn_detr_d2.utils.rng import random_state, set_random_state
from dn_detr_d2.visualization.runs import read_run

from .report import IN_TURN, is_evaluated
from .variants import Variant


class InterleavedRun:
    """One training that can be advanced by a step.

    Args:
        cfg: complete; ``SEED`` starts its random streams.
        resume: go on from the last checkpoint in its folder, if there is one; the weights at the end are those of a training
            that was not cut off.
    """

    def __init__(self, cfg, resume: bool = False):
        folder = self.folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        if not (resume and has_checkpoints(folder)):
            set_aside(folder)
        (folder / "config.yaml").write_text(cfg.dump())
        seed_all_rng(cfg.SEED)
        self.trainer, self.times = Trainer(cfg), folder / "step_seconds.txt"
        self.trainer.resume_or_load(resume)
        self.trainer.iter = start = self.trainer.start_iter
        seconds = self.times.read_text().split()[:start] if self.times.is_file() else []
        self.times.write_text("".join(f"{x}\n" for x in seconds))
        with EventStorage(start) as self.trainer.storage:
            logged = (folder / "metrics.json").is_file()
            if not (self.done and logged and is_evaluated(read_run(folder), start)):
                self.trainer.before_train()
                if self.done:  # it was cut off in its last evaluation
                    self.trainer.after_train()
        self.streams = random_state(self.trainer.device)

    @property
    def done(self) -> bool:
        """Whether all iterations have been made."""
        return self.trainer.iter >= self.trainer.max_iter

    def advance(self) -> None:
        """One iteration with its hooks; only the step itself is timed. After the last one the training is closed."""
        set_random_state(self.streams, self.trainer.device)
        with self.trainer.storage:
            self.trainer.before_step()
            start = time.perf_counter()
            self.trainer.run_step()
            with self.times.open("a") as file:
                file.write(f"{time.perf_counter() - start:.6f}\n")
            self.trainer.after_step()
            self.trainer.iter += 1
            if self.done:
                self.trainer.after_train()
        self.streams = random_state(self.trainer.device)


def train_interleaved(
    config: Path, variants: list[Variant], seed: int, output: Path, opts: list, threads: int, resume: bool = False
) -> list[Path]:
    """Trains all variants of one pair under one seed.

    Args:
        config: of the pair.
        variants: see :mod:`dev.compare.variants`.
        seed: of all of them.
        output: a folder for each variant is made in it.
        opts: [key, value, ...] for all; ``SOLVER.MAX_ITER`` is that of a whole training.
        threads: of PyTorch.
        resume: each goes on from its last checkpoint.

    Returns:
        list: the folders.
    """
    torch.set_num_threads(threads)
    configs = [configure(config, variant, seed, output, opts) for variant in variants]
    output.mkdir(parents=True, exist_ok=True)
    # Named after the first, because other variants may be trained in another process.
    with Path(f"{configs[0].OUTPUT_DIR}.log").open("a" if resume else "w") as log, redirect_stdout(log):
        runs = [InterleavedRun(cfg, resume) for cfg in configs]
        record_turns(runs)
        advance_in_turn(runs, f"{config.stem}, seed {seed}")
    return [Path(cfg.OUTPUT_DIR) for cfg in configs]


def record_turns(runs: list[InterleavedRun]) -> None:
    """Writes into the folder of each training with which others it has taken turns from its first step on."""
    names = {run.folder.name for run in runs}
    for run in runs:
        path, others = run.folder / IN_TURN, names
        if run.trainer.iter:
            others = names & {run.folder.name, *(path.read_text().split() if path.is_file() else ())}
        path.write_text("".join(f"{name}\n" for name in sorted(others)))


def advance_in_turn(runs: list[InterleavedRun], name: str) -> None:
    """Advances all by a step in turn until all are done; reports the progress on stderr at every tenth.

    Of trainings that were resumed at different iterations, those that are behind come first.
    """
    total, whole = len(runs), max(run.trainer.max_iter for run in runs)
    while left := [run for run in runs if not run.done]:
        i = min(run.trainer.iter for run in left)
        if i % max(whole // 10, 1) == 0:
            print(f"{name}: {i} of {whole} iterations, {total} trainings in turn", file=sys.stderr, flush=True)
        for run in left:
            if run.trainer.iter == i:
                run.advance()


def folders_of(config: Path, variants: list[Variant], seed: int, output: Path, opts: list) -> list[Path]:
    """Where :func:`train_interleaved` puts, or has put, the trainings; needs no data."""
    return [Path(configure(config, variant, seed, output, opts, ()).OUTPUT_DIR) for variant in variants]


def configure(
    config: Path, variant: Variant, seed: int, output: Path, opts: list, splits: Sequence[str] = ("TRAIN", "TEST")
):
    """The config of one variant: probes, evaluations and checkpoints at every tenth of the whole training.

    A shorter schedule is that of the whole training in all its parts, warm-up included. Data sets of ``splits`` must be
    there, see :func:`~dn_detr_d2.setup_cfg`.
    """
    folder = output / f"{config.stem}_{variant.name.replace(' ', '_').replace(',', '')}_seed{seed}"
    solver = setup_cfg(str(config), opts, splits=()).SOLVER
    whole, share = solver.MAX_ITER, variant.share
    period = max(whole // 10, 1)
    made = {
        "SEED": seed,
        "OUTPUT_DIR": str(folder),
        "SOLVER.MAX_ITER": int(whole * share),
        "SOLVER.WARMUP_ITERS": round(solver.WARMUP_ITERS * share),
        "SOLVER.STEPS": tuple(round(step * share) for step in solver.STEPS if step < whole),
        "TEST.EVAL_PERIOD": period,
        "SOLVER.CHECKPOINT_PERIOD": period,
    }
    return setup_cfg(str(config), [*opts, *variant.overrides, *chain(*made.items())], splits=splits)
