"""Records the last evaluation that was completed, and repeats one that was interrupted."""

import json
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from ...checkpoint.checksums import write_record
from ...checkpoint.resume import number, read_record


class EvaluationRecord(HookBase):
    """Keeps ``last_evaluation.json``. Register it right after the hooks that evaluate.

    Args:
        folder: of the training.
        period: iterations between two evaluations; 0 = only at the end.
    """

    def __init__(self, folder: str, period: int):
        self.path, self.period = Path(folder) / "last_evaluation.json", period

    def before_train(self) -> None:
        """A training that starts anew has evaluated nothing."""
        if self.trainer.start_iter == 0:
            self._write(0)

    def after_step(self) -> None:
        """Records an evaluation that was completed."""
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._write(done)

    def after_train(self) -> None:
        """Records the last one."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._write(self.trainer.iter)

    def _write(self, done: int) -> None:
        if comm.is_main_process():
            write_record(self.path, json.dumps({"iteration": done}))


class RepeatEvaluation(HookBase):
    """Before the first step, repeats an evaluation that a stop or a kill has interrupted. Register it last.

    The checkpoint of an iteration is written before its evaluation. When such a checkpoint is resumed, and by
    the record the evaluation was not completed, the hooks that evaluate run once more. A folder without a record is
    of a version that had none; there nothing is repeated.

    Args:
        record: of the evaluations.
        hooks: that evaluate, or use the results of an evaluation, in their order.
    """

    def __init__(self, record: EvaluationRecord, hooks: list[HookBase]):
        self.record, self.hooks = record, hooks

    def before_train(self) -> None:
        """Repeats the evaluation of the iteration before if it is missing; raises CheckpointError for a damaged record."""
        start, trainer, path, last = self.trainer.start_iter, self.trainer, self.record.path, None
        if comm.is_main_process() and start > 0 and path.is_file():
            last = read_record(path, lambda record: int(number(record["iteration"])))
        last = comm.all_gather(last)[0]
        period = self.record.period
        due = period > 0 and start % period == 0 and 0 < start < trainer.max_iter
        if due and last is not None and last < start:
            trainer.iter = trainer.storage.iter = start - 1
            for hook in self.hooks:
                hook.after_step()
            trainer.iter = trainer.storage.iter = start
