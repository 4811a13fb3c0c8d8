"""COCO's AP from the records of a data set; instruments, see docs/instruments.md, which look at a model on fixed images."""

from .coco_evaluator import RecordsEvaluator, TolerantCOCOEvaluator
from .denoising_health import JudgedLabel, Restoration, judge_labels, measure_restoration
from .hooks import InstabilityHook, LeakCheckHook, MeasuringHook, build_instruments
from .instability import anchor_distances, anchor_metrics, average_top_k, churn, instability
from .leak import check_denoising
from .probe import ProbedImage, probe

__all__ = [
    "InstabilityHook",
    "JudgedLabel",
    "LeakCheckHook",
    "MeasuringHook",
    "ProbedImage",
    "RecordsEvaluator",
    "Restoration",
    "TolerantCOCOEvaluator",
    "anchor_distances",
    "anchor_metrics",
    "average_top_k",
    "build_instruments",
    "check_denoising",
    "churn",
    "instability",
    "judge_labels",
    "measure_restoration",
    "probe",
]
