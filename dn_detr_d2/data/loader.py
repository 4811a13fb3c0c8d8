"""Detectron2's loaders with our mapper, and a word in the log about images without boxes."""

import logging

from detectron2.data import build_detection_test_loader, build_detection_train_loader, get_detection_dataset_dicts

from ..errors import DatasetError
from .mapper import DetrDatasetMapper

logger = logging.getLogger(__name__)


def build_train_loader(cfg):
    """An endless loader of batches of this process; says what happens to images without boxes.

    Raises:
        DatasetError: no image has a box.
    """
    everything = get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN), filter_empty=False)
    empty = sum(not has_boxes(record) for record in everything)
    if empty == len(everything):
        raise DatasetError(
            f"no image of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has a box; there is nothing to learn"
        )
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    logger.info(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS = %s: %d of %d training images have no boxes and are %s.",
        filtered,
        empty,
        len(everything),
        "left out" if filtered else "trained on",
    )
    kept = [record for record in everything if has_boxes(record)] if filtered else everything
    return build_detection_train_loader(cfg, dataset=kept, mapper=DetrDatasetMapper(cfg, True))


def build_test_loader(cfg, dataset_name: str):
    """A loader that yields every image of a data set once."""
    return build_detection_test_loader(cfg, dataset_name, mapper=DetrDatasetMapper(cfg, False))


def has_boxes(record: dict) -> bool:
    """Whether an image has an annotation that is not a crowd."""
    return any(not annotation.get("iscrowd", 0) for annotation in record.get("annotations", []))
