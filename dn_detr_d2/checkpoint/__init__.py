"""Other people's checkpoints: read safely, with our names and our classes. Knows files and tensors only."""

from .classes import count_classes
from .convert import BODIES, Conversion, convert
from .files import (
    EMA,
    CheckpointFile,
    allow_plain_types,
    check_pickle,
    pointed_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .names import Source, identify

__all__ = [
    "BODIES",
    "EMA",
    "CheckpointFile",
    "Conversion",
    "Source",
    "allow_plain_types",
    "check_pickle",
    "convert",
    "count_classes",
    "identify",
    "pointed_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
]
