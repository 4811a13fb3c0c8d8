"""What keeps a training alive: checkpoints, going on after a stop, processes that start and end together."""

from .checkpointer import Checkpointer
from .hooks import BestCheckpointer, CheckpointHook
from .progress import progress, take_up

__all__ = ["BestCheckpointer", "CheckpointHook", "Checkpointer", "progress", "take_up"]
