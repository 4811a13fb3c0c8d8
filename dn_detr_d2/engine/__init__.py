"""What keeps a training alive: the step and its checks, checkpoints, going on after a stop, processes
that start and end together."""

from .averaging import AverageHook, average_weights
from .checkpointer import Checkpointer, load_weights
from .early_stopping import EarlyEnd, EarlyStopping
from .evaluated import EvaluationRecord, RepeatEvaluation
from .folder import must_fit
from .hooks import BestCheckpointer, CheckpointHook, MetricPrinter, ShortHistory
from .processes import ProcessError, assigned_place, describe, end_with_parent, join, launch, leave
from .progress import progress, take_up
from .signals import REQUEUE, LeaveHook, StopHook, StopRequest, leave_training
from .step import TrainStep

__all__ = [
    "REQUEUE",
    "AverageHook",
    "BestCheckpointer",
    "CheckpointHook",
    "Checkpointer",
    "EarlyEnd",
    "EarlyStopping",
    "EvaluationRecord",
    "LeaveHook",
    "MetricPrinter",
    "ProcessError",
    "RepeatEvaluation",
    "ShortHistory",
    "StopHook",
    "StopRequest",
    "TrainStep",
    "assigned_place",
    "average_weights",
    "describe",
    "end_with_parent",
    "join",
    "launch",
    "leave",
    "leave_training",
    "load_weights",
    "must_fit",
    "progress",
    "take_up",
]
