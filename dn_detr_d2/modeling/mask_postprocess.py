"""From the predictions of mask models to Detectron2's ``instances``, ``panoptic_seg`` and ``sem_seg``.

The rules are those of the authors' code of Mask2Former (Cheng et al., CVPR 2022) and Mask DINO (Li et al., CVPR 2023).

Shapes: N images, Q queries, P classes, (h, w) = a quarter of the padded image, n = chosen queries.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..boxes import boxes_of_masks, cxcywh_to_xyxy, image_scale
from ..errors import ConfigError
from ..structures import Predictions
from ..utils.precision import after_inference
from .pixel_decoder import STRIDE
from .postprocess import (
    Postprocess,
    class_probability,
    output_size,
    require_finite,
    select_best,
    select_top,
    size_of,
    without_duplicates,
)

# Logits that are resized at a time, at least one map: so they stay in a processor's cache, and an image's instances need the
# memory of their bits and little more.
CHUNK = 2**20
OUTPUTS = ("instances", "panoptic_seg", "sem_seg")


def resize_masks(mask_logits: Tensor, image_size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Mask logits in pixels of the output: to the padded size, cut to the image, to the output size, all bilinear.

    Args:
        mask_logits: (n, h, w).
        image_size: (height, width) of the image without padding.
        wanted: (height, width) of the output.

    Returns:
        Tensor: (n, *wanted), float32.
    """
    if not len(mask_logits):
        return mask_logits.new_zeros((0, *wanted), dtype=torch.float32)
    return sem_seg_postprocess(_to_padded(mask_logits), image_size, *wanted)


def _to_padded(mask_logits: Tensor) -> Tensor:
    size = [STRIDE * x for x in mask_logits.shape[-2:]]
    return F.interpolate(mask_logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]


