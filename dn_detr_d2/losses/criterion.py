"""From an assignment, made by the matcher or by the noise, to weighted losses: a list of terms, called one after the other.

Shapes: K prediction sets (decoder layers), N images, Q queries, P classes, T pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import Assignment, Predictions, Targets
from .functional import Constants, in_float32
from .normalizers import LossNormalizers
from .terms import BoxGIoU, BoxL1, ClassFocal, ClassSoftmax, LossTerm


class SetCriterion:
    """A list of loss terms, all decoder layers at once; by default focal class loss, L1 and GIoU.

    Args:
        terms: of the loss, each with its weight; None = those of :meth:`default_terms` with ``settings``.
        settings: of :meth:`default_terms`.

    Raises:
        ValueError: a negative weight, or two terms of one name.
    """

    def __init__(self, terms: Sequence[LossTerm] | None = None, **settings: float):
        if terms is not None and settings:
            raise ValueError(f"give either terms or {sorted(settings)}: a term knows its weight")
        self.terms = list(self.default_terms(**settings) if terms is None else terms)
        names = [name for term in self.terms for name in term.names]
        if len(set(names)) < len(names):
            raise ValueError(f"every loss term needs a name of its own, got {names}")

    @staticmethod
    def default_terms(
        *, class_weight: float = 1.0, l1_weight: float = 5.0, giou_weight: float = 2.0, **constants: float
    ) -> list[LossTerm]:
        """Focal class loss on all queries, L1 and GIoU on the paired ones, with the weights of the paper's models.

        Args:
            class_weight, l1_weight, giou_weight: of the terms.
            constants: of :class:`~dn_detr_d2.losses.functional.Constants`.
        """
        shared = Constants(**constants)
        focal = ClassFocal(class_weight, shared.focal_alpha, shared.focal_gamma)
        return [focal, BoxL1(l1_weight), BoxGIoU(giou_weight, shared.giou_eps)]

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Assignment,
        normalizers: LossNormalizers | Tensor | float,
    ) -> dict[str, Tensor]:
        """Weighted losses of every layer, in float32 also under autocast.

        Args:
            predictions: of K layers.
            targets: the clean ground truth.
            assignment: which query answers for which ground truth; a single row holds for all layers.
            normalizers: what the sums are divided by; a number stands for that of the pairs.

        Returns:
            dict: name of the loss ("class", "l1", "giou", "mask", "dice") -> (K,) float32, weighted; the last entry is the
                final layer.
        """
        normalizers = LossNormalizers.of(normalizers, targets)
        with torch.autocast(predictions.logits.device.type, enabled=False):
            predictions, losses = in_float32(predictions), {}
            for term in self.terms:
                losses |= term.weighted(predictions, targets, assignment, normalizers)
            return losses

    def is_mean(self, name: str) -> bool:
        """Whether the loss of this name is a mean over queries already."""
        return next(term.is_mean for term in self.terms if name in term.names)


class SoftmaxCriterion(SetCriterion):
    """:class:`SetCriterion` with DETR's class loss: cross-entropy over the classes and "no object", the last logit."""

    @staticmethod
    def default_terms(*, no_object_weight: float = 0.1, **settings: float) -> list[LossTerm]:
        """The terms of :class:`SetCriterion` with :class:`~dn_detr_d2.losses.terms.ClassSoftmax` as the first."""
        focal, *boxes = SetCriterion.default_terms(**settings)
        return [ClassSoftmax(focal.weight, no_object_weight), *boxes]


@dataclass
class LossValue:
    """One weighted loss of one layer, and what it is divided by.

    Attributes:
        value: scalar.
        kind: of the queries: "matching", "denoising" or "proposal".
        is_mean: whether it is a mean over queries, rather than a sum over pairs divided by their number.
    """

    value: Tensor
    kind: str
    is_mean: bool


def name_layers(terms: dict[str, Sequence], last: str, others: str, first: int = 0) -> dict:
    """Splits one value a layer, such as (K,) losses: ``last/term`` is of the last layer, ``others/term_i`` of layer i.

    The first value is that of layer ``first``.
    """
    named = {f"{last}/{term}": values[-1] for term, values in terms.items()}
    for term, values in terms.items():
        named |= {f"{others}/{term}_{i}": value for i, value in enumerate(values[:-1], first)}
    return named
