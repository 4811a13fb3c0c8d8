"""How strong box noise is at each iteration."""

import math

from detectron2.engine import HookBase
from torch import nn

from ...utils.distributed import unwrap


def noise_factor(name: str, start: float, end: float, iteration: int, max_iter: int) -> float:
    """What the scales of the box noise are multiplied with.

    With p = iteration / (max_iter - 1), 0 in the first iteration and 1 in the last:

    - ``constant``: start;
    - ``linear``: start + (end - start) p;
    - ``cosine``: end + (start - end) (1 + cos(pi p)) / 2.
    """
    if name == "constant":
        return start
    p = min(iteration / max(max_iter - 1, 1), 1.0)
    return start + (end - start) * (p if name == "linear" else (1 - math.cos(math.pi * p)) / 2)


class NoiseSchedule(HookBase):
    """Sets the factor of all generators of denoising in the model; a function of the iteration, so a resume goes on with it.

    Register it before the hooks that evaluate: what they measure after a step has the noise of that step.

    Args:
        name, start, end: see :func:`noise_factor`.
    """

    def __init__(self, name: str, start: float, end: float):
        self.name, self.start, self.end, self._generators = name, start, end, []

    def before_train(self) -> None:
        """An evaluation that is repeated when a training is resumed belongs to the step before."""
        self._generators = find_generators(unwrap(self.trainer.model))
        self._set(max(self.trainer.start_iter - 1, 0))

    def before_step(self) -> None:
        """Before each iteration."""
        self._set(self.trainer.iter)

    def _set(self, iteration: int) -> None:
        factor = noise_factor(self.name, self.start, self.end, iteration, self.trainer.max_iter)
        for generator in self._generators:
            generator.noise_factor = factor


def find_generators(model: nn.Module) -> list:
    """Every :class:`~dn_detr_d2.DenoisingGenerator` that a part of the model has as its ``generator``."""
    found = (getattr(module, "generator", None) for module in model.modules())
    return [generator for generator in found if hasattr(generator, "noise_factor")]
