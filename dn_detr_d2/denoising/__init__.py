"""Query denoising for any DETR-like model; needs torch, numpy and SciPy alone.

:class:`QueryDenoising` is the whole of it as one module, :class:`DenoisingGenerator` the noise alone.
"""

from .box_noise import BOX_NOISES, NoiseScale, ScaleAware
from .embedding import LabelEncoder, embed_boxes
from .generator import BudgetDenoisingGenerator, ContrastiveDenoisingGenerator, DenoisingGenerator
from .isolation import check_groups, check_isolation
from .label_noise import LABEL_NOISES, ClassFrequency, Confusion
from .mask_noise import NoisedMasks, shift_masks
from .noised_targets import NoisedTargets
from .outputs import to_predictions
from .plugin import DenoisingQueries, QueryDenoising
from .query_groups import QueryGroups
from .targets import pad_targets

__all__ = [
    "BOX_NOISES",
    "LABEL_NOISES",
    "BudgetDenoisingGenerator",
    "ClassFrequency",
    "Confusion",
    "ContrastiveDenoisingGenerator",
    "DenoisingGenerator",
    "DenoisingQueries",
    "LabelEncoder",
    "NoiseScale",
    "NoisedMasks",
    "NoisedTargets",
    "QueryDenoising",
    "QueryGroups",
    "ScaleAware",
    "check_groups",
    "check_isolation",
    "embed_boxes",
    "pad_targets",
    "shift_masks",
    "to_predictions",
]
