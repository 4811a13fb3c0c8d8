"""An exported file in the place of the model that it was made from, and how well both agree."""

import copy
import time
from dataclasses import dataclass

import torch
from detectron2.structures import ImageList, Instances, pairwise_iou
from torch import Tensor, nn

from ..modeling.outputs import LastPredictions
from ..modeling.postprocess import without_nms
from ..structures import map_by_size
from .formats import Run


class ExportedDetector(nn.Module):
    """Detectron2's interface of an exported file, with the post-processing of the model that it was made from.

    Args:
        model: the :class:`~dn_detr_d2.modeling.DenoisingDETR`.
        names: what the file gives, of :func:`~.metadata.output_names`.
        run: the file as a function, see :mod:`.formats`.
    """

    def __init__(self, model: nn.Module, names: list[str], run: Run):
        super().__init__()
        self.model, self.names, self.run = model, names, run

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As of the model, in evaluation mode and without prompts."""
        return map_by_size(self.detect, batched_inputs, together=self.model.passes_together)

    def detect(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections of images that are padded to one size and pass the file together."""
        images = ImageList.from_tensors(
            [x["image"].cpu().float() for x in batched_inputs],
            self.model.size_divisibility,
            padding_constraints=self.model.backbone.padding_constraints,
        )
        outputs = dict(zip(self.names, self.run(images.tensor, torch.tensor(images.image_sizes)), strict=True))
        return self.model.postprocess(LastPredictions.of(outputs), batched_inputs)


@dataclass
class Tolerance:
    """When two detections count as the same, and which part of them must be.

    Attributes:
        score: largest difference of scores.
        iou: least IoU of boxes, of models with masks of masks.
        share: least part of the eager detections that must have their partner. It is below 1 because where two scores are
            equal but for rounding, which of them comes first is chance, and DINO gives a query its content by its place.
    """

    score: float
    iou: float
    share: float


TOLERANCES = {"fp32": Tolerance(1e-3, 0.99, 0.95), "fp16": Tolerance(0.03, 0.9, 0.9), "int8": Tolerance(0.1, 0.75, 0.8)}


@dataclass
class Agreement:
    """How well an exported file agrees with its model.

    Attributes:
        share: part of the model's detections that the file has too.
        score: largest difference of the scores of those.
        cpu_ratio: CPU time of the file divided by that of the model.
    """

    share: float
    score: float
    cpu_ratio: float


@torch.no_grad()
def compare(model: nn.Module, exported: ExportedDetector, batches: list[list[dict]], tolerance: Tolerance) -> Agreement:
    """Detections of a model and of its file on the same batches, as sets.

    Args:
        model: in evaluation mode.
        exported: its file.
        batches: of Detectron2's input dicts; the images of a batch are padded to one size and pass together.
        tolerance: what counts as the same.
    """
    exported = copy.copy(exported)
    exported.model = with_instances(exported.model)
    model = exported.model
    shares, gaps, seconds = [], [], [0.0, 0.0]
    for warm in (False, True):  # the first pass of either is slower
        for batch in batches:
            started = time.process_time()
            ours = [x["instances"] for x in model.detect(batch)]
            between = time.process_time()
            theirs = [x["instances"] for x in exported.detect(batch)]
            if warm:
                seconds[0] += between - started
                seconds[1] += time.process_time() - between
                continue
            for one, other in zip(ours, theirs, strict=True):
                found = partners(one, other, tolerance)
                shares += [found is not None for found in found]
                gaps += [gap for gap in found if gap is not None]
    share = sum(shares) / len(shares) if shares else 0.0
    return Agreement(share, max(gaps, default=0.0), seconds[1] / seconds[0])


def with_instances(model: nn.Module) -> nn.Module:
    """A shallow copy of a model that gives instances, of models with masks only these, without NMS.

    Of two duplicates with nearly equal scores, rounding decides which one NMS keeps.
    """
    model = copy.copy(model)
    model.postprocess = without_nms(model.postprocess)
    if model.pixel_decoder is not None:
        model.postprocess.outputs = ("instances",)
    return model


def partners(ours: Instances, theirs: Instances, tolerance: Tolerance) -> list[float | None]:
    """For each detection of ``ours`` the difference of its score and that of its partner in ``theirs``; None without one.

    A partner has the same class and is nobody else's; the best detection chooses first, and takes the nearest score.
    """
    overlap = mask_iou(ours, theirs) if ours.has("pred_masks") else pairwise_iou(ours.pred_boxes, theirs.pred_boxes)
    overlap = overlap.nan_to_num()  # of two empty boxes
    if not ours.has("pred_masks"):
        same_place = (ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor[None]).abs().amax(-1) < 0.1
        overlap = overlap.masked_fill(same_place, 1.0)  # boxes of less than a pixel
    gaps = (ours.scores[:, None] - theirs.scores[None]).abs()
    fits = (ours.pred_classes[:, None] == theirs.pred_classes[None]) & (gaps <= tolerance.score)
    gaps = gaps.masked_fill(~(fits & (overlap >= tolerance.iou)), torch.inf)
    found: list[float | None] = []
    for row in gaps:
        gap, nearest = row.min(0) if len(theirs) else (torch.tensor(torch.inf), 0)
        found.append(float(gap) if gap < torch.inf else None)
        if found[-1] is not None:
            gaps[:, nearest] = torch.inf
    return found


def mask_iou(ours: Instances, theirs: Instances) -> Tensor:
    """(n, m) IoU of masks; 1 where both are empty."""
    a, b = (x.pred_masks.flatten(1).float() for x in (ours, theirs))
    both = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - both
    return torch.where(union == 0, 1.0, both / union.clamp(min=1))
