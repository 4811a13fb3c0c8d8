"""What a detector is given to look at: files, folders, patterns, arrays, videos; as (H, W, 3) uint8 pixels in BGR."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data import read_image
from .data.images import picture_pixels
from .data.label_files import SUFFIXES
from .errors import DatasetError, UserError

FRAME_RATE = 30.0  # of cameras and files that do not say theirs
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def find_images(path: str | Path, what: str = "the image") -> list[Path]:
    """The file of that name, else the images of the folder, sorted, else the images that match the pattern, sorted.

    Args:
        path: a file of any name, a folder, or a pattern with ``*``, ``?``, ``[...]`` and ``**``, see :mod:`glob`. Of folders
            and patterns, files with a suffix of ``label_files.SUFFIXES`` count that are not hidden (``._a.jpg`` of macOS).
        what: names it in errors.

    Raises:
        UserError: a URL.
        DatasetError: nothing is there.
    """
    if _URL.match(str(path)):
        raise UserError(f"{what} {path} is a URL, which is not fetched; download the file and give its path")
    suffixes = ", ".join(SUFFIXES)
    if os.path.isdir(path):
        if found := _images_of(Path(path).iterdir()):
            return found
        raise DatasetError(f"{what} {path} holds no image ({suffixes})")
    if os.path.lexists(path):
        return [Path(path)]
    if glob.has_magic(str(path)):
        if found := _images_of(map(Path, glob.iglob(str(path), recursive=True))):
            return found
        raise DatasetError(f"{what} {path} matches no image ({suffixes})")
    raise DatasetError(f"{what} {path} does not exist")


def _images_of(paths: Iterable[Path]) -> list[Path]:
    return sorted(x for x in paths if x.suffix.lower() in SUFFIXES and not x.name.startswith("."))


def expand(source) -> Iterable:
    """The single images of a source, in order.

    Args:
        source: an image as :func:`as_bgr` takes it, a folder, a pattern, a list or tuple of all these, or an iterator, which
            is read one image at a time and may be endless.

    Raises:
        UserError, DatasetError: a path names nothing; of paths in an iterator when they are reached.
    """
    if isinstance(source, str | os.PathLike):
        return find_images(source)
    if isinstance(source, list | tuple):
        return [image for one in source for image in expand(one)]
    if isinstance(source, np.ndarray | torch.Tensor | Image.Image) or not isinstance(source, Iterable):
        return [source]
    return (image for one in source for image in expand(one))


def as_bgr(image, rgb: bool = False) -> np.ndarray:
    """One image as (H, W, 3) uint8 in BGR.

    Args:
        image: path of an image file; NumPy array (H, W, 3) or tensor (3, H, W) of uint8 in BGR; or a PIL image, whose mode
            says what it is. EXIF orientation is applied to files and PIL images.
        rgb: arrays and tensors are in RGB.

    Raises:
        UserError: something else, such as OpenCV's None for a file that it cannot read.
        DatasetError: a file or a PIL image that cannot be read, or has more than 8 bits a channel.
    """
    if isinstance(image, str | os.PathLike):
        found = find_images(image)
        if os.path.isdir(image) or len(found) > 1:
            raise UserError(f"{image} stands for {len(found)} images; predict() takes several, a call takes one")
        return read_image(str(found[0]), "BGR")
    if isinstance(image, Image.Image) and image.width * image.height:
        return picture_pixels(image, getattr(image, "filename", "") or f"(PIL, mode {image.mode})", "BGR")
    array = image
    if isinstance(image, torch.Tensor) and image.dim() == 3:
        array = image.detach().cpu().numpy().transpose(1, 2, 0)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[2:] != (3,) or not array.size:
        what = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        what += f" of size {image.size}" if isinstance(image, Image.Image) else ""
        raise UserError(
            "the image must be a path, a PIL image, a NumPy array (H, W, 3) or a tensor (3, H, W), both of uint8 in BGR "
            f"with H, W > 0, got {what}; cv2.imread returns None for a file that it cannot read"
        )
    return array[:, :, ::-1] if rgb else array


class Video:
    """The frames of a video file or a camera, read by OpenCV one at a time; as a context it is closed at the end.

    Iterating yields (H, W, 3) uint8 frames in BGR until there are no more.

    Args:
        source: path of a file, or number of a camera.

    Attributes:
        frame_rate: frames a second, ``FRAME_RATE`` if unknown.
        expected: number of frames that the file announces, 0 if unknown.
        read: number of frames read so far.

    Raises:
        UserError: OpenCV is missing, or a URL.
        DatasetError: there is no such file or camera, or no frame can be decoded.
    """

    def __init__(self, source: str | Path | int):
        cv2 = require_opencv("reading a video")
        if isinstance(source, int):
            what, out = f"the camera {source}", "connect one, or name a file with --video-input"
        else:
            if _URL.match(str(source)):
                raise UserError(
                    f"the video {source} is a URL, which is not fetched; download the file and give its path"
                )
            what, out = f"the video {source}", "convert it, for example with ffmpeg -i FILE out.mp4"
            if not os.path.isfile(source):
                raise DatasetError(f"{what} does not exist or is no file")
            source = str(source)
        self._capture = cv2.VideoCapture(source)
        self._next = self._capture.read()[1] if self._capture.isOpened() else None
        if self._next is None:
            self._capture.release()
            raise DatasetError(f"{what} cannot be read by OpenCV; {out}")
        rate, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_rate = float(rate) if 0 < rate < 1000 else FRAME_RATE
        self.expected = int(count) if isinstance(source, str) and count > 0 else 0
        self.read = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        while self._next is not None:
            frame = self._next
            self._next = None
            self.read += 1
            yield frame
            self._next = self._capture.read()[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._capture.release()


def require_opencv(purpose: str):
    """The module cv2; raises UserError where it is missing."""
    try:
        import cv2
    except ModuleNotFoundError:
        raise UserError(
            f"{purpose} needs OpenCV; pip install 'dn_detr_d2[demo]', or pip install opencv-python-headless"
        ) from None
    return cv2
