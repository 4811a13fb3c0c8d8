"""Does the model restore noised objects, and which annotations does it refuse to restore?

Shapes: K decoder layers, T near copies of objects in a batch (those that must restore one), P classes, N images, M ground
truths of the fullest image.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, image_scale
from ..denoising import QueryDenoising
from ..errors import ConfigError
from ..modeling.batch import denoised_objects
from ..modeling.outputs import ForwardOutputs
from ..modeling.postprocess import class_probability
from ..utils.distributed import device_of
from ..utils.rng import seed_all
from .model_state import gather, preserve_state, require_queries
from .probe import require_objects


@dataclass
class Restoration:
    """How well the denoising queries give back what was noised, at one scale of box noise.

    Attributes:
        accuracy: (K,) share of them whose best class is the annotated one.
        iou: (K,) mean IoU of their boxes with the annotated boxes; not a number in models without boxes.
        start_iou: mean IoU of the noised boxes themselves: what a model that does nothing reaches; the same.
        count: number of denoising queries.
    """

    accuracy: np.ndarray
    iou: np.ndarray
    start_iou: float
    count: int


@dataclass
class JudgedLabel:
    """What the model thinks of one annotation.

    Attributes:
        image_id: as in the data set.
        index: place of the annotation among those of its image.
        box: xyxy in pixels of the original image.
        label, suggested: annotated class and the likeliest other one, in [0, P).
        score: probability of ``suggested`` minus that of ``label``, in [-1, 1]; above 0 the model disagrees.
    """

    image_id: int | str
    index: int
    box: list[float]
    label: int
    suggested: int
    score: float


def measure_restoration(
    model: nn.Module, loader: Iterable[list[dict]], scales: Iterable[float], seed: int = 0
) -> dict[float, Restoration]:
    """Accuracy and IoU of the denoising queries against the scale of box noise, label noise being that of training.

    Args:
        model: with a denoising generator; in any mode, which it keeps.
        loader: annotated images, see :func:`dn_detr_d2.data.build_probe_loader`.
        scales: lambda1 = lambda2 of DN-DETR, or the reach of the near copies of DINO.
        seed: of the noise; each image has its own stream, so neither the order nor the number of processes matters.

    Returns:
        dict: {scale: Restoration} over the images of all ranks on rank 0, {} on the others.

    Raises:
        ConfigError: the model has no denoising.
        DatasetError: no image has a box that can be used.
    """
    scales, generator = list(scales), denoising_of(model).generator
    noise, classes = generator.label_noise_prob, generator.num_classes
    sums = {scale: [] for scale in scales}
    with preserve_state(model) as bare:
        for batch in loader:
            for scale in scales:
                sums[scale] += [
                    _count_restored(outputs, classes) for outputs in _renoised_passes(bare, batch, noise, scale, [seed])
                ]
    sums = gather([sums])
    if not comm.is_main_process():
        return {}
    return {scale: _average([row for part in sums for row in part[scale]]) for scale in scales}


def judge_labels(
    model: nn.Module, loader: Iterable[list[dict]], *, repeats: int = 4, box_noise_scale: float = 0.2, seed: int = 0
) -> list[JudgedLabel]:
    """Ranks annotations by how little the model believes their label.

    Every annotation becomes denoising queries whose label is drawn uniformly (label noise 1), so that their content says
    nothing about the annotation and the class must be read from the image. The class probabilities are averaged over all
    groups and repeats before they are compared.

    Args:
        model: with a denoising generator and at least two classes; in any mode, which it keeps.
        loader: annotated images, whose ``instances`` have ``gt_index``.
        repeats: how often fresh noise is drawn.
        box_noise_scale: see :func:`measure_restoration`.
        seed: of the noise.

    Returns:
        list: the annotations of all ranks, most suspicious first, on rank 0; [] on the others.

    Raises:
        ConfigError: the model has no denoising, or only one class.
    """
    classes = denoising_of(model).generator.num_classes
    if classes < 2:
        raise ConfigError("labels can only be judged where there are at least 2 classes, the model has 1")
    judged = []
    with preserve_state(model) as bare:
        for batch in loader:
            seeds = range(seed, seed + repeats)
            passes = list(_renoised_passes(bare, batch, 1.0, box_noise_scale, seeds))
            probability = torch.stack([_mean_probability(outputs, classes) for outputs in passes]).mean(0)  # (N, M, P)
            for record, labels in zip(batch, probability, strict=True):
                judged += _judge(record, labels.cpu())
    return sorted(gather(judged), key=lambda x: (-x.score, str(x.image_id), x.index))


def denoising_of(model: nn.Module) -> QueryDenoising:
    """The model's denoising, through DistributedDataParallel; raises ConfigError if it has none."""
    denoising = require_queries(model).denoising
    if denoising is None:
        raise ConfigError(
            "the model has no denoising (MODEL.DN_DETR.DENOISING.NAME is ''), so there are no denoising queries to look at; "
            "take a config with denoising"
        )
    return denoising


