"""All losses of a pass under their names: those of matching queries, of denoising queries, and of proposals."""

from collections.abc import Callable

from torch import Tensor

from ..losses import HungarianMatcher, LossNormalizers, LossValue, SetCriterion, StepNormalizers, name_layers
from ..structures import Targets
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
        matcher, criterion: pairs of queries and ground truths, and losses from pairs. A matcher without ``start`` and
            ``finish``, which let the device work on while it waits, is called.
        proposal_targets: what the loss of proposals asks for, where there are proposals; None = all targets.
        normalizers: what matching losses are divided by; None = what these images alone give.
    """

    def _named(terms: dict[str, Tensor], kind: str, last: str, others: str) -> dict[str, LossValue]:
        values = {term: [LossValue(x, kind, criterion.is_mean(term)) for x in terms[term]] for term in terms}
        return name_layers(values, last, others)

    targets, proposals = outputs.targets, outputs.queries.proposals
    pairs: LossNormalizers | float = max(sum(targets.counts), 1) if normalizers is None else normalizers.matching
    parts = [(outputs.matching, targets)]
    if proposals is not None:
        parts.append((proposals, targets if proposal_targets is None else proposal_targets(targets)))
    staged, others = hasattr(matcher, "start"), {}
    costs = matcher.start(parts) if staged else None
    if outputs.dn is not None:  # launched before the host waits for the costs
        others |= _named(outputs.dn.terms(outputs.denoising), "denoising", "dn", "dn")
    assignments = matcher.finish(costs) if staged else [matcher(*part) for part in parts]
    main, *proposed = [criterion(*part, pairing, pairs) for part, pairing in zip(parts, assignments, strict=True)]
    for terms in proposed:
        others |= _named(terms, "proposal", "proposal", "proposal")
    return _named(main, "matching", "main", "aux") | others
