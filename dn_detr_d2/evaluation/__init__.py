"""Instruments: what the matching, the anchors and the denoising of a model do on fixed images; see docs/instruments.md."""

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
    "Restoration",
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