def _renoised_passes(
    bare: nn.Module, batch: list[dict], label_noise_prob: float, box_noise_scale: float, seeds: Iterable[int]
) -> Iterator[ForwardOutputs]:
    """One pass a seed; the noise depends on seed and image only."""
    denoising = bare.denoising.renoised(label_noise_prob=label_noise_prob, box_noise_scale=box_noise_scale)
    names = ",".join(str(record["image_id"]) for record in batch)
    for seed in seeds:
        seed_all(zlib.crc32(f"{seed}:{names}".encode("utf-8", "surrogatepass")), device_of(bare))
        yield bare.forward_outputs(batch, denoising)


def _count_restored(outputs: ForwardOutputs, num_classes: int) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Sums over the near copies of one pass: (K,) right classes, (K,) IoU, IoU before the decoder, copies."""
    pairs = outputs.noised.assignment
    query, target = pairs.query[0], pairs.target[0]
    clean = outputs.denoised.boxes[pairs.image, target]
    logits = outputs.denoising.logits[:, pairs.image, query, :num_classes]  # without "no object" of softmax heads
    right = logits.argmax(-1) == outputs.denoised.labels[pairs.image, target]
    if outputs.denoising.boxes is None:
        overlap, start = (
            torch.full_like(right, torch.nan, dtype=torch.float64),
            clean.new_full((len(pairs),), torch.nan),
        )
    else:
        overlap = torch.stack([_iou(boxes, clean) for boxes in outputs.denoising.boxes[:, pairs.image, query]])
        start = _iou(outputs.noised.boxes[pairs.image, query], clean)
    return right.sum(-1).cpu().numpy(), overlap.double().sum(-1).cpu().numpy(), start.double().sum().item(), len(pairs)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """(T,) IoU of (T, 4) cxcywh boxes, pair by pair."""
    return matched_pairwise_iou(Boxes(cxcywh_to_xyxy(a)), Boxes(cxcywh_to_xyxy(b)))


def _average(rows: list[tuple[np.ndarray, np.ndarray, float, int]]) -> Restoration:
    right, overlap, start, count = (sum(column) for column in zip(*rows, strict=True))
    require_objects(count)
    return Restoration(right / count, overlap / count, start / count, count)


def _mean_probability(outputs: ForwardOutputs, num_classes: int) -> Tensor:
    """(N, M, P) class probabilities of the last layer, averaged over the near copies of each ground truth."""
    pairs = outputs.noised.assignment
    (n, m), probability = outputs.denoised.labels.shape, class_probability(outputs.denoising.logits[-1], num_classes)
    row = pairs.image * m + pairs.target[0]
    total = probability.new_zeros(n * m, probability.shape[-1]).index_add(
        0, row, probability[pairs.image, pairs.query[0]]
    )
    return (total / row.bincount(minlength=n * m).clamp(min=1)[:, None]).unflatten(0, (n, m))


def _judge(record: dict, probability: Tensor) -> list[JudgedLabel]:
    """The annotations of one image from its (M, P) class probabilities."""
    instances, judged = denoised_objects(record), []
    size = (record["height"], record["width"])
    boxes = instances.gt_boxes.tensor
    boxes = boxes / image_scale(instances.image_size, boxes) * image_scale(size, boxes)
    columns = (instances.gt_index.tolist(), boxes.tolist(), instances.gt_classes.tolist())
    for row, (index, box, label) in zip(probability, zip(*columns, strict=True), strict=False):  # the rest is padding
        others = row.clone()
        others[label] = -1
        score, suggested = others.max(0)
        judged.append(JudgedLabel(record["image_id"], index, box, label, suggested.item(), (score - row[label]).item()))
    return judged
