"""Ends a training before ``SOLVER.MAX_ITER``, when evaluations have stopped improving."""

import json
import logging
import math
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from ...checkpoint.checkpointer import Checkpointer
from ...checkpoint.checksums import write_record
from ...checkpoint.resume import number, read_record
from ...errors import ConfigError

logger = logging.getLogger(__name__)

History = list[tuple[int, float]]


class EarlyEnd(BaseException):
    """A training ends before its last iteration. No error, so ``except Exception`` must not catch it."""


def without_improvement(history: History, min_delta: float = 0.0, start: int = 0) -> int:
    """Number of evaluations since the last that was better than all before it by more than ``min_delta``.

    Args:
        history: (iterations done, value) in order of time; a value that is no number is no improvement. Before the first
            number nothing is counted: there is nothing to improve on.
        min_delta: in units of the value, which is to grow.
        start: evaluations after so many iterations or fewer are not counted; what comes later must be better than they.
    """
    best, since = -math.inf, 0
    for done, value in history:
        better = math.isfinite(value) and value > best + min_delta
        best, since = (value, 0) if better else (best, since + (done > start))
    return since if math.isfinite(best) else 0


def require_evaluations(period: int, metrics: list[str], patience: int) -> None:
    """Raises ConfigError if a training with ``SOLVER.EARLY_STOPPING.PATIENCE`` evaluates nothing before it ends."""
    if period < 1 or not metrics:
        raise ConfigError(
            f"SOLVER.EARLY_STOPPING.PATIENCE = {patience} counts evaluations, but there are none: set TEST.EVAL_PERIOD "
            f"(now {period}) and DATASETS.TEST, or PATIENCE 0"
        )


class EarlyStopping(HookBase):
    """Ends a training after ``patience`` evaluations without improvement, on all ranks, with ``model_final.pth``.

    The results are kept in ``early_stopping.json`` beside the checkpoints, because a periodic checkpoint is written before
    the evaluation of its iteration. A training that is resumed continues with the results from before its checkpoint.
    Register it after the evaluation, the best checkpoint and the writers.

    Args:
        checkpointer: of the training.
        period: iterations between two evaluations.
        metrics: names of values in the event storage; the largest of them counts.
        patience: evaluations without improvement after which it ends.
        min_delta: what a value must be above the best to count as an improvement, in its units.
        start: iterations within which patience does not run out, such as the burn-in of a semi-supervised training.

    Raises:
        ConfigError: nothing is evaluated during the training.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        metrics: list[str],
        patience: int,
        min_delta: float = 0.0,
        start: int = 0,
    ):
        require_evaluations(period, metrics, patience)
        self.checkpointer, self.period, self.metrics = checkpointer, period, metrics
        self.patience, self.min_delta, self.start, self.history = patience, min_delta, start, []

    @property
    def _record(self) -> Path:
        return Path(self.checkpointer.save_dir) / "early_stopping.json"

    def before_train(self) -> None:
        """Restores the history of the run that is resumed; one that had ended early stays ended.

        Raises:
            CheckpointError: ``early_stopping.json`` is damaged.
        """
        start = self.trainer.start_iter
        if start > 0 and comm.is_main_process() and self._record.is_file():
            found = read_record(self._record, _history)
            self.history = [(iteration, value) for iteration, value in found if iteration <= start]
        if self._is_over():
            logger.warning(
                "nothing to train: this training ended early after %d iterations; raise SOLVER.EARLY_STOPPING.PATIENCE = %d "
                "to go on",
                start,
                self.patience,
            )
            raise EarlyEnd

    def after_step(self) -> None:
        """Records the latest result, and ends the training if patience has run out."""
        done = self.trainer.iter + 1
        if done % self.period or done >= self.trainer.max_iter:
            return
        latest = self.trainer.storage.latest()
        values = [latest[name][0] for name in self.metrics if name in latest and math.isfinite(latest[name][0])]
        self.history.append((done, max(values, default=math.nan)))
        if not values:
            logger.warning(
                "early stopping: %s is no number after %d iterations, as where the test set has no annotated objects; it is "
                "not counted before there is one",
                " or ".join(self.metrics),
                done,
            )
        over = self._is_over()
        if over:
            logger.info(
                "early stopping: %s has not risen by more than %g in the last %d evaluations; the training ends after "
                "iteration %d of %d",
                " or ".join(self.metrics),
                self.min_delta,
                self.patience,
                self.trainer.iter,
                self.trainer.max_iter,
            )
            self.checkpointer.save("model_final", iteration=self.trainer.iter)
        if comm.is_main_process():
            write_record(self._record, json.dumps({"metrics": self.metrics, "history": self.history}))
        if over:
            comm.synchronize()  # no rank exits before the checkpoint is on the disk
            raise EarlyEnd

    def _is_over(self) -> bool:
        """Rank 0 knows the values and decides for all."""
        return comm.all_gather(without_improvement(self.history, self.min_delta, self.start) >= self.patience)[0]


def _history(record: dict) -> History:
    return [(int(number(iteration)), number(value)) for iteration, value in record["history"]]
