"""A checkpoint file of another code, or of a training, as a file for one model of this project."""

from pathlib import Path

from torch import Tensor

from ..coco import NUM_RAW_CLASSES, RAW_IDS, coco_names, raw_names
from ..errors import ConfigError
from .convert import Conversion, convert
from .reader import read_checkpoint


def convert_file(
    path: str | Path,
    model_state: dict[str, Tensor],
    num_classes: int,
    class_names: list[str],
    *,
    averaged: bool = False,
) -> tuple[Conversion, list[str]]:
    """Reads a checkpoint and converts it for a model.

    Args:
        path: .pth, .pkl or .safetensors.
        model_state: of the model.
        num_classes: of the model.
        class_names: of the model in order of their ids, [] if unknown.
        averaged: take the moving average of the weights.

    Returns:
        tuple: the conversion, and the class names of its result; [] if neither model nor file nor COCO name them.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model.
        ConfigError: the model has classes that the file lacks.
    """
    source = read_checkpoint(path, averaged=averaged)
    conversion = convert(source.state, model_state, source.class_names, class_names)
    if conversion.new_classes:
        raise ConfigError(
            f"the checkpoint lacks {len(conversion.new_classes)} of the {num_classes} classes; convert it with its own "
            "number of classes, and start a training from that: it carries rows over by name"
        )
    if class_names:
        return conversion, class_names
    if len(source.class_names) == num_classes:
        return conversion, source.class_names
    of_coco = {len(RAW_IDS): coco_names, NUM_RAW_CLASSES: raw_names}
    return conversion, list(of_coco[num_classes]()) if num_classes in of_coco else []
