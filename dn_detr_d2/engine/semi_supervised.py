"""Semi-supervised training: a teacher labels images without annotations, and its labels enter matching and denoising.

The teacher is the moving average of the weights (Tarvainen and Valpola, NeurIPS 2017; for detection Liu et al., ICLR 2021).
What is ours: its boxes are denoised as well as matched, weighted by their score, with box noise that grows as it falls.
"""

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..data.unlabeled import WEAK
from .pseudo_labels import DENOISING, LOSSES, MATCHING, PseudoLabels
from .train_step import TrainStep

PREFIX = "unlabeled"  # of the names of losses


def semi_supervised_options(cfg, teacher: nn.Module) -> dict:
    """What :class:`SemiSupervisedStep` takes besides what every step takes."""
    node = cfg.SEMI_SUPERVISED
    weights = {name: node.LOSS_WEIGHT if name in node.LOSSES else 0.0 for name in LOSSES}
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

    def __init__(
        self, *arguments, teacher: nn.Module, labels: PseudoLabels, weights: dict[str, float], **options
    ) -> None:
        super().__init__(*arguments, **options)
        self.teacher, self.labels, self.weights = teacher, labels, weights

    def _parts(self, batch: list[dict]) -> list[tuple]:
        """Those of annotated images, then those of the others, with the labels of the teacher."""
        others = [record for record in batch if WEAK in record]
        parts = super()._parts([record for record in batch if WEAK not in record])
        return parts + super()._parts(self._labelled(others)) if others else parts

    def _labelled(self, records: list[dict]) -> list[dict]:
        """The strong views with instances; waits for the device."""
        views = []
        for record in records:
            height, width = record[WEAK].shape[-2:]  # detections are wanted in pixels of the view
            views.append({"image": record[WEAK], "height": height, "width": width})
        with torch.no_grad():
            found = [self.labels(output["instances"]) for output in self.teacher(views)]
        if comm.is_main_process():
            count = sum(len(image) for image in found)
            mean = sum(image.scores.sum().item() for image in found) / max(count, 1)
            values = {"pseudo_labels/an_image": count / len(found), "pseudo_labels/mean_score": mean}
            get_event_storage().put_scalars(**values, cur_iter=self.iter)
        return [record | {"instances": image} for record, image in zip(records, found, strict=True)]

    def _losses(self, model: nn.Module, *part) -> dict[str, Tensor]:
        losses = super()._losses(model, *part)
        if WEAK not in part[0][0]:
            return losses
        # Multiplied, not left out: every parameter has a gradient, which DistributedDataParallel waits for.
        factors = {name: self.weights[DENOISING if name.startswith("dn/") else MATCHING] for name in losses}
        return {f"{PREFIX}/{name}": factors[name] * value for name, value in losses.items()}
