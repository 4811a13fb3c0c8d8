"""Images without annotations for semi-supervised training: which they are, and two views of each.

The teacher looks at the *weak* view, which is augmented as annotated images are; the model that is trained looks at the
*strong* one, whose colours are changed besides, and which lacks parts. Both have the same geometry, so that the teacher's
boxes hold in both (Liu et al., ICLR 2021).
"""

import logging
import os
from functools import cache
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from torch import Tensor
from torchvision.transforms import v2

from ..errors import ConfigError, DatasetError
from .coco_custom import check_files, class_names, dataset_path, load_images, require_files
from .images import image_size
from .label_files import SUFFIXES, Tally, walk
from .mapper import DetrDatasetMapper
from .registered import records_of
from .stream import TrainingStream

logger = logging.getLogger(__name__)

WEAK = "weak_image"  # key of the weak view in a record; annotated images have none
GREY = 127.0  # of the parts that the strong view lacks


def check_unlabeled(cfg) -> None:
    """Refuses an entry of ``DATASETS.UNLABELED`` that is neither a data set nor a folder with an image.

    Raises:
        ConfigError: there is no entry, or such a one.
        DatasetError: a folder without an image whose header can be read, files of a data set that are missing, or a file of
            ``DATASETS.COCO_JSON`` whose images are not listed as they should be.
    """
    if not cfg.DATASETS.UNLABELED:
        raise ConfigError("DATASETS.UNLABELED is empty; name data sets, or folders of images")
    for entry in cfg.DATASETS.UNLABELED:
        reader, *arguments = _reader_of(cfg, entry)
        if reader is _of_data_set:
            check_files(entry)
        elif reader is load_images:
            reader(*arguments)
        elif all(map(_fault_of, images_below(*arguments))):
            raise DatasetError(
                f"DATASETS.UNLABELED: the folder {arguments[0]} has no image that can be read ({', '.join(SUFFIXES)})"
            )


def _reader_of(cfg, entry) -> tuple:
    """What reads the images of an entry of ``DATASETS.UNLABELED``, and its arguments; raises ConfigError.

    A set of ``DATASETS.COCO_JSON`` that is not used otherwise has not been registered, because it needs no categories.
    """
    if not isinstance(entry, str):
        raise ConfigError(f"DATASETS.UNLABELED takes names of data sets and folders of images, got {entry!r}")
    listed = {name: files for name, *files in cfg.DATASETS.COCO_JSON}
    if entry in listed and entry not in DatasetCatalog:
        json_file, folder = map(dataset_path, listed[entry])
        require_files(entry, {"json_file": json_file, "image_root": folder})
        return load_images, json_file, folder
    folder = dataset_path(entry)
    if entry not in DatasetCatalog and folder.is_dir():
        return _of_folder, folder
    try:
        class_names(entry)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; an entry of DATASETS.UNLABELED may also be a folder of images, but there is none at {folder}"
        ) from None
    return _of_data_set, entry


def unlabeled_records(cfg) -> list[dict]:
    """Dataset dicts of the images of ``DATASETS.UNLABELED``, without what may be annotated in them.

    Images of folders whose header cannot be read are left out, those of ``DATASETS.TEST`` are not; both with a warning.

    Raises:
        ConfigError, DatasetError: see :func:`check_unlabeled`; or no image can be read.
    """
    records = []
    for entry in cfg.DATASETS.UNLABELED:
        reader, *arguments = _reader_of(cfg, entry)
        found = reader(*arguments)
        logger.info("DATASETS.UNLABELED: %s has %d images", entry, len(found))
        records += found
    if not records:
        raise DatasetError(f"no image of DATASETS.UNLABELED {tuple(cfg.DATASETS.UNLABELED)!r} can be read")
    _warn_of_tested(cfg, records)
    return records


def images_below(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, and links to such, in order.

    Hidden ones and links to folders are left out.
    """
    return [folder / name for name in walk(folder, SUFFIXES, Tally())]


def _fault_of(path: Path) -> str:
    """Why the header of an image cannot be read; "" where it can."""
    try:
        image_size(str(path))
    except DatasetError as error:
        return str(error)
    return ""


def _of_folder(folder: Path) -> list[dict]:
    left_out = Tally()
    everything = walk(folder, ("",), left_out)
    for line in left_out.lines():
        logger.info("%s: %s", folder, line)
    names = [name for name in everything if name.lower().endswith(SUFFIXES)]
    if others := len(everything) - len(names):
        logger.info("%s: %d files are left out, their names do not end in %s", folder, others, ", ".join(SUFFIXES))
    faults = {name: _fault_of(folder / name) for name in names}
    if damaged := [fault for fault in faults.values() if fault]:
        logger.warning("%s: %d images cannot be read and are left out, first: %s", folder, len(damaged), damaged[0])
    return [{"file_name": str(folder / name), "image_id": name} for name, fault in faults.items() if not fault]


def _of_data_set(name: str) -> list[dict]:
    kept = ("file_name", "image_id")  # no sizes: those of photographs that have been turned since would not fit
    return [{key: record[key] for key in kept if key in record} for record in records_of(name)]


def _warn_of_tested(cfg, records: list[dict]) -> None:
    """Says how many of the images are also evaluated on: what a detector has learned from says little about it."""
    files = {os.path.realpath(record["file_name"]) for record in records}
    for name in cfg.DATASETS.TEST:
        shared = sum(os.path.realpath(record["file_name"]) in files for record in records_of(name))
        if shared:
            logger.warning(
                "%d images of DATASETS.UNLABELED are also in DATASETS.TEST %s, whose results will look better than they "
                "are; keep the images of a test in a folder of their own",
                shared,
                name,
            )


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


class UnlabeledStream(TrainingStream):
    """A stream that passes over images that cannot be read: the next one in the order takes their place, with a warning.

    A folder that nobody has annotated is seldom checked, and a damaged file would otherwise end a training hours after its
    start. What comes instead depends on the position alone, so resuming stays bitwise.
    """

    def __getitem__(self, position: int) -> dict:
        """As its base does; raises DatasetError if no image at all can be read."""
        damaged = None
        for place in range(position, position + len(self.records)):
            try:
                return self.augmented(place, position)
            except DatasetError as error:
                damaged = damaged or error
                _warn_once(str(error))
        raise damaged


@cache
def _warn_once(fault: str) -> None:
    logger.warning("DATASETS.UNLABELED: %s; another image takes its place", fault)
