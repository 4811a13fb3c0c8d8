"""COCO's AP from the records of a data set."""

from .coco_evaluator import RecordsEvaluator, TolerantCOCOEvaluator

__all__ = ["RecordsEvaluator", "TolerantCOCOEvaluator"]
