"""An exponential moving average of the weights (EMA), kept beside them: smoother, and in late training often better."""

import logging
from functools import partial

from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

logger = logging.getLogger(__name__)


def average_weights(model: nn.Module, decay: float, warmup: bool = False) -> AveragedModel:
    """A copy of a model for the average of its weights, in evaluation mode, without gradients.

    The first step gives it the weights of the model, each further one ``decay * average + (1 - decay) * weights``. Buffers
    are copied, not averaged: running statistics are averages already, and a table of indices has no mean.

    Args:
        model: without DistributedDataParallel.
        decay: in [0, 1).
        warmup: after n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's ``ExponentialMovingAverage``: the
            average looks back over about a ninth of its steps, so that it does not hold on to the weights of the start.
    """
    averaged = AveragedModel(model)

    def _update(average: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        n = int(averaged.n_averaged)  # on the CPU, other than the argument, which may be on a GPU
        now = min(decay, (1 + n) / (10 + n)) if warmup else decay
        get_ema_multi_avg_fn(now)(average, weights, n)

    averaged.multi_avg_fn = _update
    return averaged.eval().requires_grad_(False)


class AverageHook(HookBase):
    """Updates the average after each step. Register it before the hooks that write checkpoints.

    A step that has not changed the weights is not averaged, see :class:`~dn_detr_d2.engine.TrainStep`.

    Args:
        averaged: of :func:`average_weights`.
        model: the one that is trained, without DistributedDataParallel.
        restart: iterations after which the average begins anew, from the weights that the model then has; 0 = never.
    """

    def __init__(self, averaged: AveragedModel, model: nn.Module, restart: int = 0):
        self.averaged, self.model, self.restart = averaged, model, restart

    def before_train(self) -> None:
        """Warns if the checkpoint that is resumed has no average."""
        if self.trainer.start_iter > 0 and self.averaged.n_averaged == 0:
            logger.warning(
                "the checkpoint has no averaged weights; the average begins anew after iteration %d",
                self.trainer.start_iter,
            )

    def after_step(self) -> None:
        """Updates the average as soon as it is known that the step has changed the weights, and before they change again."""
        restart = self.restart > 0 and self.trainer.iter + 1 == self.restart
        self.trainer._trainer.when_settled(partial(self._update, restart))

    def _update(self, restart: bool, stepped: bool) -> None:
        if (
            restart
        ):  # at once, whether or not this step counts: a checkpoint without steps averaged is resumed the same way
            self.averaged.module.load_state_dict(self.model.state_dict())
            self.averaged.n_averaged.zero_()  # so the next weights are taken as they are
        if stepped:
            self.averaged.update_parameters(self.model)
