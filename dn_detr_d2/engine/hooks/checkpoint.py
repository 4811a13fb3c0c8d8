"""Hooks that write checkpoints; all ranks have them, because the RNG states of all ranks are in a checkpoint."""

import json
import logging
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from fvcore.common.history_buffer import HistoryBuffer

from ...checkpoint.checkpointer import BEST, Checkpointer
from ...checkpoint.checksums import write_record
from ...checkpoint.resume import number, read_record
from .graceful_stop import StopHook

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Writes ``model_<iteration>.pth`` periodically and before a stop, and ``model_final.pth`` after the last iteration.

    Args:
        checkpointer: of the training.
        period: iterations between two checkpoints.
        stop: knows whether the training is to stop.

    Attributes:
        saved: the iteration of the last checkpoint, None before the first.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, stop: StopHook):
        self.checkpointer, self.period, self.stop, self.saved = checkpointer, period, stop, None

    def after_step(self) -> None:
        """Writes if it is time."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or (self.stop.agreed and done < self.trainer.max_iter):
            self._save(f"model_{self.trainer.iter:07d}")
        if done >= self.trainer.max_iter:
            self._save("model_final")

    def _save(self, name: str) -> None:
        self.checkpointer.save(name, iteration=self.trainer.iter)
        self.saved = self.trainer.iter


class ShortHistory(HookBase):
    """Keeps the last ``LENGTH`` values of each scalar, where Detectron2 keeps a million.

    Each takes 88 bytes: 2 GB for 60 scalars in the 375,000 iterations of a schedule of 50 epochs. The printer's windows are
    20 values long; its estimate of the time that is left becomes a median over ``LENGTH`` iterations.
    """

    LENGTH = 200

    def before_train(self) -> None:
        """Before the first value."""
        self.trainer.storage._history = defaultdict(partial(HistoryBuffer, max_length=self.LENGTH))


class MetricPrinter(CommonMetricPrinter):
    """Detectron2's, which divides by zero when one of the first iterations after a start is printed twice.

    That happens when a training is asked to stop after an iteration that was printed anyway.
    """

    def _get_eta(self, storage) -> str | None:
        twice = self._last_write is not None and self._last_write[0] == storage.iter
        return None if twice else super()._get_eta(storage)


class BestCheckpointer(hooks.BestCheckpointer):
    """Keeps the best checkpoint over resumes.

    The best value is kept in ``best_metric.json`` beside ``model_best.pth``: a periodic checkpoint is written before the
    evaluation of its iteration, so it could not know. The averaged weights have ``model_best_ema.pth`` and
    ``best_metric_ema.json``, and the name of their value begins with ``ema/``.
    """

    def __init__(self, period: int, checkpointer: Checkpointer, metric: str):
        self._suffix = "_ema" if metric.startswith("ema/") else ""
        super().__init__(period, checkpointer, metric, file_prefix=BEST + self._suffix)

    @property
    def _record(self) -> Path:
        return Path(self._checkpointer.save_dir) / f"best_metric{self._suffix}.json"

    def before_train(self) -> None:
        """Restores the best value of the run that is resumed; raises CheckpointError if its file is damaged."""
        if self.trainer.start_iter > 0 and self._record.is_file():
            self.best_metric, self.best_iter = read_record(self._record, _best)

    def _best_checking(self) -> None:
        """Rank 0 decides, because only it has the value; saving is a collective."""
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, 0))
        better = math.isfinite(value) and (self.best_metric is None or self._compare(value, self.best_metric))
        if not comm.all_gather(better)[0]:
            return
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        if comm.is_main_process():
            self.best_metric, self.best_iter = value, iteration
            record = {"metric": self._val_metric, "value": value, "iteration": iteration}
            write_record(self._record, json.dumps(record))
            logger.info("%s = %.3f after %d iterations is the best so far", self._val_metric, value, iteration)


def _best(record: dict) -> tuple[float, int]:
    """(value, iteration) of a record; one that is not finite would never be beaten."""
    value = number(record["value"])
    if not math.isfinite(value):
        raise ValueError("the best value is not finite")
    return value, int(number(record["iteration"]))
