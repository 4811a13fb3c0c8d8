"""Which query answers for which ground truth, on fixed images: the raw material of the metrics in ``instability.py``.

Shapes: K decoder layers, Q matching queries, n ground truths of an image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import DatasetError
from ..modeling.batch import matching_objects
from ..modeling.outputs import ForwardOutputs
from ..structures import Assignment
from .model_state import gather, preserve_state, require_queries


@dataclass
class ProbedImage:
    """What a model makes of one annotated image.

    Attributes:
        image_id: of the data set, as text.
        matched: (K, Q) int16; [k, q] is the ground truth that the matcher pairs with query q at layer k, or -1 (the
            vector V of DN-DETR Sec. 3.2).
        anchors: (Q, 4) float32 initial boxes of the matching queries, cxcywh in [0, 1]; 0.5 where a query has none. None in
            models without boxes (Mask2Former).
        boxes: (n, 4) float32 ground truth, cxcywh in [0, 1]; of the padded image in models with masks, as anchors are.
        areas: (n,) float32 areas of the boxes in square pixels of the original image.
    """

    image_id: str
    matched: np.ndarray
    anchors: np.ndarray | None
    boxes: np.ndarray
    areas: np.ndarray


def probe(model: nn.Module, loader: Iterable[list[dict]]) -> list[ProbedImage]:
    """Runs the model and its matcher over annotated images; training goes on afterwards as if nothing had been.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`, in any mode, with or without DistributedDataParallel.
        loader: batches with ``instances``, see :func:`dn_detr_d2.data.build_probe_loader`; no batch is drawn outside of
            the function.

    Returns:
        list: the images of all ranks, sorted by id, on rank 0; [] on the others.

    Raises:
        FloatingPointError: the model predicts NaN or Inf.
        DatasetError: no image has a box that can be used.
    """
    images = []
    with preserve_state(require_queries(model)) as bare:
        for batch in loader:
            outputs = bare.forward_outputs(batch)
            assignment = bare.matcher(outputs.matching, outputs.targets)
            matched = _matched(assignment, outputs.matching.logits.shape[:3])
            images += [_probed(record, outputs, i, matched[:, i]) for i, record in enumerate(batch)]
    images = _of_one_length(sorted(gather(images), key=lambda image: image.image_id))
    if comm.is_main_process():
        require_objects(sum(len(image.boxes) for image in images))
    return images


def _of_one_length(images: list[ProbedImage]) -> list[ProbedImage]:
    """With -1 and anchors of 0.5 for queries that an image lacks: two stages give it no more of them than it has cells."""
    most = max((image.matched.shape[1] for image in images), default=0)
    for image in images:
        wanting = most - image.matched.shape[1]
        image.matched = np.pad(image.matched, ((0, 0), (0, wanting)), constant_values=-1)
        if image.anchors is not None:
            image.anchors = np.pad(image.anchors, ((0, wanting), (0, 0)), constant_values=0.5)
    return images


def require_objects(count: int) -> None:
    """Raises DatasetError if there are none: a mean over nothing is no measurement."""
    if count == 0:
        raise DatasetError(
            "none of the images to look at has a usable box (crowds and degenerate boxes do not count), so there is nothing "
            "to measure; take more images or another data set"
        )


def _matched(assignment: Assignment, shape: tuple[int, int, int]) -> np.ndarray:
    """(K, N, Q) index of the ground truth of each query, -1 without one."""
    image, query, target = (x.cpu().numpy() for x in (assignment.image, assignment.query, assignment.target))
    matched = np.full(shape, -1, np.int16)
    matched[np.arange(shape[0])[:, None], image, query] = target
    return matched


def _probed(record: dict, outputs: ForwardOutputs, i: int, matched: np.ndarray) -> ProbedImage:
    queries, count = matched.shape[1], outputs.targets.counts[i]
    boxes = _to_numpy(outputs.targets.boxes[i, :count])
    objects = matching_objects(record)
    scale = record["height"] * record["width"] / np.prod(objects.image_size)
    areas = _to_numpy(objects.gt_boxes.area()) * np.float32(scale)
    anchors = None if outputs.matching.boxes is None else _to_numpy(outputs.queries.boxes[i, -queries:])
    return ProbedImage(str(record["image_id"]), matched, anchors, boxes, areas)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
