"""Other people's checkpoints: read safely, with our names and our classes. Knows files and tensors only."""

from .classes import COCO_RAW_IDS, coco_names
from .convert import Conversion, convert
from .files import CheckpointFile, allow_plain_types, read_checkpoint, write_checkpoint
from .names import Source, identify

__all__ = [
    "COCO_RAW_IDS",
    "CheckpointFile",
    "Conversion",
    "Source",
    "allow_plain_types",
    "coco_names",
    "convert",
    "identify",
    "read_checkpoint",
    "write_checkpoint",
]
