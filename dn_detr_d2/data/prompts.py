"""What a model is told of an image beforehand: its objects of known classes, or labels that are in it."""

import math
from itertools import chain

import numpy as np
import torch
from detectron2.structures import Instances

from ..coco import RAW_IDS, raw_names
from ..errors import ConfigError, UserError


def split_classes(cfg) -> tuple[list[int], list[int]]:
    """(known classes, unknown classes) by ``DENOISING.KNOWN_FRACTION`` and ``KNOWN_SEED``, each ascending.

    The known ones are the first floor(KNOWN_FRACTION * P) of the P classes in an order drawn from the seed. Of COCO's 91 raw
    ids only those in use are split.

    Raises:
        ConfigError: there are no known or no unknown classes, though KNOWN_FRACTION is not 0.
    """
    node = cfg.MODEL.DN_DETR
    fraction, seed = node.DENOISING.KNOWN_FRACTION, node.DENOISING.KNOWN_SEED
    raw = list(node.CLASS_NAMES) == list(raw_names())
    classes = np.array(RAW_IDS) if raw else np.arange(node.NUM_CLASSES or 0)
    count = math.floor(fraction * len(classes) + 1e-9)
    if fraction and not 0 < count < len(classes):
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.KNOWN_FRACTION = {fraction} of {len(classes)} classes are {count} known ones; there "
            f"must be known and unknown classes, so take a fraction from {1 / max(len(classes), 1):.3g} to below 1"
        )
    order = np.random.RandomState(seed).permutation(len(classes))  # a stream that is frozen for all versions (NEP 19)
    return sorted(classes[order[:count]].tolist()), sorted(classes[order[count:]].tolist())


def evaluated_classes(cfg) -> list[str]:
    """Names of the classes that AP is averaged over, [] for all: ``TEST.AP_CLASSES``, or the unknown ones.

    Raises:
        ConfigError: the model has no class of such a name, or the classes cannot be split.
    """
    names = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    if lacking := [name for name in cfg.TEST.AP_CLASSES if names and name not in names]:
        raise ConfigError(
            f"TEST.AP_CLASSES names {lacking[:8]}, but the model has the classes {names[:8]}; name some of these"
        )
    unknown = split_classes(cfg)[1] if cfg.MODEL.DN_DETR.DENOISING.KNOWN_FRACTION else []
    return list(cfg.TEST.AP_CLASSES) or [names[i] if names else str(i) for i in unknown]


def class_number(label: str | int, cfg) -> int:
    """The number of a class that is given by name or number; raises UserError if the model of ``cfg`` has no such class."""
    names, count = list(cfg.MODEL.DN_DETR.CLASS_NAMES), cfg.MODEL.DN_DETR.NUM_CLASSES
    if isinstance(label, str) and label in names:
        return names.index(label)
    if type(label) is int and 0 <= label < count:
        return label
    known = (
        f"its classes are {names[:8]}, numbered from 0" if names else f"its classes are the numbers 0 to {count - 1}"
    )
    raise UserError(f"the model has no class {label!r:.60}; {known}")


class KnownObjects:
    """Puts the objects of known classes apart.

    Args:
        classes: the known ones.
    """

    def __init__(self, classes: list[int]):
        self.classes = torch.tensor(classes, dtype=torch.int64)

    def __call__(self, objects: Instances) -> dict:
        """``known``, the objects of known classes, and ``instances``, the others."""
        known = torch.isin(objects.gt_classes, self.classes)
        return {"known": objects[known], "instances": objects[~known]}


class PresentLabels:
    """Names the classes of an image: all of them, or in training one.

    Args:
        classes: all that the model has.
        draw: one class, drawn uniformly among those in the image; in an image without objects among all: then there is
            nothing to be found.
    """

    def __init__(self, classes: list[int], draw: bool):
        self.classes, self.draw = classes, draw

    def __call__(self, objects: Instances) -> dict:
        """``labels``, ascending, and ``instances``, all objects."""
        labels = sorted(set(objects.gt_classes.tolist()))
        if self.draw:
            choices = labels or self.classes
            labels = [choices[np.random.randint(len(choices))]]
        return {"labels": labels, "instances": objects}


def build_prompts(cfg, draw: bool) -> KnownObjects | PresentLabels | None:
    """What the config asks for: prompts of one image from its objects, or None.

    Args:
        cfg: a complete config.
        draw: see :class:`PresentLabels`.
    """
    node = cfg.MODEL.DN_DETR.DENOISING
    if node.KNOWN_FRACTION:
        return KnownObjects(split_classes(cfg)[0])
    return PresentLabels(sorted(chain(*split_classes(cfg))), draw) if node.LABEL_PROMPTS else None
