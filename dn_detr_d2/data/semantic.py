"""Semantic data sets: beside each image a map of one channel, whose pixels are numbers of classes; 255 = not annotated.

:mod:`.mapper` takes each class of an image as one object.
"""

import logging
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import DatasetError
from .coco_custom import dataset_path, is_registered, require_files
from .images import read_map
from .label_files import SUFFIXES, Tally, normal, walk
from .segment_map import NOTHING, SegmentMap, require_size
from .yolo_yaml import read_names

logger = logging.getLogger(__name__)


def register_semantic(
    name: str, image_folder: str, label_folder: str, names_file: str, must_exist: bool = True
) -> None:
    """Registers a semantic data set with Detectron2 under ``name``; the same registration twice is fine.

    Args:
        name: must not be taken by another data set.
        image_folder, label_folder: see :func:`.coco_custom.dataset_path`.
        names_file: one class a line, or a data.yaml with ``names``.
        must_exist: False for a set that is not going to be read; it stays unregistered.

    Raises:
        DatasetError: files are missing, see :func:`load_semantic`, or name no classes.
        ConfigError: the name is taken.
    """
    files = {"image_root": dataset_path(image_folder), "sem_seg_root": dataset_path(label_folder)}
    if is_registered(name, "DATASETS.SEM_SEG", files) or not must_exist:
        return
    require_files(name, files)
    records = load_semantic(*files.values())
    names = read_names(dataset_path(names_file))
    DatasetCatalog.register(name, lambda: records)
    paths = {key: str(path) for key, path in files.items()}
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", ignore_label=NOTHING, stuff_classes=names, **paths)


def load_semantic(image_folder: Path, label_folder: Path) -> list[dict]:
    """Dataset dicts with ``file_name``, ``sem_seg_file_name`` and ``image_id``, in the order of the names; no file is read.

    A map is the .png with the name of its image, in the subfolder of the same name; images without one are left out with a
    line in the log, hidden files (macOS's ``._`` files) without.

    Raises:
        DatasetError: no image has a map, or two images have the same one.
    """
    maps = {_stem(name): label_folder / name for name in walk(label_folder, (".png",), Tally())}
    images = walk(image_folder, SUFFIXES, Tally())
    records = {}
    for name in images:
        stem, path = _stem(name), image_folder / name
        if stem not in maps:
            continue
        if stem in records:
            raise DatasetError(f"{path} and {records[stem]['file_name']} have the same map {maps[stem]}; rename one")
        files = {"file_name": str(path), "sem_seg_file_name": str(maps[stem])}
        records[stem] = files | {"image_id": stem}
    if not records:
        raise DatasetError(
            f"none of {len(images)} images in {image_folder} has a semantic map in {label_folder}, a .png of the same name"
        )
    if left_out := len(images) - len(records):
        logger.warning("%s: %d images without a semantic map are left out", image_folder, left_out)
    return list(records.values())


def _stem(name: str) -> str:
    """What an image and its map have in common: the path below the folder without its ending, accents in one spelling."""
    return normal(name.rpartition(".")[0])


def is_semantic(record: dict) -> bool:
    """Whether the objects of a record are the classes of a semantic map, and not annotations."""
    return "sem_seg_file_name" in record and "annotations" not in record


def read_semantic_map(path: str) -> np.ndarray:
    """(H, W) uint8 numbers of classes; raises DatasetError if the file cannot be read or has colours."""
    return read_map(
        path, ("1", "L", "P"), "pixels of a semantic map are numbers of classes, in one channel of 8 bits"
    ).astype(np.uint8)


def semantic_map(record: dict, size: tuple[int, int], num_classes: int) -> SegmentMap:
    """The classes of a record's map, see :class:`SegmentMap`; values and indices are their numbers.

    Args:
        record: with ``sem_seg_file_name``.
        size: (height, width) of the image.
        num_classes: P; 0 = not checked.

    Raises:
        DatasetError: the map has another size than the image, or a pixel that is no class.
    """
    path = record["sem_seg_file_name"]
    pixels = read_semantic_map(path)
    require_size(path, pixels.shape, record["file_name"], size)
    found = [x for x in np.unique(pixels).tolist() if x != NOTHING]
    if num_classes and found and found[-1] >= num_classes:
        raise DatasetError(
            f"semantic map {path} has class {found[-1]}, but MODEL.DN_DETR.NUM_CLASSES = {num_classes} allows 0 to "
            f"{num_classes - 1} and {NOTHING} for what is not annotated"
        )
    return SegmentMap(pixels, found, found, found)
