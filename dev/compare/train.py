"""Trains several configs side by side in one process, step by step in turn, so that their times can be compared.

Each has random streams of its own that start from the same seed: the order of the images and their augmentation are the
same for all, whatever else they draw.
"""

import sys
import time
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from dn_detr_d2 import setup_cfg
from dn_detr_d2.engine import Trainer
from dn_detr_d2.utils.rng import random_state, set_random_state

from .variants import Variant

# Files of an earlier training in the same folder, which the writers would continue.
STALE_FILES = ("metrics.json", "instability.npz", "best_metric.json", "last_checkpoint", "step_seconds.txt")


class InterleavedRun:
    """One training that can be advanced by a step.

    Args:
        cfg: complete; ``SEED`` starts its random streams.
    """

    def __init__(self, cfg):
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        for name in STALE_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / "config.yaml").write_text(cfg.dump())
        seed_all_rng(cfg.SEED)
        self.trainer, self.seconds = Trainer(cfg), []
        with EventStorage(0) as self.trainer.storage:
            self.trainer.iter = 0
            self.trainer.resume_or_load(resume=False)
            self.trainer.before_train()
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
            self.seconds.append(time.perf_counter() - start)
            self.trainer.after_step()
            self.trainer.iter += 1
            if self.done:
                self.trainer.after_train()
                Path(self.trainer.cfg.OUTPUT_DIR, "step_seconds.txt").write_text("\n".join(map(str, self.seconds)))
        self.streams = random_state(self.trainer.device)


def train_interleaved(
    config: Path, variants: list[Variant], seed: int, output: Path, opts: list, threads: int
) -> list[Path]:
    """Trains all variants of one pair under one seed.

    Args:
        config: of the pair.
        variants: see :mod:`dev.compare.variants`.
        seed: of all of them.
        output: a folder for each variant is made in it.
        opts: [key, value, ...] for all; ``SOLVER.MAX_ITER`` is that of a whole training.
        threads: of PyTorch.

    Returns:
        list: the folders.
    """
    torch.set_num_threads(threads)
    configs = [configure(config, variant, seed, output, opts) for variant in variants]
    output.mkdir(parents=True, exist_ok=True)
    with (output / f"{config.stem}_seed{seed}.log").open("w") as log, redirect_stdout(log):
        advance_in_turn([InterleavedRun(cfg) for cfg in configs], f"{config.stem}, seed {seed}")
    return [Path(cfg.OUTPUT_DIR) for cfg in configs]


def advance_in_turn(runs: list[InterleavedRun], name: str) -> None:
    """Advances all by a step in turn until all are done; reports the progress on stderr at every tenth."""
    total, whole = len(runs), max(run.trainer.max_iter for run in runs)
    for i in range(whole):
        if i % max(whole // 10, 1) == 0:
            print(f"{name}: {i} of {whole} iterations, {total} trainings in turn", file=sys.stderr, flush=True)
        for run in runs:
            run.advance()
        runs = [run for run in runs if not run.done]


def folders_of(config: Path, variants: list[Variant], seed: int, output: Path, opts: list) -> list[Path]:
    """Where :func:`train_interleaved` puts, or has put, the trainings."""
    return [Path(configure(config, variant, seed, output, opts).OUTPUT_DIR) for variant in variants]


def configure(config: Path, variant: Variant, seed: int, output: Path, opts: list):
    """The config of one variant: probes and evaluations at every tenth of the whole training."""
    folder = output / f"{config.stem}_{variant.name.replace(' ', '_').replace(',', '')}_seed{seed}"
    whole = setup_cfg(str(config), opts).SOLVER.MAX_ITER
    period = max(whole // 10, 1)
    made = {
        "SEED": seed,
        "OUTPUT_DIR": str(folder),
        "SOLVER.MAX_ITER": int(whole * variant.share),
        "TEST.EVAL_PERIOD": period,
        "SOLVER.CHECKPOINT_PERIOD": whole,
    }
    return setup_cfg(str(config), [*opts, *variant.overrides, *chain(*made.items())])
