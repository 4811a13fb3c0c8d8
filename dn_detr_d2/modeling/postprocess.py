"""From predictions to Instances in pixels."""

from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, image_scale


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
    chosen = boxes.float()[index // num_classes]
    return Instances(
        image_size,
        pred_boxes=Boxes(cxcywh_to_xyxy(chosen) * image_scale(image_size, chosen)),
        scores=scores,
        pred_classes=index % num_classes,
    )


def stack_top(logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]], top_k: int) -> list[Instances]:
    """:func:`select_top` for a batch: logits (N, Q, P), boxes (N, Q, 4)."""
    return [select_top(*image, size, top_k) for *image, size in zip(logits, boxes, image_sizes, strict=True)]
