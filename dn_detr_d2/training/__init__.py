"""What keeps a training alive: checkpoints, going on after a stop, processes that start and end together."""

from .checkpointer import Checkpointer
from .hooks import BestCheckpointer, CheckpointHook
from .processes import ProcessError, assigned_place, describe, end_with_parent, join, launch
from .progress import progress, take_up
from .signals import REQUEUE, LeaveHook, StopHook, StopRequest

__all__ = [
    "REQUEUE",
    "BestCheckpointer",
    "CheckpointHook",
    "Checkpointer",
    "LeaveHook",
    "ProcessError",
    "StopHook",
    "StopRequest",
    "assigned_place",
    "describe",
    "end_with_parent",
    "join",
    "launch",
    "progress",
    "take_up",
]
