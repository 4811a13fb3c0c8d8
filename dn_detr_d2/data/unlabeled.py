"""Images without annotations for semi-supervised training: which they are, and two views of each.

The teacher looks at the *weak* view, which is augmented as annotated images are; the model that is trained looks at the
*strong* one, whose colours are changed besides, and which lacks parts. Both have the same geometry, so that the teacher's
boxes hold in both (Liu et al., ICLR 2021).
"""

import logging

import torch
from detectron2.data import DatasetCatalog
from torch import Tensor
from torchvision.transforms import v2

from ..errors import ConfigError, DatasetError
from .coco_custom import class_names, dataset_path
from .mapper import DetrDatasetMapper
from .registered import records_of
from .semantic import IMAGE_ENDINGS

logger = logging.getLogger(__name__)

WEAK = "weak_image"  # key of the weak view in a record; annotated images have none
GREY = 127.0  # of the parts that the strong view lacks


def unlabeled_records(cfg) -> list[dict]:
    """Dataset dicts of the images of ``DATASETS.UNLABELED``, without what may be annotated in them.

    Raises:
        ConfigError: an entry is neither a data set nor a folder.
        DatasetError: there is no image.
    """
    records = []
    for entry in cfg.DATASETS.UNLABELED:
        found = _records_of_entry(entry)
        logger.info("DATASETS.UNLABELED: %s has %d images", entry, len(found))
        records += found
    if not records:
        raise DatasetError(
            f"DATASETS.UNLABELED {tuple(cfg.DATASETS.UNLABELED)!r} has no image; name data sets, or folders of images"
        )
    return records


def _records_of_entry(entry: str) -> list[dict]:
    folder = dataset_path(entry)
    if entry not in DatasetCatalog and folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
        return [{"file_name": str(path), "image_id": str(path.relative_to(folder))} for path in files]
    try:
        class_names(entry)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; an entry of DATASETS.UNLABELED may also be a folder of images, but there is none at {folder}"
        ) from None
    kept = ("file_name", "image_id", "height", "width")
    return [{key: record[key] for key in kept if key in record} for record in records_of(entry)]


class StrongAugmentation:
    """Colours, sharpness and gaps of the strong view; numbers of Unbiased Teacher (Liu et al., ICLR 2021, appendix).

    Brightness, contrast, saturation and hue are changed with probability 0.8, colours are taken out with 0.2, the image is
    blurred with 0.5, and three rectangles become grey with 0.7, 0.5 and 0.3. Draws from PyTorch's global generator.

    Args:
        image_format: channel order, "RGB" or "BGR".
    """

    def __init__(self, image_format: str):
        self.is_bgr = image_format == "BGR"
        self.augment = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.Lambda(blur)], p=0.5),
                v2.RandomErasing(p=0.7, scale=(0.05, 0.2), ratio=(0.3, 3.3), value=GREY),
                v2.RandomErasing(p=0.5, scale=(0.02, 0.2), ratio=(0.1, 6.0), value=GREY),
                v2.RandomErasing(p=0.3, scale=(0.02, 0.2), ratio=(0.05, 8.0), value=GREY),
            ]
        )

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> the same, changed."""
        return self.augment(image.flip(0)).flip(0) if self.is_bgr else self.augment(image)


def blur(image: Tensor) -> Tensor:
    """A Gaussian blur of standard deviation 0.1 to 2 pixels, cut off at 6 pixels, or where a small image ends."""
    reach = min(6, *(side - 1 for side in image.shape[-2:]))
    return v2.functional.gaussian_blur(image, 2 * reach + 1, float(0.1 + 1.9 * torch.rand(())))


class UnlabeledMapper(DetrDatasetMapper):
    """From a dataset dict to both views of its image: ``image`` is the strong one, ``weak_image`` the weak one.

    Args:
        cfg: the geometry is that of the training.
    """

    def __init__(self, cfg):
        super().__init__(cfg, is_train=True)
        self.prompts, self.masks = None, None
        self.strong = StrongAugmentation(self.image_format)

    def __call__(self, dataset_dict: dict) -> dict:
        """One dict with ``image`` and ``weak_image``, (3, H, W) uint8 each; raises DatasetError as its base does."""
        record = super().__call__(dataset_dict | {"annotations": []})
        del record["instances"]
        weak = record["image"]
        return record | {"image": self.strong(weak), WEAK: weak}
