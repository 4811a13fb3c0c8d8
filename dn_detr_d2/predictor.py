"""Detectron2's predictor with safe reading: what an application uses on files that it has not made itself."""

from .utils import needs_detectron2  # noqa: F401

# isort: split
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances

from .checkpoint.checkpointer import load_weights
from .data import ResizeShortestEdge, class_number
from .errors import ConfigError, UserError


class Predictor(DefaultPredictor):
    """One image in, its detections out.

    DefaultPredictor unpickles a ``.pkl`` file, and with it runs what the file says, before any model sees the weights; this
    one reads every file through :func:`dn_detr_d2.checkpoint.read_checkpoint`.

    Args:
        cfg: a complete config, see :func:`dn_detr_d2.setup_cfg`; all of ``MODEL.WEIGHTS`` is loaded, with
            ``MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY`` its moving average.

    Raises:
        CheckpointError: the weights are not named, missing, damaged, hostile, or do not fit the model.
    """

    def __init__(self, cfg):
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        self.aug = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        load_weights(self.model, cfg)

    def __call__(
        self,
        original_image: np.ndarray,
        *,
        known: Instances | None = None,
        labels: Sequence[str | int] | None = None,
    ) -> dict:
        """Detections of one image; see docs/prompting.md for what it may be told.

        Args:
            original_image: (H, W, 3) uint8 in BGR, as OpenCV reads it.
            known: objects that need not be found, in pixels of this image: ``gt_boxes`` and ``gt_classes``, or
                ``pred_boxes`` and ``pred_classes``, so that detections can be given back. None or no objects = nothing is
                known.
            labels: names or numbers of the classes to look for; [] = none, None = all.

        Returns:
            dict: "instances", with boxes in pixels of this image; known objects are not among them. Of models with masks
            what ``MODEL.DN_DETR.MASK.OUTPUTS`` names: "instances" with ``pred_masks``, "panoptic_seg", "sem_seg".

        Raises:
            UserError: the image is something else, such as OpenCV's None for a file that it cannot read; known objects or
                labels that are not of this image or this model.
            ConfigError: the model cannot be told such things.
        """
        image = original_image
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"{type(image).__name__}"
            raise UserError(
                f"the image must be a NumPy array (H, W, 3) of uint8 in BGR with H, W > 0, got {what}; cv2.imread returns "
                "None for a file that it cannot read"
            )
        prompts = {}
        if known is not None:
            prompts["known"] = _as_ground_truth(known)
        if labels is not None:
            prompts["labels"] = [class_number(label, self.cfg) for label in labels]
        if not prompts:
            return super().__call__(image)
        self._check(prompts, image)
        return self._predict(prompts, image)

    def _check(self, prompts: dict, image: np.ndarray) -> None:
        if not hasattr(self.model, "check_prompts"):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE = {self.cfg.MODEL.META_ARCHITECTURE!r} takes neither known objects nor labels; "
                "call the predictor with the image alone"
            )
        self.model.check_prompts([{"image": image.transpose(2, 0, 1)} | prompts])

    @torch.no_grad()
    def _predict(self, prompts: dict, image: np.ndarray) -> dict:
        """As DefaultPredictor, with prompts that are resized with the image."""
        resize = self.aug.get_transform(image)
        ordered = image[:, :, ::-1] if self.input_format == "RGB" else image
        resized = resize.apply_image(ordered).astype("float32").transpose(2, 0, 1)
        if "known" in prompts:
            known = prompts["known"]
            boxes = resize.apply_box(known.gt_boxes.tensor.cpu().double().numpy())
            boxes = Boxes(torch.from_numpy(boxes).float())
            prompts["known"] = Instances(resized.shape[1:], gt_boxes=boxes, gt_classes=known.gt_classes.cpu())
        inputs = {
            "image": torch.from_numpy(resized).to(self.cfg.MODEL.DEVICE),
            "height": len(image),
            "width": image.shape[1],
        }
        return self.model([inputs | prompts])[0]


def _as_ground_truth(known: Instances) -> Instances:
    """Detections as ground truth; anything else as it is."""
    if not isinstance(known, Instances) or not known.has("pred_boxes") or not known.has("pred_classes"):
        return known
    return Instances(known.image_size, gt_boxes=known.pred_boxes, gt_classes=known.pred_classes)
