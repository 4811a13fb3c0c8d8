"""From a teacher's detections to pseudo labels, and what a semi-supervised training must say in its config."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torchvision.ops import nms

from ..errors import ConfigError

MATCHING, DENOISING = LOSSES = ("matching", "denoising")


@dataclass
class PseudoLabels:
    """From detections of a teacher to the instances that a model is trained on.

    Attributes:
        thresholds: of each class, in [0, 1]; detections below are left out.
        nms_iou: in [0, 1]; of detections that overlap by more, of whatever class, the best one is kept.
        weighted: losses of an object are multiplied with its score.
        noise_growth: the box noise of an object of score s is multiplied with 1 + noise_growth * (1 - s).
    """

    thresholds: Sequence[float]
    nms_iou: float = 0.7
    weighted: bool = True
    noise_growth: float = 1.0

    @classmethod
    def from_config(cls, cfg) -> "PseudoLabels":
        """From ``SEMI_SUPERVISED``."""
        node = cfg.SEMI_SUPERVISED
        return cls(class_thresholds(cfg), node.NMS, node.WEIGHTED, node.NOISE_GROWTH)

    def __call__(self, detections: Instances) -> Instances:
        """``gt_boxes``, ``gt_classes``, ``gt_weights``, ``gt_noise_factors`` and ``scores`` of an image, on the CPU.

        Args:
            detections: with ``pred_boxes``, ``scores`` and ``pred_classes``, in pixels of the image that is trained on.
        """
        found = detections.to("cpu")
        floors = torch.tensor(self.thresholds, dtype=found.scores.dtype)
        found = found[(found.scores >= floors[found.pred_classes]) & found.pred_boxes.nonempty()]
        found = found[nms(found.pred_boxes.tensor, found.scores, self.nms_iou)]
        return Instances(
            found.image_size,
            gt_boxes=found.pred_boxes,
            gt_classes=found.pred_classes,
            gt_weights=found.scores if self.weighted else torch.ones_like(found.scores),
            gt_noise_factors=1 + self.noise_growth * (1 - found.scores),
            scores=found.scores,
        )


def class_thresholds(cfg) -> list[float]:
    """The threshold of each class of the model.

    Raises:
        ConfigError: CLASS_THRESHOLDS has another form, or names a class that the model has not.
    """
    node, names = cfg.SEMI_SUPERVISED, list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    found = [float(node.THRESHOLD)] * cfg.MODEL.DN_DETR.NUM_CLASSES
    for entry in node.CLASS_THRESHOLDS:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or type(entry[1]) not in (int, float):
            raise ConfigError(f"SEMI_SUPERVISED.CLASS_THRESHOLDS takes [class name, threshold] entries, got {entry!r}")
        if entry[0] not in names or not 0 <= entry[1] <= 1:
            raise ConfigError(
                f"SEMI_SUPERVISED.CLASS_THRESHOLDS takes classes of {names[:8]} and thresholds in [0, 1], got {entry!r}"
            )
        found[names.index(entry[0])] = float(entry[1])
    return found


def check_semi_supervised(cfg) -> None:
    """Refuses what ``SEMI_SUPERVISED`` cannot be trained with; raises ConfigError."""
    node = cfg.SEMI_SUPERVISED
    losses = list(node.LOSSES)
    if not losses or not set(losses) <= set(LOSSES):
        raise ConfigError(f"SEMI_SUPERVISED.LOSSES must be some of {list(LOSSES)}, got {losses}")
    without = "with SEMI_SUPERVISED.ENABLED True"
    if not cfg.MODEL_EMA.ENABLED:
        raise ConfigError(f"the teacher is the average of the weights: set MODEL_EMA.ENABLED to True {without}")
    if not cfg.DATASETS.UNLABELED:
        raise ConfigError(f"DATASETS.UNLABELED is empty {without}; name data sets, or folders of images")
    if cfg.MODEL.META_ARCHITECTURE != "DenoisingDETR":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE must be DenoisingDETR {without}, got {cfg.MODEL.META_ARCHITECTURE!r}"
        )
    if cfg.MODEL.DN_DETR.MASK.ENABLED:
        raise ConfigError(f"pseudo labels are boxes: set MODEL.DN_DETR.MASK.ENABLED to False {without}")
    if DENOISING in losses and not cfg.MODEL.DN_DETR.DENOISING.NAME:
        raise ConfigError(
            f"SEMI_SUPERVISED.LOSSES is {losses}, but the model has no denoising: set it to ['matching'], or set "
            "MODEL.DN_DETR.DENOISING.NAME"
        )
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler" or cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler and ASPECT_RATIO_GROUPING False {without}, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN!r} and {cfg.DATALOADER.ASPECT_RATIO_GROUPING}"
        )
    class_thresholds(cfg)
