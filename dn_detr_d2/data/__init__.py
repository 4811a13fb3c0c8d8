"""Data: the mapper, users' COCO-format sets, the embedded sets (registered on import), and the training loader."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from .coco_custom import check_files, class_names, dataset_path, load_coco_json, register_coco_json
from .images import read_image
from .loader import build_annotated_batch, build_probe_loader, build_test_loader, build_train_loader, count_classes
from .mapper import DetrDatasetMapper, ResizeShortestEdge
from .panoptic import read_panoptic_png
from .prompts import class_number, evaluated_classes, split_classes
from .registered import check_records, records_of
from .semantic import read_semantic_map
from .shapes import cache_folder, register_shapes
from .shapes_hard import register_shapes_hard
from .shapes_segments import register_shapes_segments

register_shapes()
register_shapes_hard()
register_shapes_segments()

__all__ = [
    "DetrDatasetMapper",
    "ResizeShortestEdge",
    "build_annotated_batch",
    "build_probe_loader",
    "build_test_loader",
    "build_train_loader",
    "cache_folder",
    "check_files",
    "check_records",
    "class_names",
    "class_number",
    "count_classes",
    "dataset_path",
    "evaluated_classes",
    "load_coco_json",
    "read_image",
    "read_panoptic_png",
    "read_semantic_map",
    "records_of",
    "register_coco_json",
    "register_shapes",
    "split_classes",
]
