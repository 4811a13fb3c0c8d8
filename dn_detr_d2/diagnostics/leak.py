"""The attention mask of a whole detector, checked by :func:`~dn_detr_d2.denoising.check_isolation` before a training."""

import logging

from torch import nn

from ..denoising import check_groups
from ..denoising.isolation import STRENGTHS, TOLERANCE
from .model_state import preserve_state, require_queries

logger = logging.getLogger(__name__)


def check_denoising(
    model: nn.Module,
    batch: list[dict],
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Perturbs denoising queries of the model and looks at who notices; dropout is off, everything is float32.

    A model without denoising has nothing to check, which the log says.

    Args:
        model: with or without DistributedDataParallel; in any mode, which it keeps.
        batch: annotated images.
        strengths, tolerance: of :func:`~dn_detr_d2.denoising.check_isolation`.
        seed: of noise and perturbations.

    Raises:
        LeakError: somebody noticed; the text says who and by how much.
    """
    with preserve_state(require_queries(model), seed) as bare:
        if bare.denoising is None:
            logger.info("DEBUG.CHECK_DENOISING: the model trains without denoising, there is no mask to check")
            return
        outputs = bare.forward_outputs(batch, bare.denoising)
        trials = check_groups(
            lambda queries: bare.decoder(queries, outputs.memory),
            outputs.queries,
            outputs.noised.groups,
            strengths=strengths,
            tolerance=tolerance,
            seed=seed,
        )
        logger.info("DEBUG.CHECK_DENOISING: in %d trials no query saw a denoising query of another group", trials)
