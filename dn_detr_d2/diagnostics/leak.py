"""Proof by trial that denoising queries tell nothing to those that must not know: the attention mask of the real model.

Shapes: N images, D denoising queries in G groups, Q matching queries, K decoder layers.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import LeakError
from ..modeling.meta_arch import Observation
from ..structures import ObjectQueries
from .model_state import preserve_state

logger = logging.getLogger(__name__)

# A blocked key has weight exp(-inf) = 0, so what must not move stays the same to the bit; the tolerance leaves room for
# attention kernels that sum in another order. A visible key moves an output by about (change of content) / (visible keys),
# so contents are changed by about one standard deviation and, in case the key had hardly any weight, by many.
TOLERANCE = 1e-5
STRENGTHS = (1.0, 10.0, 100.0)


def check_denoising(
    model: nn.Module,
    batch: list[dict],
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Perturbs denoising queries at random and looks at who notices.

    In each trial some groups get other contents and boxes; the matching queries and all other groups must predict what they
    predicted. The trials of :func:`separating_sets` put every ordered pair of groups on two sides at least once. Dropout is
    off, everything is float32. A model without denoising has nothing to check, which the log says.

    Args:
        model: with or without DistributedDataParallel; in any mode, which it keeps.
        batch: annotated images.
        strengths: standard deviations of what is added to the contents.
        tolerance: largest change of a logit or a box coordinate that is not a leak.
        seed: of noise and perturbations.

    Raises:
        LeakError: somebody noticed; the text says who and by how much.
    """
    with preserve_state(model, seed) as bare:
        if bare.denoising is None:
            logger.info("DEBUG.CHECK_DENOISING: the model trains without denoising, there is no mask to check")
            return
        seen = bare.observe(batch, bare.denoising)
        group = _group_of_each(seen)
        trials = 0
        for groups in separating_sets(seen.noised.num_groups):
            changed = torch.isin(group, torch.tensor(groups, device=group.device))
            for strength in strengths:
                moved = _movement(bare, seen, changed, strength).masked_fill(changed, 0)  # (D + Q,)
                _refuse_movement(moved, group, tolerance)
                trials += 1
        logger.info("DEBUG.CHECK_DENOISING: in %d trials no query saw a denoising query of another group", trials)


def separating_sets(num_groups: int) -> Iterator[list[int]]:
    """Sets of groups such that for all g != h one set holds g and not h, and every g is in some: about 2 log2(G) of them.

    Two numbers differ in a binary digit; the sets are "digit i is 1" and "digit i is 0".
    """
    for digit in range(max((num_groups - 1).bit_length(), 1)):
        for value in (1, 0):
            if groups := [g for g in range(num_groups) if g >> digit & 1 == value]:
                yield groups


def _group_of_each(seen: Observation) -> Tensor:
    """(D + Q,) group of each query, -1 for matching queries."""
    d, queries = seen.noised.num_queries, seen.queries.boxes.shape[1]
    position = torch.arange(queries, device=seen.queries.boxes.device)
    return torch.where(position < d, position // (d // seen.noised.num_groups), -1)


def _movement(bare: nn.Module, seen: Observation, changed: Tensor, strength: float) -> Tensor:
    """(D + Q,) largest change of each query's logits and boxes, over layers and images, when ``changed`` are perturbed."""
    after = bare.decoder(_perturb(seen.queries, changed, strength), seen.memory)
    pairs = ((seen.predictions.logits, after.logits), (seen.predictions.boxes, after.boxes))
    moved = [(old - new).abs().amax((0, 1, 3)) for old, new in pairs]
    return torch.maximum(*moved).nan_to_num(nan=float("inf"))  # NaN is not above any tolerance


def _perturb(queries: ObjectQueries, changed: Tensor, strength: float) -> ObjectQueries:
    """Other contents and boxes where ``changed`` (D + Q,); boxes stay inside the image and none is degenerate."""
    content = queries.content + strength * torch.randn_like(queries.content)
    boxes = 0.1 + 0.8 * torch.rand_like(queries.boxes)
    here = changed[None, :, None]
    return replace(
        queries, content=torch.where(here, content, queries.content), boxes=torch.where(here, boxes, queries.boxes)
    )


def _refuse_movement(moved: Tensor, group: Tensor, tolerance: float) -> None:
    """Raises LeakError naming the worst of those that moved."""
    guilty = moved > tolerance
    if not guilty.any():
        return
    matching = guilty & (group < 0)
    kind = "matching queries" if matching.any() else "denoising queries of other groups"
    count, of = (matching if matching.any() else guilty).sum().item(), (group < 0).sum().item()
    total = f" of {of}" if matching.any() else ""
    raise LeakError(
        f"the attention mask leaks: when denoising queries are perturbed, {count}{total} {kind} change their output, by "
        f"up to {moved.max().item():.2g} (tolerance {tolerance:g}; query {moved.argmax().item()} the most), so they would "
        "learn to copy the ground truth; leave DENOISING.ATTENTION_MASK on, and correct attention_mask() of the "
        "noised targets or the decoder's self-attention"
    )
