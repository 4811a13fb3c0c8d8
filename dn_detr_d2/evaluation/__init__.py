"""COCO's AP from the records of a data set."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from .coco_evaluator import RecordsEvaluator, TolerantCOCOEvaluator

__all__ = ["RecordsEvaluator", "TolerantCOCOEvaluator"]
