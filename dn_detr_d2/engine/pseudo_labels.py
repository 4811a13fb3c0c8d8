"""From a teacher's detections to pseudo labels, and what a semi-supervised training must say in its config."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from ..data.loader import resumes_order
from ..data.unlabeled import check_unlabeled
from ..errors import ConfigError

logger = logging.getLogger(__name__)

MATCHING, DENOISING = LOSSES = ("matching", "denoising")


@dataclass
class PseudoLabels:
    """From detections of a teacher to the instances that a model is trained on.

    Attributes:
        thresholds: of each class, in [0, 1]; detections below are left out.
        nms_iou: in [0, 1]; of detections that overlap by more, of whatever class, the best one is kept.
        weighted: losses of an object are multiplied with its score.
        noise_growth: an object of score s has the noise factor 1 + noise_growth * (1 - s).
        most: detections that the teacher gives of an image at most; a warning says once where all of them reach the
            thresholds, so that there may be more.
    """

    thresholds: Sequence[float]
    nms_iou: float = 0.7
    weighted: bool = True
    noise_growth: float = 1.0
    most: int | None = None

    @classmethod
    def from_config(cls, cfg) -> "PseudoLabels":
        """From ``SEMI_SUPERVISED``."""
        node = cfg.SEMI_SUPERVISED
        most = cfg.TEST.DETECTIONS_PER_IMAGE
        return cls(class_thresholds(cfg), node.NMS, node.WEIGHTED, node.NOISE_GROWTH, most)

    def __call__(self, detections: Instances) -> Instances:
        """``gt_boxes``, ``gt_classes`` and ``scores`` of an image, and the ``gt_weights`` and ``gt_noise_factors`` that are
        asked for, on the CPU.

        Args:
            detections: with ``pred_boxes``, ``scores`` and ``pred_classes``, in pixels of the image that is trained on.
        """
        found = detections.to("cpu")
        floors = torch.tensor(self.thresholds, dtype=found.scores.dtype)
        sure = found.scores >= floors[found.pred_classes]
        if len(found) == self.most and sure.all():
            _warn_of_limit(self.most)
        found = found[sure & found.pred_boxes.nonempty()]
        found = found[nms(found.pred_boxes.tensor, found.scores, self.nms_iou)]
        labels = Instances(
            found.image_size, gt_boxes=found.pred_boxes, gt_classes=found.pred_classes, scores=found.scores
        )
        if self.weighted:
            labels.gt_weights = found.scores
        if self.noise_growth:
            labels.gt_noise_factors = 1 + self.noise_growth * (1 - found.scores)
        return labels

    def none(self, size: tuple[int, int]) -> Instances:
        """What there is of an image of (height, width) in which nothing was detected."""
        empty = torch.zeros(0)
        return self(Instances(size, pred_boxes=Boxes(empty.reshape(0, 4)), scores=empty, pred_classes=empty.long()))


@cache
def _warn_of_limit(most: int) -> None:
    logger.warning(
        "all %d detections of the teacher in an image reach SEMI_SUPERVISED.THRESHOLD, as many as TEST.DETECTIONS_PER_IMAGE "
        "allows: it may have more objects, which are trained as background; raise either of them",
        most,
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
    condition = "with SEMI_SUPERVISED.ENABLED True"
    if not cfg.MODEL_EMA.ENABLED:
        raise ConfigError(f"the teacher is the average of the weights: set MODEL_EMA.ENABLED to True {condition}")
    check_unlabeled(cfg)
    if node.BURN_IN >= cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"SEMI_SUPERVISED.BURN_IN = {node.BURN_IN} is not below SOLVER.MAX_ITER = {cfg.SOLVER.MAX_ITER}, so no pseudo "
            "label would be used; make it a part of the training, such as a fifth"
        )
    if cfg.MODEL.META_ARCHITECTURE != "DenoisingDETR":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE must be DenoisingDETR {condition}, got {cfg.MODEL.META_ARCHITECTURE!r}"
        )
    if cfg.MODEL.DN_DETR.MASK.ENABLED:
        raise ConfigError(f"pseudo labels are boxes: set MODEL.DN_DETR.MASK.ENABLED to False {condition}")
    if DENOISING in losses and not cfg.MODEL.DN_DETR.DENOISING.NAME:
        raise ConfigError(
            f"SEMI_SUPERVISED.LOSSES is {losses}, but the model has no denoising: set it to ['matching'], or set "
            "MODEL.DN_DETR.DENOISING.NAME"
        )
    if not resumes_order(cfg):
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler and ASPECT_RATIO_GROUPING False {condition}, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN!r} and {cfg.DATALOADER.ASPECT_RATIO_GROUPING}"
        )
    if cfg.MODEL.DN_DETR.DENOISING.KNOWN_FRACTION or cfg.MODEL.DN_DETR.DENOISING.LABEL_PROMPTS:
        raise ConfigError(
            f"pseudo labels are of all classes, so a model must not be told of some: set DENOISING.KNOWN_FRACTION to 0 and "
            f"LABEL_PROMPTS to False {condition}"
        )
    class_thresholds(cfg)
    memory, rest = 1 / (1 - cfg.MODEL_EMA.DECAY), cfg.SOLVER.MAX_ITER - node.BURN_IN
    if memory > rest / 2 and not cfg.MODEL_EMA.WARMUP:
        logger.warning(
            "MODEL_EMA.DECAY = %g makes the teacher an average of the last %d steps, but only %d come after SEMI_SUPERVISED."
            "BURN_IN: it would hardly change; MODEL_EMA.WARMUP True, or a DECAY near %.4g, follows the model",
            cfg.MODEL_EMA.DECAY,
            round(memory),
            rest,
            1 - 5 / rest if rest > 5 else 0.5,
        )
