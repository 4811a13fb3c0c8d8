"""Which annotations does a model not believe, and where does it see objects that are not annotated?

Four kinds of errors: a wrong class ("class"), a box that lies beside its object ("box"), a box around nothing ("spurious"),
an object without a box ("missing"). Shapes: N images, M annotated boxes and D detections of an image, P classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn
from torchvision.ops import nms

from ..boxes import cxcywh_to_xyxy, image_scale
from ..errors import ConfigError
from ..modeling.batch import denoised_objects, matching_objects
from ..modeling.outputs import ForwardOutputs
from ..modeling.pixel_decoder import padded_size
from ..modeling.postprocess import class_probability
from ..utils.distributed import unwrap
from .denoising_health import denoising_of, renoised_passes
from .model_state import gather, preserve_state

CLASS, BOX, SPURIOUS, MISSING = KINDS = ("class", "box", "spurious", "missing")
DUPLICATE_IOU = 0.5  # detections of whatever class that overlap a better one by more are the same object
NEAR_IOU = 0.3  # of a detection that speaks for an object at an annotated box


@dataclass
class Suspicion:
    """What a model thinks of one annotation, or of one place without.

    Attributes:
        kind: of error, one of :data:`KINDS`.
        image_id: as in the data set.
        score: the larger, the likelier an error: in [-1, 1] of a class, above 0 the model disagrees; in [0, 1] of a box.
        index: place of the annotation among those of its image; None where something is missing.
        box: annotated, xyxy in pixels of the original image; None where something is missing.
        label: annotated class in [0, P); None where something is missing.
        suggested: the likeliest other class of a wrong class, the likeliest class of what is missing; else None.
        suggested_box: where the model sees the object of a shifted box, or what is missing, in the same pixels; else None.
    """

    kind: str
    image_id: int | str
    score: float
    index: int | None = None
    box: list[float] | None = None
    label: int | None = None
    suggested: int | None = None
    suggested_box: list[float] | None = None


def kinds_for(model: nn.Module) -> list[str]:
    """What a model can judge: classes if it has two of them, boxes if it predicts them.

    Raises:
        ConfigError: the model has no denoising.
    """
    several = denoising_of(model).generator.num_classes > 1
    return [kind for kind in KINDS if (several if kind == CLASS else unwrap(model).decoder.BOXES)]


def judge_annotations(
    model: nn.Module,
    loader: Iterable[list[dict]],
    *,
    kinds: Iterable[str] | None = None,
    repeats: int = 4,
    box_noise_scale: float = 0.2,
    seed: int = 0,
) -> list[Suspicion]:
    """Ranks annotations, and places without, by how little the model believes them.

    For "class" and "box" every annotation becomes denoising queries whose label is drawn uniformly (label noise 1), so that
    their content says nothing about the annotation and class and box must be read from the image. What they restore is
    averaged over all groups and repeats.

    - class: probability of the likeliest other class minus that of the annotated one.
    - box: 1 minus the IoU of the annotated with the restored box.
    - spurious: 1 minus the best score of a detection that overlaps the annotated box by an IoU of at least 0.3.
    - missing: a detection's score times 1 minus its largest IoU with an annotated box, of detections that no better one
      overlaps by more than 0.5. Crowds are not known here.

    Of a model that is told of known objects (``DENOISING.KNOWN_FRACTION``) "class" and "box" judge the annotations of known
    classes, which are denoised, and the other kinds those of the classes that it looks for.

    Args:
        model: with a denoising generator; in any mode, which it keeps.
        loader: annotated images, whose ``instances`` have ``gt_index``.
        kinds: which errors to look for; None = :func:`kinds_for` the model.
        repeats: how often fresh noise is drawn.
        box_noise_scale: see :func:`~dn_detr_d2.diagnostics.measure_restoration`.
        seed: of the noise.

    Returns:
        list: by kind, in each the most suspicious first, of all ranks, on rank 0; [] on the others.

    Raises:
        ConfigError: a kind that is none, or that the model cannot judge; or the model has no denoising.
    """
    possible, classes = kinds_for(model), denoising_of(model).generator.num_classes
    kinds = possible if kinds is None else list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kinds of annotation errors are {', '.join(KINDS)}, got {kind!r}")
        if kind not in possible:
            lacks = f"at least 2 classes, and it has {classes}" if kind == CLASS else "a model that predicts boxes"
            raise ConfigError(
                f"errors of the kind {kind!r} need {lacks}; choose of {', '.join(possible) or 'no kinds'}"
            )
    found = []
    with preserve_state(model) as bare:
        for batch in loader:
            columns = [[None] * len(batch)] * 3
            if (CLASS in kinds or BOX in kinds) and any(len(denoised_objects(record)) for record in batch):
                passes = list(renoised_passes(bare, batch, 1.0, box_noise_scale, range(seed, seed + repeats)))
                columns[0] = torch.stack([_mean_probability(x, classes) for x in passes]).mean(0).cpu()  # (N, M, P)
                if BOX in kinds:
                    restored = torch.stack([_mean_boxes(x) for x in passes]).mean(0).cpu()  # (N, M, 4)
                    padded = padded_size(passes[0].memory)
                    columns[1] = [_of_image(x, padded, record) for x, record in zip(restored, batch, strict=True)]
            if SPURIOUS in kinds or MISSING in kinds:
                columns[2] = [x["instances"] for x in bare(batch)]
            for record, *seen in zip(batch, *columns, strict=True):
                found += [x for x in _judge(record, *seen) if x.kind in kinds]
    return sorted(gather(found), key=lambda x: (KINDS.index(x.kind), -x.score, str(x.image_id), x.index or 0))


def judge_labels(model: nn.Module, loader: Iterable[list[dict]], **settings) -> list[Suspicion]:
    """:func:`judge_annotations` of wrong classes alone."""
    return judge_annotations(model, loader, kinds=[CLASS], **settings)


def _mean_probability(outputs: ForwardOutputs, num_classes: int) -> Tensor:
    """(N, M, P) class probabilities of the last layer, averaged over the near copies of each ground truth."""
    return _mean_over_copies(outputs, class_probability(outputs.denoising.logits[-1], num_classes))


def _mean_boxes(outputs: ForwardOutputs) -> Tensor:
    """(N, M, 4) boxes of the last layer, cxcywh in [0, 1], averaged likewise."""
    return _mean_over_copies(outputs, outputs.denoising.boxes[-1].float())


def _mean_over_copies(outputs: ForwardOutputs, values: Tensor) -> Tensor:
    """(N, M, ...) means of (N, D, ...) values of denoising queries."""
    pairs = outputs.noised.assignment
    n, m = outputs.denoised.labels.shape
    row = pairs.image * m + pairs.target[0]
    total = values.new_zeros(n * m, values.shape[-1]).index_add(0, row, values[pairs.image, pairs.query[0]])
    return (total / row.bincount(minlength=n * m).clamp(min=1)[:, None]).unflatten(0, (n, m))


def _of_image(boxes: Tensor, padded: tuple[int, int] | None, record: dict) -> Tensor:
    """(M, 4) boxes cxcywh as parts of the image, where those of models with masks are parts of the padded image."""
    own = denoised_objects(record).image_size
    return boxes if padded is None else boxes * (image_scale(padded, boxes) / image_scale(own, boxes))


def _judge(
    record: dict, probability: Tensor | None, restored: Tensor | None, detected: Instances | None
) -> Iterable[Suspicion]:
    """All suspicions of one image.

    Args:
        record: of the image.
        probability, restored: (M, P) and (M, 4) of its annotations, padded at the end; None = not looked at.
        detected: in pixels of the original image; None likewise.
    """
    size = record["height"], record["width"]
    given, boxes = _annotations(record, denoised_objects(record))
    if probability is not None:
        for about, row in zip(given, probability, strict=False):  # the rest is padding
            others = row.clone()
            others[about["label"]] = -1
            best, suggested = others.max(0)
            score = (best - row[about["label"]]).item()
            yield Suspicion(CLASS, **about, suggested=suggested.item(), score=score)
    if restored is not None:
        restored = cxcywh_to_xyxy(restored[: len(given)]) * image_scale(size, restored)
        shifts = 1 - matched_pairwise_iou(Boxes(boxes), Boxes(restored))
        for about, box, shift in zip(given, restored.tolist(), shifts.tolist(), strict=True):
            yield Suspicion(BOX, **about, suggested_box=box, score=shift)
    if detected is not None:
        told = [_annotations(record, record["known"])[1]] if "known" in record else []
        given, boxes = _annotations(record, matching_objects(record))
        yield from _compare(record["image_id"], given, torch.cat([boxes, *told]), detected.to("cpu"))


def _annotations(record: dict, instances: Instances) -> tuple[list[dict], Tensor]:
    """What suspicions say of each annotation, and (M, 4) boxes in pixels of the original image."""
    boxes = instances.gt_boxes.tensor
    boxes = boxes / image_scale(instances.image_size, boxes) * image_scale((record["height"], record["width"]), boxes)
    columns = (instances.gt_index.tolist(), boxes.tolist(), instances.gt_classes.tolist())
    given = [
        {"image_id": record["image_id"], "index": index, "box": box, "label": label}
        for index, box, label in zip(*columns, strict=True)
    ]
    return given, boxes


def _compare(image_id: int | str, given: list[dict], boxes: Tensor, detected: Instances) -> Iterable[Suspicion]:
    """Annotations that no detection speaks for, and detections without annotation.

    Args:
        image_id: of the image.
        given: what may be spurious.
        boxes: of these, and behind them of objects that the model was told of, which are not missing.
        detected: in pixels of the original image.
    """
    scores, overlap = detected.scores, pairwise_iou(detected.pred_boxes, Boxes(boxes))  # (D, M)
    support = (scores[:, None] * (overlap >= NEAR_IOU)).amax(0) if len(scores) else torch.zeros(len(boxes))
    for about, best in zip(given, support[: len(given)].tolist(), strict=True):
        yield Suspicion(SPURIOUS, **about, score=1 - best)
    covered = overlap.amax(1) if len(boxes) else torch.zeros(len(scores))
    places, classes = detected.pred_boxes.tensor, detected.pred_classes
    for i in nms(places, scores, DUPLICATE_IOU).tolist():
        score, box = (scores[i] * (1 - covered[i])).item(), places[i].tolist()
        yield Suspicion(MISSING, image_id, suggested_box=box, suggested=classes[i].item(), score=score)
