"""COCO's AP, panoptic quality and the mean IoU from the records of a data set."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from .build import build_evaluator, inference_folder, main_metric
from .coco_evaluator import RecordsEvaluator, TolerantCOCOEvaluator
from .panoptic_evaluator import PanopticEvaluator
from .semantic_evaluator import SemanticEvaluator

__all__ = [
    "PanopticEvaluator",
    "RecordsEvaluator",
    "SemanticEvaluator",
    "TolerantCOCOEvaluator",
    "build_evaluator",
    "inference_folder",
    "main_metric",
]
