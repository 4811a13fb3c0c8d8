"""Other people's checkpoints: read safely, with our names and our classes. Knows files and tensors only."""

from .classes import count_classes
from .convert import BODIES, Conversion, convert
from .convert_file import convert_file
from .names import Source, identify
from .reader import (
    EMA,
    CheckpointFile,
    allow_plain_types,
    check_pickle,
    read_checkpoint,
    write_checkpoint,
)
from .resume import pointed_checkpoint

__all__ = [
    "BODIES",
    "EMA",
    "CheckpointFile",
    "Conversion",
    "Source",
    "allow_plain_types",
    "check_pickle",
    "convert",
    "convert_file",
    "count_classes",
    "identify",
    "pointed_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
]
