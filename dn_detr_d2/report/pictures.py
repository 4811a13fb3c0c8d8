"""Pictures of a report: the confusion matrix, the images with the best and the worst detections, noised boxes restored."""

from pathlib import Path

import numpy as np
import supervision as sv
from matplotlib.figure import Figure
from pycocotools import mask as mask_util

from ..data import read_image
from ..data.registered import records_of, register_data_sets
from ..errors import CheckpointError, ConfigError, DatasetError
from ..visualization.denoising import CROWDED, draw_refinement
from ..visualization.images import class_names, title_of, to_rgb
from ..visualization.models import load_model, observe_denoising, training_image
from ..visualization.style import PALETTE
from .detections import Evaluated, quality

SIDE = 480  # pixels of the longer side of a picture
MANY_CLASSES = 100  # with more, a matrix cannot be read
COLOURS = sv.ColorPalette.from_hex(list(PALETTE[:6]))


def confusion_figure(evaluated: Evaluated, score: float) -> Figure:
    """supervision's confusion matrix of the detections with at least a score, at IoU 0.5.

    Raises:
        DatasetError: too many classes, or nothing to count.
    """
    count = len(evaluated.classes)
    if count > MANY_CLASSES:
        raise DatasetError(f"{count} classes are too many for a picture; confusion_matrix.json has their numbers")
    from matplotlib import pyplot

    matrix = sv.ConfusionMatrix.from_detections(
        evaluated.found, evaluated.truths, evaluated.classes, conf_threshold=score, iou_threshold=0.5
    )
    if not matrix.matrix.any():
        raise DatasetError(f"there are neither objects nor detections with a score of {score:.2f} or more")
    side = int(np.clip(3 + 0.4 * count, 5, 16))
    with pyplot.rc_context({"backend": "agg"}):
        pyplot.switch_backend("agg")
        figure = matrix.plot(fig_size=(side + 1, side))
        pyplot.close(figure)
    return figure


def qualities(evaluated: Evaluated, score: float) -> list[tuple[float, int, int]]:
    """(quality, objects and detections, place) of all images with any, of detections of at least a score."""
    found = []
    for place, (truth, detections) in enumerate(zip(evaluated.truths, evaluated.found, strict=True)):
        shown = detections[detections.confidence >= score]
        if len(truth) or len(shown):
            found.append((quality(truth, shown), len(truth) + len(shown), place))
    return found


def side_by_side(evaluated: Evaluated, place: int, score: float) -> np.ndarray:
    """An image twice, (H, W, 3) uint8 RGB: with its objects, and with the detections of at least a score.

    Raises:
        DatasetError: the image cannot be read.
    """
    pixels = read_image(evaluated.records[place]["file_name"], "BGR")
    factor = SIDE / max(pixels.shape[:2])
    found = evaluated.found[place]
    found = found[found.confidence >= score]
    names = evaluated.classes
    labels = [f"{names[c]} {s:.2f}" for c, s in zip(found.class_id, found.confidence, strict=True)]
    halves = [
        _annotated(pixels, factor, evaluated.truths[place], [names[c] for c in evaluated.truths[place].class_id]),
        _annotated(pixels, factor, found, labels),
    ]
    gap = np.full((halves[0].shape[0], 8, 3), 255, np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], 1)[:, :, ::-1]


def _annotated(pixels: np.ndarray, factor: float, shown: sv.Detections, labels: list[str]) -> np.ndarray:
    """The image, resized, with boxes, labels, and masks where there are any."""
    if "segmentation" in shown.data and len(shown):
        masks = np.stack([mask_util.decode(x) for x in shown.data["segmentation"]]).astype(bool)
        shown = sv.Detections(shown.xyxy, mask=masks, class_id=shown.class_id, confidence=shown.confidence)
        pixels = sv.MaskAnnotator(COLOURS, opacity=0.4).annotate(pixels.copy(), shown)
    scene = sv.scale_image(pixels, factor)
    moved = sv.Detections(shown.xyxy * factor, class_id=shown.class_id, confidence=shown.confidence)
    scene = sv.BoxAnnotator(COLOURS, thickness=2).annotate(scene, moved)
    return sv.LabelAnnotator(COLOURS, text_scale=0.4, text_padding=3).annotate(scene, moved, labels)


def _telling_image(name: str) -> str | None:
    """Id of the image with the most objects that can still be told apart, of the first hundred; None if there is none."""
    counts = {str(x["image_id"]): len(x.get("annotations", [])) for x in records_of(name)[:100] if "image_id" in x}
    return max((x for x in counts if 0 < counts[x] <= CROWDED), key=counts.get, default=None)


def restored_boxes(cfg, weights: Path) -> Figure:
    """What the model makes of noised boxes, layer by layer, on an image of DATASETS.TEST, else of DATASETS.TRAIN.

    Raises:
        ConfigError: the model was trained without denoising queries, or has no boxes.
        CheckpointError, DatasetError: there are no weights, or no images.
    """
    if not cfg.MODEL.DN_DETR.DENOISING.NAME:
        raise ConfigError("the model is trained without denoising (MODEL.DN_DETR.DENOISING.NAME is '')")
    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist, so noised boxes cannot be restored")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (cfg.DATASETS.TEST or cfg.DATASETS.TRAIN)[:1]
    register_data_sets(cfg, cfg.DATASETS.TRAIN)
    record = training_image(cfg, _telling_image(cfg.DATASETS.TRAIN[0]))
    outputs = observe_denoising(load_model(cfg, str(weights)), record, 0)
    figure = draw_refinement(outputs, to_rgb(record["image"], cfg.INPUT.FORMAT), class_names(cfg))
    figure.suptitle(title_of(record["file_name"], str(weights)), fontsize=10)
    return figure
