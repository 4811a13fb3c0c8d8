"""Losses and matching as lists of terms; needs torch and SciPy alone."""

from .costs import BoxGIoUCost, BoxL1Cost, ClassFocalCost, ClassSoftmaxCost, Cost, MaskPointCost
from .criterion import LossValue, SetCriterion, SoftmaxCriterion, name_layers
from .mask_terms import MaskPoints, without_masks
from .matcher import HungarianMatcher, SoftmaxMatcher
from .normalizers import LossNormalizers, StepNormalizers, mean_over_ranks, step_normalizers
from .terms import BoxGIoU, BoxL1, ClassFocal, ClassSoftmax, LossTerm

__all__ = [
    "BoxGIoU",
    "BoxGIoUCost",
    "BoxL1",
    "BoxL1Cost",
    "ClassFocal",
    "ClassFocalCost",
    "ClassSoftmax",
    "ClassSoftmaxCost",
    "Cost",
    "HungarianMatcher",
    "LossNormalizers",
    "LossTerm",
    "LossValue",
    "MaskPointCost",
    "MaskPoints",
    "SetCriterion",
    "SoftmaxCriterion",
    "SoftmaxMatcher",
    "StepNormalizers",
    "mean_over_ranks",
    "name_layers",
    "step_normalizers",
    "without_masks",
]
