"""Reads the last step on the host before a hook looks at the training."""

from collections.abc import Iterable

from detectron2.engine import HookBase

from .graceful_stop import StopHook


class SettleHook(HookBase):
    """Settles the step after which a checkpoint, an evaluation, a diagnosis or a line of metrics is due, and the last one.

    On a GPU the numbers of a step are otherwise read in the next one, see :class:`~dn_detr_d2.engine.TrainStep`. Register it
    after :class:`.StopHook` and before all hooks that look at weights or metrics. All ranks decide alike, because a failure
    is looked into by all together: so the periods are those of the config, also of hooks that only rank 0 has.

    Args:
        periods: of what is done every so many iterations; 0 = never.
        stop: knows whether the training is to stop.
    """

    def __init__(self, periods: Iterable[int], stop: StopHook):
        self.periods, self.stop = [period for period in periods if period > 0], stop

    def after_step(self) -> None:
        """Settles if something is due; raises FloatingPointError as :meth:`.TrainStep.settle` does."""
        done = self.trainer.iter + 1
        due = any(done % period == 0 for period in self.periods)
        if due or self.stop.agreed is not None or done >= self.trainer.max_iter:
            self.trainer._trainer.settle()

    def after_train(self) -> None:
        """Before the last evaluation."""
        self.trainer._trainer.settle()
