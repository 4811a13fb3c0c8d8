"""Training and evaluation: the config, the trainer, its step, its hooks, and the processes it runs in.

Names are imported from their modules on first use, so that ``setup_cfg`` alone imports neither trainer nor launcher.
"""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from importlib import import_module

_MODULES = {
    ".setup": ("resolve_classes", "setup_cfg"),
    ".trainer": ("Trainer", "best_metrics", "evaluate", "load_for_evaluation"),
    ".train_step": ("TrainStep",),
    ".training_state": ("capture_training_state", "restore_training_state"),
    ".optimizer": ("ClippedAdamW", "ClippedSGD", "build_optimizer", "parameter_groups"),
    ".launch": (
        "ProcessError",
        "rank_info_from_env",
        "check_processes",
        "format_error",
        "end_with_parent",
        "init_distributed",
        "leave",
    ),
    ".hooks.checkpoint": ("BestCheckpointer", "CheckpointHook", "MetricPrinter", "ShortHistory"),
    ".hooks.early_stopping": ("EarlyEnd", "EarlyStopping"),
    ".hooks.ema": ("AverageHook", "average_weights"),
    ".hooks.graceful_stop": ("REQUEUE", "LeaveHook", "StopHook", "StopRequest", "leave_training"),
    ".hooks.noise_schedule": ("NoiseSchedule", "noise_factor"),
    ".hooks.repeat_evaluation": ("EvaluationRecord", "RepeatEvaluation"),
    "..checkpoint.checkpointer": ("Checkpointer", "load_weights"),
    "..evaluation": ("TolerantCOCOEvaluator",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    """A public name, imported now."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """What tab completion offers."""
    return sorted({*globals(), *__all__})
