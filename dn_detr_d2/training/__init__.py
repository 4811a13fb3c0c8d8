"""What keeps a training alive: the step and its checks, checkpoints, going on after a stop, processes
that start and end together."""

from .checkpointer import Checkpointer
from .hooks import BestCheckpointer, CheckpointHook
from .processes import ProcessError, assigned_place, describe, join, launch
from .progress import progress, take_up
from .signals import REQUEUE, LeaveHook, StopHook, StopRequest
from .step import TrainStep

__all__ = [
    "REQUEUE",
    "BestCheckpointer",
    "CheckpointHook",
    "Checkpointer",
    "LeaveHook",
    "ProcessError",
    "StopHook",
    "StopRequest",
    "TrainStep",
    "assigned_place",
    "describe",
    "join",
    "launch",
    "progress",
    "take_up",
]
