"""Detectron2's predictor with safe reading: what an application uses on files that it has not made itself."""

from .utils import needs_detectron2  # noqa: F401

# isort: split
import numpy as np
from detectron2.engine import DefaultPredictor

from .checkpoint.checkpointer import load_weights
from .data import ResizeShortestEdge
from .errors import UserError


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

    def __call__(self, original_image: np.ndarray) -> dict:
        """Detections of one image.

        Args:
            original_image: (H, W, 3) uint8 in BGR, as OpenCV reads it.

        Returns:
            dict: "instances", with boxes in pixels of this image.

        Raises:
            UserError: it is something else, such as OpenCV's None for a file that it cannot read.
        """
        image = original_image
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"{type(image).__name__}"
            raise UserError(
                f"the image must be a NumPy array (H, W, 3) of uint8 in BGR with H, W > 0, got {what}; cv2.imread returns "
                "None for a file that it cannot read"
            )
        return super().__call__(original_image)
