"""All losses of a pass under their names: those of matching queries, of denoising queries, and of proposals."""

from collections.abc import Callable

from torch import Tensor

from ..losses import HungarianMatcher, LossNormalizers, LossValue, SetCriterion, StepNormalizers, name_layers
from ..structures import Predictions, Targets
from .outputs import ForwardOutputs


def training_losses(
    outputs: ForwardOutputs,
    matcher: HungarianMatcher,
    criterion: SetCriterion,
    proposal_targets: Callable[[Targets], Targets] | None = None,
    normalizers: StepNormalizers | None = None,
) -> dict[str, LossValue]:
    """Weighted losses of an annotated pass: ``main/*`` of the last layer, ``aux/*_i`` of layer i, ``dn/*``, ``proposal/*``.

    Args:
        outputs: of the pass.
        matcher, criterion: pairs of queries and ground truths, and losses from pairs.
        proposal_targets: what the loss of proposals asks for, where there are proposals.
        normalizers: what matching losses are divided by; None = what these images alone give.
    """

    def _matched(predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        return criterion(predictions, targets, matcher(predictions, targets), pairs)

    def _named(terms: dict[str, Tensor], kind: str, last: str, others: str) -> dict[str, LossValue]:
        values = {term: [LossValue(x, kind, criterion.is_mean(term)) for x in terms[term]] for term in terms}
        return name_layers(values, last, others)

    targets, proposals = outputs.targets, outputs.queries.proposals
    pairs: LossNormalizers | float = max(sum(targets.counts), 1) if normalizers is None else normalizers.matching
    others = {}
    if outputs.dn is not None:
        others |= _named(outputs.dn.terms(outputs.denoising), "denoising", "dn", "dn")
    if proposals is not None:
        others |= _named(_matched(proposals, proposal_targets(targets)), "proposal", "proposal", "proposal")
    return _named(_matched(outputs.matching, targets), "matching", "main", "aux") | others
