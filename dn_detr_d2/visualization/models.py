"""The model and the image that a picture is made of."""

from pathlib import Path

import torch
from torch import nn

from ..checkpoint.checkpointer import classes_of_weights
from ..data import DetrDatasetMapper, check_files, records_of
from ..data.loader import has_boxes
from ..data.mapper import AnnotatedDatasetMapper, trains_masks
from ..diagnostics import require_queries
from ..engine import Trainer, load_for_evaluation
from ..errors import CheckpointError, ConfigError, DatasetError


def load_model(cfg, weights: str) -> nn.Module:
    """The model of a config in evaluation mode, with object queries to look at.

    Args:
        cfg: not frozen; its MODEL.WEIGHTS becomes ``weights``, and ``NUM_CLASSES: auto`` takes the classes of these.
        weights: file of a training, or "" for the model as it is initialised.

    Raises:
        CheckpointError: the file does not exist, or is of another model.
        ConfigError: the model cannot be built, or is no DETR.
    """
    if weights and "://" not in weights and not Path(weights).is_file():
        raise CheckpointError(f"--weights {weights} does not exist; name the model_final.pth of a training")
    cfg.MODEL.WEIGHTS = weights
    cfg.merge_from_list(classes_of_weights(cfg) if weights else [])
    return require_queries(load_for_evaluation(cfg) if weights else Trainer.build_model(cfg).eval())


def training_image(cfg, wanted: str | None) -> dict:
    """One image of DATASETS.TRAIN with its objects, resized as for a test and otherwise as it is.

    Args:
        cfg: names the data sets.
        wanted: an image id of the data set; what is no id is a position, from 0. None = the first image with an object.

    Returns:
        dict: what the model takes, with ``image`` (3, H, W) uint8 and ``instances``.

    Raises:
        ConfigError, DatasetError: no data set, missing files, or no such image.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ConfigError("DATASETS.TRAIN is empty; add --dataset NAME")
    for name in names:
        check_files(name)
    records = [record for name in names for record in records_of(name, trains_masks(cfg))]
    return AnnotatedDatasetMapper(cfg)(choose(records, wanted, ", ".join(names)))


def choose(records: list[dict], wanted: str | None, where: str) -> dict:
    """The record that is wanted, see :func:`training_image`; ``where`` names the data set in the error."""
    if wanted is None:
        return next((record for record in records if has_boxes(record)), records[0])
    if found := next((record for record in records if str(record.get("image_id")) == wanted), None):
        return found
    if wanted.isdigit() and int(wanted) < len(records):
        return records[int(wanted)]
    raise DatasetError(
        f"--image {wanted} is neither an image id of {where} nor a position from 0 to {len(records) - 1}; an id is for "
        f"instance {records[0].get('image_id')}"
    )


def inference_image(cfg, path: str) -> dict:
    """An image file as the model takes it in a test; raises DatasetError if it cannot be read."""
    return DetrDatasetMapper(cfg, False)({"file_name": path})


@torch.no_grad()
def observe_denoising(model: nn.Module, record: dict, seed: int):
    """One pass over an image with denoising queries; ``seed`` fixes the noise. Returns an ForwardOutputs.

    Raises:
        ConfigError: the model has no boxes that could be drawn.
    """
    if not model.decoder.BOXES:
        raise ConfigError(
            f"the pictures of denoising show boxes, which {type(model.decoder).__name__} does not predict; take "
            "a detector, or Mask DINO"
        )
    torch.manual_seed(seed)
    return model.forward_outputs([record], denoising=model.denoising)
