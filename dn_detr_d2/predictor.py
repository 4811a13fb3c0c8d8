"""Detectron2's predictor for any source of images, with safe reading of weights: what an application uses."""

from .utils import needs_detectron2  # noqa: F401

# isort: split
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances

from .checkpoint.checkpointer import check_named, classes_of_weights, load_weights
from .config.validation import check_device
from .data import ResizeShortestEdge, class_number
from .data.mapper import has_queries
from .errors import ConfigError, UserError
from .inference import accelerate, prepared, settle
from .sources import as_bgr, expand
from .structures import map_by_size
from .tiling import with_tiles


class Predictor(DefaultPredictor):
    """Images in, their detections out: one by a call, many by :meth:`predict`. Threads may share one predictor.

    DefaultPredictor unpickles a ``.pkl`` file, and with it runs what the file says, before any model sees the weights; this
    one reads every file through :func:`dn_detr_d2.checkpoint.read_checkpoint`.

    Args:
        cfg: a complete config, see :func:`dn_detr_d2.setup_cfg`; all of ``MODEL.WEIGHTS`` is loaded, with
            ``MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY`` its moving average. With ``TEST.TILE.SIZE`` images are looked at in
            tiles. ``NUM_CLASSES: auto`` takes the classes of the weights.
        device: where the model runs; None = ``MODEL.DEVICE``.
        half: the 16-bit precision of that device, instead of ``TEST.AMP``: "fp16" on a GPU, "bf16" on a CPU.

    Raises:
        CheckpointError: the weights are not named, missing, damaged, hostile, or do not fit the model.
        ConfigError: the device is not there, or 16 bits would be slower on it.
    """

    def __init__(self, cfg, *, device: str | torch.device | None = None, half: bool = False):
        cfg = cfg.clone()
        cfg.defrost()
        if device is not None:
            cfg.MODEL.DEVICE = str(device)
        if half:
            cfg.TEST.AMP = "bf16" if cfg.MODEL.DEVICE == "cpu" else "fp16"
        check_device(cfg)
        check_named(cfg)
        cfg.merge_from_list(classes_of_weights(cfg))
        without_weights = cfg.clone()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg
        self.aug = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        load_weights(self.model, cfg)
        settle(self.model, cfg)
        accelerate(self.model, cfg)
        self._detector = with_tiles(prepared(self.model, cfg), cfg)

    def __call__(
        self,
        image,
        *,
        known: Instances | None = None,
        labels: Sequence[str | int] | None = None,
        rgb: bool = False,
    ) -> dict:
        """Detections of one image; see docs/prompting.md for what it may be told.

        Args:
            image: NumPy array (H, W, 3) of uint8 in BGR, as OpenCV reads it; or a path, a PIL image, a tensor (3, H, W) of
                uint8, see :func:`~dn_detr_d2.sources.as_bgr`.
            known: objects that need not be found, in pixels of this image: ``gt_boxes`` and ``gt_classes``, or
                ``pred_boxes`` and ``pred_classes``, so that detections can be given back. None or no objects = nothing is
                known.
            labels: names or numbers of the classes to look for; [] = none, None = all.
            rgb: the array or tensor is in RGB.

        Returns:
            dict: "instances", with boxes in pixels of this image; known objects are not among them. Of models with masks
            what ``MODEL.DN_DETR.MASK.OUTPUTS`` names: "instances" with ``pred_masks``, "panoptic_seg", "sem_seg".

        Raises:
            UserError: the image is something else, such as OpenCV's None for a file that it cannot read; known objects or
                labels that are not of this image or this model.
            DatasetError: the file cannot be read.
            ConfigError: the model cannot be told such things.
        """
        array = as_bgr(image, rgb)
        return self._detect([self._record(array, self._prompts(array, known, labels))])[0]

    def predict(
        self, source, *, batch_size: int | None = None, labels: Sequence[str | int] | None = None, rgb: bool = False
    ) -> Iterator[dict]:
        """Detections of many images, as from one call for each.

        Args:
            source: a path, a folder, a pattern such as ``"images/**/*.jpg"``, any image that a call takes, a list of all
                these, or an iterator over them, for example :class:`~dn_detr_d2.sources.Video`.
            batch_size: images read at a time, of which those of one size pass the model together; None =
                ``TEST.IMS_PER_BATCH``. Detections do not depend on it.
            labels, rgb: as in a call, the same for all images.

        Yields:
            dict: one an image, in their order, as a call returns it. An iterator is read when results are asked for, never
            more than ``batch_size`` images ahead.

        Raises:
            UserError, DatasetError: as in a call; what a source names must exist before the first image is looked at, but
                for iterators.
        """
        size = self.cfg.TEST.IMS_PER_BATCH if batch_size is None else batch_size
        if type(size) is not int or size < 1:
            raise UserError(f"batch_size must be a positive whole number, got {size!r}")
        return self._predict(expand(source), size, labels, rgb)

    def _predict(self, images: Iterable, size: int, labels: Sequence[str | int] | None, rgb: bool) -> Iterator[dict]:
        images = iter(images)
        while batch := [as_bgr(image, rgb) for image in islice(images, size)]:
            yield from self._detect([self._record(image, self._prompts(image, None, labels)) for image in batch])

    def to_supervision(self, found: dict):
        """Detections of one image as supervision.Detections, with masks where there are some.

        Args:
            found: what a call returned.

        Returns:
            ``xyxy`` in pixels, ``confidence``, ``class_id``, ``mask``, and ``data["class_name"]``: names of the classes, or
            their numbers where the config has no names.

        Raises:
            ConfigError: the package supervision is missing, or the model gives no instances.
        """
        return to_supervision(found, list(self.cfg.MODEL.DN_DETR.CLASS_NAMES))

    def require_prompts(self, kind: str) -> None:
        """Raises ConfigError where the model takes no prompts of a kind, "known" or "labels", whatever the image."""
        nothing = Instances((1, 1), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
        prompts = {"known": None, "labels": None} | {kind: nothing if kind == "known" else []}
        self._prompts(np.zeros((1, 1, 3), np.uint8), **prompts)

    def _prompts(self, image: np.ndarray, known: Instances | None, labels: Sequence[str | int] | None) -> dict:
        """What the model is told of an image, checked in pixels of the image."""
        prompts = {}
        if known is not None:
            prompts["known"] = _as_ground_truth(known)
        if labels is not None:
            prompts["labels"] = [class_number(label, self.cfg) for label in labels]
        if prompts and not hasattr(self.model, "check_prompts"):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE = {self.cfg.MODEL.META_ARCHITECTURE!r} takes neither known objects nor labels; "
                "call the predictor with the image alone"
            )
        if prompts:
            self.model.check_prompts([{"image": image.transpose(2, 0, 1)} | prompts])
        return prompts

    def _record(self, image: np.ndarray, prompts: dict) -> dict:
        """An image (H, W, 3) in BGR and its prompts as the detector takes them: resized, unless its tiles will be."""
        ordered = image[:, :, ::-1] if self.input_format == "RGB" else image
        record = {"height": image.shape[0], "width": image.shape[1], **prompts}
        if self.cfg.TEST.TILE.SIZE:
            pixels = np.ascontiguousarray(ordered.transpose(2, 0, 1))
            return record | {"image": torch.from_numpy(pixels)}
        resize = self.aug.get_transform(ordered)
        resized = resize.apply_image(ordered).astype("float32").transpose(2, 0, 1)
        if "known" in prompts:
            known = prompts["known"]
            boxes = resize.apply_box(known.gt_boxes.tensor.cpu().double().numpy())
            boxes = Boxes(torch.from_numpy(boxes).float())
            record["known"] = Instances(resized.shape[1:], gt_boxes=boxes, gt_classes=known.gt_classes.cpu())
        return record | {"image": torch.as_tensor(resized).to(self.cfg.MODEL.DEVICE)}

    @torch.no_grad()
    def _detect(self, records: list[dict]) -> list[dict]:
        """Detections of images, of which those of one size pass the model together, or all where that changes nothing."""
        node = self.cfg.TEST
        exact = has_queries(self.cfg) and (node.HIDE_PADDING or not node.PAD_TO_LARGEST)
        return map_by_size(self._detector, records, together=exact)  # the model groups them itself, and waits once


def to_supervision(found: dict, names: Sequence[str] = ()):
    """See :meth:`Predictor.to_supervision`; ``names`` of the classes, in order."""
    try:
        import supervision
    except ModuleNotFoundError:
        raise ConfigError("to_supervision() needs supervision; pip install 'dn_detr_d2[report]'") from None
    if "instances" not in found:
        raise ConfigError(
            f"to_supervision() converts instances, but the model gives {sorted(found)}; add 'instances' to "
            "MODEL.DN_DETR.MASK.OUTPUTS"
        )
    detections = supervision.Detections.from_detectron2(found)
    words = [names[i] if i < len(names) else str(i) for i in detections.class_id]
    detections.data["class_name"] = np.array(words, dtype=str)
    return detections


def _as_ground_truth(known: Instances) -> Instances:
    """Detections as ground truth; anything else as it is."""
    if not isinstance(known, Instances) or not known.has("pred_boxes") or not known.has("pred_classes"):
        return known
    return Instances(known.image_size, gt_boxes=known.pred_boxes, gt_classes=known.pred_classes)
