"""From predictions to Instances in pixels."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from ..boxes import cxcywh_to_xyxy, image_scale
from ..structures import Predictions, file_name, upload
from ..utils.precision import after_inference

NONFINITE = "the model predicts NaN or Inf: its weights or its input are not finite (files: {})"


def class_probability(logits: Tensor, num_classes: int) -> Tensor:
    """Probabilities of the classes from the logits of any head.

    Args:
        logits: (..., P) of sigmoid heads, or (..., P + 1) of softmax heads, which have "no object" behind the classes.
        num_classes: P.

    Returns:
        Tensor: (..., P) in [0, 1], float32.
    """
    logits = logits.float()
    return logits.sigmoid() if logits.shape[-1] == num_classes else logits.softmax(-1)[..., :num_classes]


def select_top(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], top_k: int) -> Instances:
    """The ``top_k`` best (query, class) pairs of one image; no NMS, no threshold.

    A query may appear with several classes, as in Deformable DETR and its relatives.

    Args:
        logits: (Q, P).
        boxes: (Q, 4) cxcywh in [0, 1] of the image.
        image_size: (height, width) in pixels.
        top_k: at most this many; fewer if Q * P is smaller.

    Returns:
        Instances: ``pred_boxes`` in pixels, ``scores`` descending, ``pred_classes``.
    """
    num_classes = logits.shape[1]
    scores, index = logits.float().sigmoid().flatten().topk(min(top_k, logits.numel()))
    return _detections(scores, boxes[index // num_classes], index % num_classes, image_size)


def select_best(logits: Tensor, boxes: Tensor, image_size: tuple[int, int], top_k: int) -> Instances:
    """The best class of each query by a softmax whose last class is "no object" (DETR); the ``top_k`` best queries.

    Args:
        logits: (Q, P + 1).
        boxes, image_size, top_k: as for :func:`select_top`.

    Returns:
        Instances: as of :func:`select_top`.
    """
    scores, classes = logits.float().softmax(-1)[:, :-1].max(-1)
    scores, index = scores.topk(min(top_k, len(scores)))
    return _detections(scores, boxes[index], classes[index], image_size)


def select_labelled(
    logits: Tensor, boxes: Tensor, labels: Tensor, image_size: tuple[int, int], top_k: int, softmax: bool = False
) -> Instances:
    """The ``top_k`` best queries of all passes over one image, by the probability of the label that was looked for.

    Args:
        logits: (L, Q, P), or (L, Q, P + 1) with ``softmax``.
        boxes: (L, Q, 4) cxcywh in [0, 1] of the image.
        labels: (L,) what was looked for in each pass.
        image_size, top_k: as for :func:`select_top`.
        softmax: whether the last logit is "no object".

    Returns:
        Instances: as of :func:`select_top`; none where there is no pass.
    """
    probability = class_probability(logits, logits.shape[-1] - softmax)
    scores = probability.gather(-1, labels[:, None, None].expand(*logits.shape[:2], 1)).flatten()
    scores, index = scores.topk(min(top_k, len(scores)))
    return _detections(scores, boxes.flatten(0, 1)[index], labels[index // logits.shape[1]], image_size)


def _detections(scores: Tensor, boxes: Tensor, classes: Tensor, image_size: tuple[int, int]) -> Instances:
    """Instances in pixels from (n,) scores and classes and (n, 4) cxcywh boxes in [0, 1]."""
    boxes = boxes.float()
    return Instances(
        image_size,
        pred_boxes=Boxes(cxcywh_to_xyxy(boxes) * image_scale(image_size, boxes)),
        scores=scores,
        pred_classes=classes,
    )


def class_wise_nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou: float) -> Tensor:
    """(m,) indices, best first, of detections of which none of one class overlap by more than ``iou``; waits for the device.

    Args:
        boxes: (n, 4) corners in any one unit, also outside of an image.
        scores, classes: (n,).
        iou: in [0, 1].
    """
    if not len(boxes):
        return torch.zeros_like(classes)
    boxes = boxes.double()  # batched_nms moves classes apart, for which boxes must not be negative
    return batched_nms(boxes - boxes.amin(), scores.double(), classes, iou)


def without_duplicates(found: Instances, iou: float) -> Instances:
    """Of detections of one class whose boxes overlap by more than ``iou`` the best one, in the order that they have.

    Waits for the device, unless ``iou`` is 1, where all are kept.

    Args:
        found: with ``pred_boxes``, ``scores`` and ``pred_classes``.
        iou: in [0, 1].
    """
    if iou >= 1:
        return found
    return found[class_wise_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, iou).sort().values]


@dataclass
class PendingDetections:
    """Detections of one image of which the host does not know yet how many there are.

    Attributes:
        instances: in pixels of the wanted output size, boxes without a size among them.
        nonempty: (n,) bool, which boxes have a size inside the image.
        finite: () bool, whether all that the model has predicted for the image is.
        image: name of its file.
    """

    instances: Instances
    nonempty: Tensor
    finite: Tensor
    image: str


class Postprocess:
    """From the predictions of a batch to Detectron2's output dicts.

    Args:
        select: from logits, boxes, image size and ``top_k`` to detections: :func:`select_top` or :func:`select_best`.
        top_k: detections per image.
        nms_iou: of these, see :func:`without_duplicates`; 1 = no NMS, as in the papers.
    """

    def __init__(self, select: Callable[..., Instances], top_k: int, nms_iou: float = 1.0):
        self.select, self.top_k, self.nms_iou = select, top_k, nms_iou

    def __call__(self, predictions: Predictions, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detections of the last layer, in pixels of the wanted output size.

        Args:
            predictions: of K layers.
            batched_inputs: the images, and the ``height`` and ``width`` of the output where they are given.

        Raises:
            FloatingPointError: predictions are not finite.
        """
        return self.finish(self.start(predictions, batched_inputs))

    def start(self, predictions: Predictions, batched_inputs: list[dict]) -> list[PendingDetections]:
        """The part of :meth:`__call__` that does not wait for the device, image by image; :meth:`finish` does the rest."""
        with after_inference(predictions.logits.device.type):
            logits, boxes = predictions.logits[-1], predictions.boxes[-1]
            return [
                _pending(self.select(*predicted, size_of(x), self.top_k), predicted, x)
                for *predicted, x in zip(logits, boxes, batched_inputs, strict=True)
            ]

    def finish(self, pending: list[PendingDetections]) -> list[dict[str, Instances]]:
        """Detectron2's output dicts, without boxes that have no size; all images together wait once for the device.

        With NMS each image waits once more.

        Args:
            pending: of :meth:`start`, of all images, whether or not they have passed the model together.

        Raises:
            FloatingPointError: predictions are not finite.
        """
        if not pending:
            return []
        with after_inference(pending[0].nonempty.device.type):
            flags = iter(torch.cat([x for one in pending for x in (one.finite[None], one.nonempty)]).tolist())
            outputs = []
            for one in pending:
                finite, *nonempty = itertools.islice(flags, 1 + len(one.nonempty))
                if not finite:
                    raise FloatingPointError(NONFINITE.format([one.image]))
                kept = [place for place, usable in enumerate(nonempty) if usable]
                all_of_them = len(kept) == len(nonempty)
                found = one.instances if all_of_them else one.instances[upload(kept, one.nonempty)]
                outputs.append({"instances": without_duplicates(found, self.nms_iou)})
        return outputs

    def of_labels(
        self, predictions: Predictions, labels: list[Tensor], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Detections where each label of an image was looked for in a pass of its own, see :func:`select_labelled`.

        Args:
            predictions: of L passes in the place of images, those of one image one after the other.
            labels: (l,) of each image.
            batched_inputs: as for :meth:`__call__`.

        Raises:
            FloatingPointError: predictions are not finite.
        """
        counts, softmax = [len(own) for own in labels], self.select is select_best
        with after_inference(predictions.logits.device.type):
            logits, boxes = predictions.logits[-1].split(counts), predictions.boxes[-1].split(counts)
            return self.finish(
                [
                    _pending(select_labelled(*predicted, own, size_of(x), self.top_k, softmax=softmax), predicted, x)
                    for *predicted, own, x in zip(logits, boxes, labels, batched_inputs, strict=True)
                ]
            )


def without_nms(postprocess):
    """A copy of a :class:`Postprocess`, or one for masks, that leaves no detection out because it overlaps another."""
    postprocess = copy.copy(postprocess)
    postprocess.nms_iou = 1.0
    return postprocess


def size_of(record: dict) -> tuple[int, int]:
    """(height, width) of the image that the model sees."""
    return tuple(record["image"].shape[-2:])


def output_size(record: dict) -> tuple[int, int]:
    """(height, width) that the detections are wanted for."""
    height, width = size_of(record)
    return record.get("height", height), record.get("width", width)


def _pending(found: Instances, predicted: list[Tensor], record: dict) -> PendingDetections:
    """Detections scaled to the wanted output size and cut to it, as by Detectron2's ``detector_postprocess``."""
    wanted = output_size(record)
    boxes = found.pred_boxes.tensor
    for axis, (new, old) in enumerate(zip(wanted[::-1], found.image_size[::-1], strict=True)):
        boxes[:, axis::2].mul_(new / old).clamp_(0, new)  # Boxes.clip() would wait for the device
    finite = torch.stack([x.isfinite().all() for x in predicted]).all()
    scaled = Instances(wanted, **found.get_fields())
    return PendingDetections(scaled, scaled.pred_boxes.nonempty(), finite, file_name(record))


def require_finite(predicted: list[Tensor], batched_inputs: list[dict]) -> None:
    """Raises FloatingPointError, with the names of the images, if a tensor holds NaN or Inf."""
    if not torch.stack([x.isfinite().all() for x in predicted]).all():  # one wait for the device
        raise FloatingPointError(NONFINITE.format([file_name(x) for x in batched_inputs]))