def paste_masks(mask_logits: Tensor, image_size: tuple[int, int], wanted: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks in pixels of the output, and how sure the model is of their pixels; resized a few at a time.

    Args:
        mask_logits, image_size, wanted: as for :func:`resize_masks`.

    Returns:
        (n, *wanted) bool masks, and (n,) mean probability over the pixels of each, 0 where it has none.
    """
    masks = torch.empty((len(mask_logits), *wanted), dtype=torch.bool, device=mask_logits.device)
    means = torch.empty(len(mask_logits), device=mask_logits.device)
    pixels = max(STRIDE**2 * mask_logits[:1].numel(), wanted[0] * wanted[1], 1)
    step = max(CHUNK // pixels, 1)
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        logits = resize_masks(mask_logits[part], image_size, wanted)
        masks[part] = own = logits > 0
        means[part] = (logits.sigmoid_() * own).flatten(1).sum(1) / (own.flatten(1).sum(1) + 1e-6)
    return masks, means


def instance_output(
    logits: Tensor,
    mask_logits: Tensor,
    boxes: Tensor | None,
    image_size: tuple[int, int],
    wanted: tuple[int, int],
    *,
    num_classes: int,
    top_k: int,
    classes: Collection[int] | None = None,
    score_by_mask: bool = True,
) -> Instances:
    """The ``top_k`` best (query, class) pairs of one image with their masks.

    Args:
        logits: (Q, P) of sigmoid heads, or (Q, P + 1) of softmax heads with "no object" last.
        mask_logits: (Q, h, w).
        boxes: (Q, 4) cxcywh in [0, 1] of the padded image, returned unclipped and whatever the mask; None = boxes of the
            masks.
        image_size: (height, width) of the image without padding.
        wanted: (height, width) of the output.
        num_classes: P.
        top_k: at most this many.
        classes: pairs of other classes are left out after the choice; None = none are.
        score_by_mask: multiply the class probability by the mean probability of the mask's pixels.

    Returns:
        Instances: ``pred_boxes`` in pixels, ``scores`` descending, ``pred_classes``, ``pred_masks`` (n, *wanted) bool.
    """
    probability = class_probability(logits, num_classes).flatten()
    scores, index = probability.topk(min(top_k, len(probability)))
    query, labels = index // num_classes, index % num_classes
    if classes is not None:
        kept = torch.isin(labels, labels.new_tensor(list(classes)))
        scores, query, labels = scores[kept], query[kept], labels[kept]
    distinct, place = query.unique(return_inverse=True)  # a query can be there with several classes
    masks, means = paste_masks(mask_logits[distinct], image_size, wanted)
    if score_by_mask:
        scores, order = (scores * means[place]).sort(descending=True, stable=True)
        query, labels, place = query[order], labels[order], place[order]
    if boxes is None:
        found = boxes_of_masks(masks)[place].float()
    else:
        padded = [STRIDE * x for x in mask_logits.shape[-2:]]
        scale = [whole / own * out for whole, own, out in zip(padded, image_size, wanted, strict=True)]
        found = cxcywh_to_xyxy(boxes[query].float())
        found = found * image_scale(scale, found)
    return Instances(wanted, pred_boxes=Boxes(found), scores=scores, pred_classes=labels, pred_masks=masks[place])


def semantic_output(
    probability: Tensor,
    mask_logits: Tensor,
    image_size: tuple[int, int],
    wanted: tuple[int, int],
    *,
    resize_first: bool = True,
) -> Tensor:
    """The probability of each class in each pixel of one image, summed over the queries; it need not be below 1.

    Args:
        probability: (Q, P) of each query's classes.
        mask_logits, image_size, wanted: as for :func:`resize_masks`.
        resize_first: sum maps of the output size. False = sum maps of the padded size and resize the sum.

    Returns:
        Tensor: (P, *wanted), float32.
    """
    maps = resize_masks(mask_logits, image_size, wanted) if resize_first else _to_padded(mask_logits)
    total = torch.einsum("qc,qhw->chw", probability, maps.sigmoid_())
    return total if resize_first else sem_seg_postprocess(total, image_size, *wanted)


def panoptic_output(
    scores: Tensor,
    labels: Tensor,
    mask_logits: Tensor,
    image_size: tuple[int, int],
    wanted: tuple[int, int],
    *,
    things: Collection[int],
    overlap_threshold: float,
) -> tuple[Tensor, list[dict]]:
    """One segment, or none, for each pixel of one image.

    A pixel's owner is the query of the highest score times mask probability; it gets the pixel if that probability is at
    least one half. A query of whose own pixels (probability at least one half) too few are left is dropped, and
    its pixels stay empty.

    Args:
        scores, labels: (n,) of the queries that are good enough, in the order of the queries.
        mask_logits: (n, h, w) of the same queries.
        image_size, wanted: as for :func:`resize_masks`.
        things: classes of which each query is a segment; of other classes all queries are one.
        overlap_threshold: least number of pixels owned, divided by that of the query's own pixels.

    Returns:
        (*wanted) int32 segment ids, 0 = none, and ``id``, ``isthing`` and ``category_id`` of each segment.
    """
    if not len(labels):
        return torch.zeros(wanted, dtype=torch.int32, device=labels.device), []
    maps = resize_masks(mask_logits, image_size, wanted).sigmoid_()
    own = (maps >= 0.5).flatten(1).sum(1)
    owner = (scores[:, None, None] * maps).argmax(0)
    sure = maps.gather(0, owner[None])[0] >= 0.5
    owned, left = (x.bincount(minlength=len(labels)) for x in (owner.flatten(), owner[sure]))
    segments, ids, of_stuff = [], [], {}
    for label, mine, all_own, both in torch.stack([labels, owned, own, left], 1).tolist():
        kept = both > 0 and mine / all_own >= overlap_threshold
        if kept and label not in of_stuff:
            segments.append({"id": len(segments) + 1, "isthing": label in things, "category_id": label})
            if label not in things:
                of_stuff[label] = len(segments)
        ids.append(of_stuff.get(label, len(segments)) if kept else 0)
    of_query = torch.tensor(ids, dtype=torch.int32, device=owner.device)
    return of_query[owner] * sure, segments


class MaskPostprocess:
    """From the predictions of a batch to Detectron2's output dicts.

    Args:
        outputs: any of "instances", "panoptic_seg", "sem_seg". Beside a panoptic output, instances are things only; a
            semantic output alone is summed at the padded size (see :func:`semantic_output`).
        num_classes: P.
        things: numbers of the classes that are things; empty = all.
        top_k: instances of an image.
        object_threshold: queries of at most this class probability are left out of the panoptic output.
        overlap_threshold: see :func:`panoptic_output`.
        score_by_mask: see :func:`instance_output`.
        temperature: T of softmax(sigmoid / T), the class probabilities of sigmoid heads in panoptic and semantic outputs.
        nms_iou: of the boxes of instances, see :func:`~.postprocess.without_duplicates`; 1 = no NMS.
    """

    def __init__(
        self,
        outputs: Collection[str],
        num_classes: int,
        things: Collection[int] = (),
        *,
        top_k: int = 100,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        score_by_mask: bool = True,
        temperature: float = 0.06,
        nms_iou: float = 1.0,
    ):
        self.outputs, self.num_classes, self.top_k = tuple(outputs), num_classes, top_k
        self.things = frozenset(things or range(num_classes))
        self.object_threshold, self.overlap_threshold = object_threshold, overlap_threshold
        self.score_by_mask, self.temperature, self.nms_iou = score_by_mask, temperature, nms_iou

    def __call__(self, predictions: Predictions, batched_inputs: list[dict]) -> list[dict]:
        """Outputs of the last prediction set, in pixels of the wanted output size.

        Args:
            predictions: with masks; boxes, where there are any, relative to the padded image.
            batched_inputs: the images, and the ``height`` and ``width`` of the output where they are given.

        Returns:
            One dict an image: ``instances`` (see :func:`instance_output`), ``panoptic_seg`` (see :func:`panoptic_output`),
            ``sem_seg`` (see :func:`semantic_output`).

        Raises:
            FloatingPointError: predictions are not finite.
        """
        masks = predictions.mask_logits(-1)
        with after_inference(masks.device.type):
            logits = predictions.logits[-1].float()
            boxes = [None] * len(logits) if predictions.boxes is None else predictions.boxes[-1]
            require_finite([logits, masks, *([] if predictions.boxes is None else [boxes])], batched_inputs)
            return [
                {name: self._make[name](self, *found, size_of(x), output_size(x)) for name in self.outputs}
                for *found, x in zip(logits, masks, boxes, batched_inputs, strict=True)
            ]

    def start(self, predictions: Predictions, batched_inputs: list[dict]) -> list[dict]:
        """:meth:`__call__`; how many pixels and segments there are must be known before the next image."""
        return self(predictions, batched_inputs)

    @staticmethod
    def finish(outputs: list[dict]) -> list[dict]:
        """What :meth:`start` has given."""
        return outputs

    def _instances(self, logits, masks, boxes, image_size, wanted) -> Instances:
        found = instance_output(
            logits,
            masks,
            boxes,
            image_size,
            wanted,
            num_classes=self.num_classes,
            top_k=self.top_k,
            classes=self.things if "panoptic_seg" in self.outputs else None,
            score_by_mask=self.score_by_mask,
        )
        return without_duplicates(found, self.nms_iou)

    def _panoptic(self, logits, masks, _, image_size, wanted) -> tuple[Tensor, list[dict]]:
        best = (logits.sigmoid() if self._sigmoid(logits) else logits.softmax(-1)).max(-1)
        kept = (best.values > self.object_threshold) & (best.indices < self.num_classes)
        scores = self._of_pixels(logits).max(-1)
        return panoptic_output(
            scores.values[kept],
            scores.indices[kept],
            masks[kept],
            image_size,
            wanted,
            things=self.things,
            overlap_threshold=self.overlap_threshold,
        )

    def _semantic(self, logits, masks, _, image_size, wanted) -> Tensor:
        first = len(self.outputs) > 1
        return semantic_output(self._of_pixels(logits), masks, image_size, wanted, resize_first=first)

    _make = {"instances": _instances, "panoptic_seg": _panoptic, "sem_seg": _semantic}

    def _sigmoid(self, logits: Tensor) -> bool:
        return logits.shape[-1] == self.num_classes

    def _of_pixels(self, logits: Tensor) -> Tensor:
        """(Q, P) class probabilities in panoptic and semantic outputs."""
        probability = class_probability(logits, self.num_classes)
        return (probability / self.temperature).softmax(-1) if self._sigmoid(logits) else probability


def build_postprocess(cfg) -> Postprocess | MaskPostprocess:
    """The post-processing of a config, with masks where ``MODEL.DN_DETR.MASK.ENABLED``.

    Raises:
        ConfigError: outputs that there are not, or things that are no classes of the model.
    """
    root, top_k, nms_iou = cfg.MODEL.DN_DETR, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.TEST.NMS
    node = root.MASK
    if not node.ENABLED:
        return Postprocess(select_best if root.LOSS.CLASS_LOSS == "softmax" else select_top, top_k, nms_iou)
    if not node.OUTPUTS or set(node.OUTPUTS) - set(OUTPUTS):
        raise ConfigError(f"MODEL.DN_DETR.MASK.OUTPUTS must be any of {list(OUTPUTS)}, got {node.OUTPUTS!r}")
    if wrong := [x for x in node.THING_CLASSES if type(x) is not int or not 0 <= x < root.NUM_CLASSES]:
        raise ConfigError(
            f"MODEL.DN_DETR.MASK.THING_CLASSES must be classes of the model, 0 to {root.NUM_CLASSES - 1}, got {wrong[0]!r}"
        )
    return MaskPostprocess(
        node.OUTPUTS,
        root.NUM_CLASSES,
        node.THING_CLASSES,
        top_k=top_k,
        object_threshold=node.OBJECT_THRESHOLD,
        overlap_threshold=node.OVERLAP_THRESHOLD,
        score_by_mask=node.SCORE_BY_MASK,
        temperature=node.TEMPERATURE,
        nms_iou=nms_iou,
    )
