"""What a model does on fixed images, see docs/diagnostics.md: as functions, and as hooks of a training."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from .annotation_errors import Suspicion, judge_annotations, judge_labels
from .denoising_health import Restoration, measure_restoration
from .diagnostic_hooks import InstabilityHook, LeakCheckHook, MeasuringHook, build_diagnostics, check_diagnostics
from .instability import anchor_distances, anchor_metrics, average_top_k, churn, instability
from .leak import check_denoising
from .model_state import preserve_state, require_queries
from .probe import ProbedImage, probe

__all__ = [
    "InstabilityHook",
    "LeakCheckHook",
    "MeasuringHook",
    "ProbedImage",
    "Restoration",
    "Suspicion",
    "anchor_distances",
    "anchor_metrics",
    "average_top_k",
    "build_diagnostics",
    "check_denoising",
    "check_diagnostics",
    "churn",
    "instability",
    "judge_annotations",
    "judge_labels",
    "measure_restoration",
    "preserve_state",
    "probe",
    "require_queries",
]
