"""How well does a model restore noised objects?

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

from ..boxes import cxcywh_to_xyxy
from ..denoising import QueryDenoising
from ..errors import ConfigError
from ..modeling.outputs import ForwardOutputs
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
                    _count_restored(outputs, classes) for outputs in renoised_passes(bare, batch, noise, scale, [seed])
                ]
    sums = gather([sums])
    if not comm.is_main_process():
        return {}
    return {scale: _average([row for part in sums for row in part[scale]]) for scale in scales}


def denoising_of(model: nn.Module) -> QueryDenoising:
    """The model's denoising, through DistributedDataParallel; raises ConfigError if it has none."""
    denoising = require_queries(model).denoising
    if denoising is None:
        raise ConfigError(
            "the model has no denoising (MODEL.DN_DETR.DENOISING.NAME is ''), so there are no denoising queries to look at; "
            "take a config with denoising"
        )
    return denoising


def renoised_passes(
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
