"""The configuration keys, and how a config is read from files and checked. Knows no data set."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from .keys import add_dn_detr_config
from .loading import device_is_named, load_config
from .ranges import check_ranges
from .spelling import nearest_key
from .validation import check_config
from .yaml_reader import read_config_file

__all__ = [
    "add_dn_detr_config",
    "check_config",
    "check_ranges",
    "device_is_named",
    "load_config",
    "nearest_key",
    "read_config_file",
]
