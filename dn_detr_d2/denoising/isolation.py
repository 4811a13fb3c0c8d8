"""Proof by trial that denoising queries tell nothing to those that must not know: the attention mask as a decoder uses it.

Shapes: N images, D denoising queries in G groups, Q matching queries, K decoder layers.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LeakError
from ..structures import ObjectQueries, Predictions, replace_on_query_axis
from .outputs import to_predictions
from .query_groups import QueryGroups

if TYPE_CHECKING:
    from .plugin import DenoisingQueries

# A blocked key has weight exp(-inf) = 0, so what must not move stays bitwise the same; the tolerance leaves room for
# attention kernels that sum in another order. A visible key moves an output by about (change of content) / (visible keys),
# so contents are changed by about one standard deviation and, in case the key had hardly any weight, by many.
TOLERANCE = 1e-5
STRENGTHS = (1.0, 10.0, 100.0)


def check_isolation(
    decode: Callable,
    dn: "DenoisingQueries",
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> int:
    """Perturbs denoising queries and looks at who notices: verifies the attention mask of any decoder.

    In each trial some groups get other contents and boxes; all queries that may not see them must predict what they
    predicted. The trials of :func:`separating_sets` put every ordered pair of groups on two sides at least once.

    Args:
        decode: ``decode(content, boxes, mask) -> outputs``, the decoder as it is trained, with shapes as returned by
            :meth:`~dn_detr_d2.denoising.DenoisingQueries.prepend` and outputs as taken by its ``split``. It must not draw
            random numbers: put the decoder into evaluation mode.
        dn: denoising queries of a training batch, after ``prepend``.
        strengths: standard deviations of what is added to the contents.
        tolerance: largest change of a logit or a box coordinate that is not a leak.
        seed: of the perturbations; the random streams of the caller are not used.

    Returns:
        int: the number of trials.

    Raises:
        LeakError: a query noticed that must not; the text says which and by how much.
        ValueError: ``dn`` has no denoising queries or ``prepend`` was not called, or ``decode`` gives different outputs for
            the same queries.
    """
    if dn.noised is None or dn.joined is None:
        raise ValueError(
            "check_isolation needs denoising queries before matching queries: call the QueryDenoising in training mode with "
            "targets, then prepend()"
        )

    def _decode(queries: ObjectQueries) -> Predictions:
        return to_predictions(decode(queries.content, queries.boxes, queries.blocked))

    return check_groups(_decode, dn.joined, dn.noised.groups, strengths=strengths, tolerance=tolerance, seed=seed)


@torch.no_grad()
def check_groups(
    decode: Callable[[ObjectQueries], Predictions],
    queries: ObjectQueries,
    groups: QueryGroups,
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> int:
    """:func:`check_isolation` of a decoder that takes :class:`~dn_detr_d2.structures.ObjectQueries`."""
    generator = torch.Generator(queries.content.device).manual_seed(seed)
    group = groups.of_all(queries.content.shape[1] - len(groups.group))
    before = decode(queries)
    if not largest_change(before, decode(queries)).max() <= tolerance:
        raise ValueError(
            "decode() gives different outputs for the same queries, so nothing can be said of its attention mask; put the "
            "decoder into evaluation mode, without dropout, and see that its outputs are finite"
        )
    trials = 0
    for chosen in separating_sets(groups.num_groups):
        chosen = torch.tensor(chosen, device=group.device)
        changed, may_notice = torch.isin(group, chosen), groups.visible[:, chosen].any(1)[group]
        for strength in strengths:
            after = decode(_perturb(queries, changed, strength, generator))
            _refuse_movement(largest_change(before, after).masked_fill(may_notice, 0), group, groups, tolerance)
            trials += 1
    return trials


def separating_sets(num_groups: int) -> Iterator[list[int]]:
    """Sets of groups such that for all g != h one set holds g and not h, and every g is in some: about 2 log2(G) of them.

    Two numbers differ in a binary digit; the sets are "digit i is 1" and "digit i is 0".
    """
    for digit in range(max((num_groups - 1).bit_length(), 1)):
        for value in (1, 0):
            if groups := [g for g in range(num_groups) if g >> digit & 1 == value]:
                yield groups


def largest_change(before: Predictions, after: Predictions) -> Tensor:
    """(D + Q,) largest change of a query's logits, boxes and mask embedding, over layers and images; infinite for NaN."""
    pairs = [(getattr(before, name), getattr(after, name)) for name in ("logits", "boxes", "mask_embeddings")]
    moved = [(old - new).abs().amax((0, 1, 3)) for old, new in pairs if old is not None]
    return torch.stack(moved).amax(0).nan_to_num(nan=float("inf"))  # NaN is not above any tolerance


def _perturb(queries: ObjectQueries, changed: Tensor, strength: float, generator: torch.Generator) -> ObjectQueries:
    """Other contents, positions, boxes and masks where ``changed`` (D + Q,); boxes are not degenerate, and in the image."""

    def _draw(x: Tensor, axis: int, name: str) -> Tensor:
        options = {"generator": generator, "device": x.device, "dtype": x.dtype}
        if name == "boxes":
            other = 0.1 + 0.8 * torch.rand(x.shape, **options)
        else:
            other = x + strength * torch.randn(x.shape, **options)
        return torch.where(changed[None, :, None], other, x)

    other = replace_on_query_axis(queries, _draw)
    if queries.noised_cells is not None:
        other.noised_cells = lambda shape: _inverted(queries.noised_cells(shape), changed)
    return other


def _inverted(cells: Tensor, changed: Tensor) -> Tensor:
    """(N, D, h, w) cells, inverted where ``changed`` (D + Q,)."""
    return cells ^ changed[: cells.shape[1], None, None]


def _refuse_movement(moved: Tensor, group: Tensor, groups: QueryGroups, tolerance: float) -> None:
    """Raises LeakError naming the worst of those that moved."""
    guilty = moved > tolerance
    if not guilty.any():
        return
    is_matching = group == groups.num_groups
    matching = guilty & is_matching
    kind = "matching queries" if matching.any() else "denoising queries of other groups"
    total = f" of {is_matching.sum().item()}" if matching.any() else ""
    count = (matching if matching.any() else guilty).sum().item()
    raise LeakError(
        f"the attention mask leaks: when denoising queries are perturbed, {count}{total} {kind} change their output, by "
        f"up to {moved.max().item():.2g} (tolerance {tolerance:g}; query {moved.argmax().item()} the most), so they would "
        "learn to copy the ground truth; give the mask of attention_mask() to every self-attention of the decoder (with "
        "DENOISING.ATTENTION_MASK on), and correct what else mixes queries"
    )
