"""What keeps a training alive: checkpoints, going on after a stop, processes that start and end together."""

from .checkpointer import Checkpointer
from .hooks import BestCheckpointer, CheckpointHook, MetricPrinter, ShortHistory
from .processes import ProcessError, assigned_place, describe, join, launch
from .progress import progress, take_up
from .signals import REQUEUE, LeaveHook, StopHook, StopRequest

__all__ = [
    "REQUEUE",
    "BestCheckpointer",
    "CheckpointHook",
    "Checkpointer",
    "LeaveHook",
    "MetricPrinter",
    "ProcessError",
    "ShortHistory",
    "StopHook",
    "StopRequest",
    "assigned_place",
    "describe",
    "join",
    "launch",
    "progress",
    "take_up",
]
