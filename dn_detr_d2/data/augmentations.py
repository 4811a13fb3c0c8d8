"""Augmentations by the names of ``INPUT.AUGMENTATION``, of Detectron2's parts.

Their random numbers come from Python's and NumPy's global generators, which :mod:`.stream` seeds for each image.
"""

import numpy as np
from detectron2.data import transforms as T
from PIL import Image

from ..errors import ConfigError
from .segment_map import NOTHING

# Before a crop the longer side may be so many times the shorter one; a strip of 2 x 3000 would become 600 x 900,000.
MAX_STRETCH = 16
PADDING = 128.0  # grey, of images that are padded before they are normalised (Mask2Former)


class PlanarResize(T.ResizeTransform):
    """Detectron2's resize, the same pixels for less time: colour images of uint8 come out plane by plane.

    The result is an (H, W, 3) view of (3, H, W) memory, the order that a model takes. An image that a flip has turned into a
    view of itself backwards goes in as it was, and is turned by Pillow.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """The resized image; arrays of other types or channels as in Detectron2."""
        if img.dtype != np.uint8 or img.shape != (self.h, self.w, 3):
            return super().apply_image(img, interp)
        backwards = img.strides[1] < 0
        picture = Image.fromarray(img[:, ::-1] if backwards else img)
        if backwards:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        planes = np.empty((3, self.new_h, self.new_w), np.uint8)
        resized = picture.resize((self.new_w, self.new_h), self.interp if interp is None else interp)
        for plane, band in zip(planes, resized.split(), strict=True):
            plane[:] = np.asarray(band)
        return planes.transpose(1, 2, 0)


class _AtLeastOnePixel:
    """Mixed into a resize of Detectron2: a :class:`PlanarResize`, whose result has at least one pixel a side."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resize of an image (H, W, C)."""
        found = super().get_transform(image)
        if isinstance(found, T.ResizeTransform):  # a shortest edge of 0 keeps the size
            found = PlanarResize(found.h, found.w, max(found.new_h, 1), max(found.new_w, 1), found.interp)
        return found


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """Detectron2's, with at least one pixel a side."""


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """Detectron2's, with at least one pixel a side."""


class RandomCropByArea(T.RandomCrop_CategoryAreaConstraint):
    """Detectron2's, which looks at a semantic map; images without one are cropped anywhere."""

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> T.Transform:
        """The crop of an image (H, W, C) with its map (H, W)."""
        return self.crop_aug.get_transform(image) if sem_seg is None else super().get_transform(image, sem_seg)


def training_augmentations(cfg) -> dict[str, list[T.Augmentation]]:
    """``flips``, ``resizes`` and ``crops`` of :class:`.mapper.DetrDatasetMapper` for training."""
    node, flips = cfg.INPUT, []
    if node.RANDOM_FLIP != "none":
        if node.RANDOM_FLIP not in ("horizontal", "vertical", "both"):
            raise ConfigError(f"INPUT.RANDOM_FLIP must be none, horizontal, vertical or both, got {node.RANDOM_FLIP!r}")
        kinds = ["horizontal", "vertical"] if node.RANDOM_FLIP == "both" else [node.RANDOM_FLIP]
        flips = [T.RandomFlip(horizontal=kind == "horizontal", vertical=kind == "vertical") for kind in kinds]
    return {"flips": flips, "crops": []} | AUGMENTATIONS[node.AUGMENTATION](node)


def _detr(node) -> dict[str, list[T.Augmentation]]:
    """With equal chance a resize, or a resize, a crop and a resize."""
    crops = [
        ResizeShortestEdge(node.CROP.RESIZE, MAX_STRETCH * max(node.CROP.RESIZE), "choice"),
        T.RandomCrop(node.CROP.TYPE, tuple(node.CROP.SIZE)),
    ]
    return {"resizes": [_resize(node)], "crops": crops if node.CROP.ENABLED else []}


def _lsj(node) -> dict[str, list[T.Augmentation]]:
    """Large-scale jittering: a resize to a random scale of a square, and of the result a square, cropped or padded."""
    size = node.IMAGE_SIZE
    return {"resizes": [ResizeScale(node.MIN_SCALE, node.MAX_SCALE, size, size), _square(size)]}


def _semantic(node) -> dict[str, list[T.Augmentation]]:
    """A resize, a square crop, changes of the colours, and a square padded from it."""
    size = node.IMAGE_SIZE
    crop = RandomCropByArea("absolute", (size, size), node.CROP.SINGLE_CATEGORY_MAX_AREA, NOTHING)
    colours = [_colour_jitter(node.FORMAT)] if node.COLOR_AUG_SSD else []
    return {"resizes": [_resize(node), crop, *colours, _square(size)]}


AUGMENTATIONS = {"detr": _detr, "lsj": _lsj, "semantic": _semantic}


def _resize(node) -> T.Augmentation:
    return ResizeShortestEdge(node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)


def _square(size: int) -> T.Augmentation:
    return T.FixedSizeCrop((size, size), pad_value=PADDING, seg_pad_value=NOTHING)


def _colour_jitter(image_format: str) -> T.Transform:
    """SSD's changes of brightness, contrast, saturation and hue, from Detectron2's PointRend."""
    try:
        from detectron2.projects.point_rend import ColorAugSSDTransform  # brings OpenCV, which nothing else here needs
    except ImportError as error:
        raise ConfigError(
            f"INPUT.COLOR_AUG_SSD needs {error.name or error}; pip install opencv-python-headless, or set it to False"
        ) from None
    return ColorAugSSDTransform(img_format=image_format)
