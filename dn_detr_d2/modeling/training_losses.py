"""All losses of a pass under their names: those of matching queries, of denoising queries, and of proposals."""

from collections.abc import Callable
from dataclasses import replace

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
        matcher, criterion: pairs of queries and ground truths, and losses from pairs. A matcher without ``start`` and
            ``finish``, which let the device work on while it waits, is called.
        proposal_targets: what the loss of proposals asks for, where there are proposals; None = all targets.
        normalizers: what matching losses are divided by; None = what these images alone give.
    """

    def _named(terms: dict[str, Tensor], kind: str, last: str, others: str, first: int = 0) -> dict[str, LossValue]:
        values = {term: [LossValue(x, kind, criterion.is_mean(term)) for x in terms[term]] for term in terms}
        return name_layers(values, last, others, first)

    targets, proposals = outputs.targets, outputs.queries.proposals
    pairs: LossNormalizers | float = max(sum(targets.counts), 1) if normalizers is None else normalizers.matching
    parts = [(outputs.matching, targets)]
    if proposals is not None:
        parts.append((proposals, targets if proposal_targets is None else proposal_targets(targets)))
    staged, others = hasattr(matcher, "start"), {}
    costs = matcher.start(parts) if staged else None
    if outputs.dn is not None:  # launched before the host waits for the costs
        first = 0 if proposals is not None else sets_without_denoising(outputs.denoising)
        terms = outputs.dn.terms(from_set(outputs.denoising, first))
        others |= _named(terms, "denoising", "dn", "dn", first)
    assignments = matcher.finish(costs) if staged else [matcher(*part) for part in parts]
    main, *proposed = [criterion(*part, pairing, pairs) for part, pairing in zip(parts, assignments, strict=True)]
    for terms in proposed:
        others |= _named(terms, "proposal", "proposal", "proposal")
    return _named(main, "matching", "main", "aux") | others


def sets_without_denoising(predictions: Predictions) -> int:
    """How many sets, from the first, have no denoising loss in a detector without two stages.

    As in the code of Mask DINO, those before the first layer: their boxes are the noised ones, which nothing has restored.
    Mask2Former has no boxes, and all its sets have the loss.
    """
    return predictions.before_layers if predictions.boxes is not None else 0


def from_set(predictions: Predictions, first: int) -> Predictions:
    """The prediction sets from ``first`` on."""
    if not first:
        return predictions
    rows = {name: getattr(predictions, name) for name in ("logits", "boxes", "mask_embeddings")}
    kept = {name: x[first:] for name, x in rows.items() if x is not None}
    return replace(predictions, **kept, before_layers=predictions.before_layers - first)
