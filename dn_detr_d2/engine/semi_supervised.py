"""Semi-supervised training: a teacher labels images without annotations, and its labels enter matching and denoising.

The teacher is the moving average of the weights (Tarvainen and Valpola, NeurIPS 2017; for detection Liu et al., ICLR 2021).
Semi-DETR (Zhang et al., CVPR 2023) denoises pseudo labels too; here they are weighted by their score besides, and their
noise grows as it falls.
"""

import logging

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..data.unlabeled import WEAK
from ..structures import file_name
from .pseudo_labels import DENOISING, LOSSES, MATCHING, PseudoLabels
from .train_step import TrainStep

logger = logging.getLogger(__name__)

PREFIX = "unlabeled"  # of the names of losses
FAULT = "teacher_fault"  # key of a record: why the teacher has not labelled it


def semi_supervised_options(cfg, teacher: nn.Module) -> dict:
    """What :class:`SemiSupervisedStep` takes besides what every step takes."""
    node = cfg.SEMI_SUPERVISED
    factors = {MATCHING: node.LOSS_WEIGHT, DENOISING: node.DENOISING_WEIGHT}
    weights = {name: factors[name] if name in node.LOSSES else 0.0 for name in LOSSES}
    return {"teacher": teacher, "labels": PseudoLabels.from_config(cfg), "weights": weights}


class SemiSupervisedStep(TrainStep):
    """A training step with images of which some have no annotations: two passes, each with its own backward pass.

    The losses of the second are named ``unlabeled/...``. Until the loader sends such images it is a :class:`TrainStep`.

    Args:
        teacher: labels the weak views; in evaluation mode, not trained.
        labels: from its detections to pseudo labels.
        weights: factor of the matching (with proposals) and of the denoising losses of pseudo labels; 0 = not learned from.
        arguments, options: of :class:`TrainStep`.
    """

    EMPTY = 100  # steps in a row without a pseudo label, after which a warning says so

    def __init__(
        self, *arguments, teacher: nn.Module, labels: PseudoLabels, weights: dict[str, float], **options
    ) -> None:
        super().__init__(*arguments, **options)
        self.teacher, self.labels, self.weights = teacher, labels, weights
        self._empty = 0

    def _parts(self, batch: list[dict]) -> list[tuple]:
        """Those of annotated images, then those of the others, with the labels of the teacher."""
        others = [record for record in batch if WEAK in record]
        annotated = [record for record in batch if WEAK not in record]
        if not others:
            return super()._parts(annotated)
        self.settle()  # the last step updates the teacher, whose answer is waited for anyway
        labelled = self._labelled(others)
        own = self._normalizers(annotated)
        # Or images in which the teacher finds little would teach "no object" undivided, and it would find less and less.
        other = self._normalizers(labelled).at_least(own)
        return [*((part, own) for part in self._split(annotated)), *((part, other) for part in self._split(labelled))]

    def _labelled(self, records: list[dict]) -> list[dict]:
        """The strong views with instances; waits for the device.

        Where the teacher fails, the records say so, and without instances go through all that other processes wait for.
        """
        views = []
        for record in records:
            height, width = record[WEAK].shape[-2:]  # detections are wanted in pixels of the view
            views.append({"image": record[WEAK], "height": height, "width": width, "file_name": file_name(record)})
        fault = {}
        try:
            with torch.no_grad(), self.teacher.without_nms():  # SEMI_SUPERVISED has thresholds and an NMS of its own
                found = [self.labels(output["instances"]) for output in self.teacher(views)]
        except FloatingPointError as error:
            found = [self.labels.none((view["height"], view["width"])) for view in views]
            fault = {FAULT: str(error)}
        if comm.is_main_process():
            self._log_labels(found)
        return [record | {"instances": image} | fault for record, image in zip(records, found, strict=True)]

    def _log_labels(self, found: list[Instances]) -> None:
        count = sum(len(image) for image in found)
        mean = sum(image.scores.sum().item() for image in found) / max(count, 1)
        values = {"pseudo_labels/an_image": count / len(found), "pseudo_labels/mean_score": mean}
        get_event_storage().put_scalars(**values, cur_iter=self.iter)
        self._empty = 0 if count else self._empty + 1
        if self._empty == self.EMPTY:
            logger.warning(
                "no detection of the teacher has become a pseudo label in the last %d steps; lower "
                "SEMI_SUPERVISED.THRESHOLD (now %s), or give the model more iterations of BURN_IN",
                self.EMPTY,
                sorted(set(self.labels.thresholds)),
            )

    def _losses(self, model: nn.Module, *part) -> dict[str, Tensor]:
        losses = super()._losses(model, *part)
        first = part[0][0]
        if WEAK not in first:
            return losses
        if FAULT in first:
            raise FloatingPointError(f"the teacher of SEMI_SUPERVISED: {first[FAULT]}")
        # Multiplied, not left out: every parameter has a gradient, which DistributedDataParallel waits for.
        factors = {name: self.weights[DENOISING if name.startswith("dn/") else MATCHING] for name in losses}
        return {f"{PREFIX}/{name}": factors[name] * value for name, value in losses.items()}
