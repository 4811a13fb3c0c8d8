"""Image files: where they may lie, what they may be, and their pixels.

Everything that opens an image for training, evaluation or a check comes through here, so that
``dn-detr check`` refuses what a training would refuse. A size is (height, width) in pixels.
"""

import os
import stat
import struct
import unicodedata
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from ..errors import DatasetError
from .issues import MAX_PIXELS, Issue

# Decoders that may run, whatever the file is called (JPEG's reads MPO too, which phones write into .jpg). Of several
# pictures in one file the first is read.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# More than 8 bits a channel; Pillow's conversion to RGB saturates them, nearly everything would be white.
DEEP_MODES = ("I", "F")
# Sides of an image that is drawn larger, in pixels: the shorter one, and what the longer one must not exceed for it.
DRAWN_SIDE, MAX_DRAWN_SIDE = 480, 4800
PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"
ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # what Pillow raises on damaged files


@dataclass(frozen=True)
class ImageFacts:
    """What a file holds: ``size`` (height, width) after EXIF orientation, Pillow's ``mode``, EXIF ``orientation`` 1 to 8."""

    size: tuple[int, int]
    mode: str
    orientation: int


class ImageFolder:
    """Finds files below a folder, and nothing outside it.

    Args:
        folder: may be a link itself; links inside it must not lead out.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._root = os.path.realpath(folder)
        self._parents = {}  # folder as written: whether it lies inside, each looked up once

    def find(self, file_name: str) -> str:
        """The path of a regular file.

        Raises:
            DatasetError: ``file_name`` leads out of the folder, or there is no such file; ``kind`` says which.
        """
        path = os.path.join(self.folder, file_name)
        inside, found = self._look(path, file_name)
        if not found and not file_name.isascii():  # macOS writes accents as characters of their own
            for form in ("NFC", "NFD"):
                other = unicodedata.normalize(form, file_name)
                if other != file_name and self._look(os.path.join(self.folder, other), other) == (True, True):
                    return os.path.join(self.folder, other)
        if not inside and os.path.islink(path):
            raise DatasetError(
                f"image file {file_name!r} is a link to {os.path.realpath(path)}, outside the image folder {self.folder}; "
                "put the file in place of the link, or name a folder that holds both",
                Issue.OUTSIDE,
            )
        if not inside:
            raise DatasetError(
                f"image file {file_name!r} lies outside the image folder {self.folder}; put it there, or name the folder "
                "that holds it",
                Issue.OUTSIDE,
            )
        if not found:
            raise DatasetError(f"image file {path!r} does not exist or is no regular file", Issue.MISSING)
        return path

    def _look(self, path: str, file_name: str) -> tuple[bool, bool]:
        """Whether a path lies inside, and whether a regular file is there."""
        inside = not os.path.isabs(file_name) and ".." not in Path(file_name).parts
        try:
            inside = self._inside(path)
            return inside, inside and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return inside, False

    def with_slashes(self, file_name: str) -> str | None:
        """``file_name`` with / for each back slash, if it has some and only the other is a file of the folder."""
        changed = file_name.replace("\\", "/")
        return changed if changed != file_name and self.has(changed) and not self.has(file_name) else None

    def has(self, file_name: str) -> bool:
        """Whether :meth:`find` finds a file."""
        try:
            self.find(file_name)
        except DatasetError:
            return False
        return True

    def relative(self, file_name: str) -> str:
        """The path below the folder of a file that :meth:`find` finds, where ``file_name`` is an absolute one."""
        real = os.path.join(os.path.realpath(os.path.dirname(file_name)), os.path.basename(file_name))
        return os.path.relpath(real, self._root) if os.path.isabs(file_name) and self._below(real) else file_name

    def _inside(self, path: str) -> bool:
        """Decided by where the path leads, after links and "..", not by how it is written."""
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return self._below(os.path.realpath(path))
        if parent not in self._parents:
            self._parents[parent] = self._below(os.path.realpath(parent))
        return self._parents[parent]

    def _below(self, real: str) -> bool:
        return os.path.commonpath([self._root, real]) == self._root


@contextmanager
def open_image(file_name: str):
    """Yields an opened ``PIL.Image`` whose header is acceptable; no pixel has been decoded.

    Raises:
        DatasetError: the file is missing or no regular file (a pipe, a device), has none of ``FORMATS``, more than
            ``MAX_PIXELS`` or more than 8 bits a channel, or reading it fails, also inside the ``with`` block; it names the
            file, ``kind`` is an :class:`~.issues.Issue`.
    """
    with _explained(file_name):
        path = detection_utils.PathManager.get_local_path(file_name)
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block until something is written
            raise DatasetError(f"image {file_name} is no regular file; put a file there, or take it out", Issue.MISSING)
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            _check_header(image, file_name)
            yield image


@contextmanager
def _explained(file_name: str):
    """Whatever Pillow raises becomes a DatasetError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DatasetError(f"image {file_name} does not exist", Issue.MISSING) from None
    except Image.UnidentifiedImageError:
        raise DatasetError(
            f"image {file_name} cannot be read as any of {', '.join(FORMATS)}; convert it, or take it out of the data set",
            Issue.NOT_AN_IMAGE,
        ) from None
    except DatasetError:
        raise
    except ERRORS as error:
        kind = Issue.TOO_LARGE if isinstance(error, Image.DecompressionBombError) else Issue.DAMAGED
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"image {file_name} cannot be read: {reason}; repair it or take it out of the data set", kind
        ) from error


def _check_header(image: Image.Image, file_name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DatasetError(
            f"image {file_name} has {width}x{height} pixels, more than the {MAX_PIXELS} allowed; shrink it or cut it",
            Issue.TOO_LARGE,
        )
    _check_depth(image, file_name)


def _check_depth(image: Image.Image, file_name: str) -> None:
    if image.mode.split(";")[0] in DEEP_MODES:
        raise DatasetError(
            f"image {file_name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits, with the range "
            "of values that matters",
            Issue.DEEP,
        )


def _compare_sums(image: Image.Image) -> None:
    """Compares the check sums of a PNG, which Pillow leaves out for pixels; raises OSError. Other formats have none."""
    if image.format != "PNG":
        return
    file, place = image.fp, image.fp.tell()
    file.seek(len(PNG_BEGINNING))
    kind = b""
    while kind != b"IEND" and (head := file.read(8)):
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        body = file.read(length + 4)
        if len(body) < length + 4 or zlib.crc32(body[:-4], zlib.crc32(kind)) != int.from_bytes(body[-4:], "big"):
            raise OSError(f"the check sum of its part {kind.decode('latin-1')!r} does not fit")
    file.seek(place)


def read_image(
    file_name: str, image_format: str, check_size: Callable[[tuple[int, int]], None] | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 pixels, EXIF orientation applied; raises DatasetError with the file's name, see open_image.

    Grey, palette and CMYK become colours; an alpha channel is left out, not blended. ``check_size`` is called with what the
    header says before a pixel is decoded: a damaged header may speak of an image that takes seconds and a gigabyte.
    """
    with open_image(file_name) as image:
        _compare_sums(image)  # first, because Pillow decodes a PNG to find its EXIF block
        if check_size is not None:
            check_size(_size(image))
        turned = detection_utils._apply_exif_orientation(image)
        same = turned.mode == image_format == "RGB"  # Pillow would convert it into a copy of itself
        return detection_utils.convert_PIL_to_numpy(turned, None if same else image_format)


def picture_pixels(image: Image.Image, name: str, image_format: str) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an opened image, as :func:`read_image` gives those of a file; ``name`` is for errors.

    Raises:
        DatasetError: it cannot be decoded, or has more than 8 bits a channel. Its size is the caller's affair.
    """
    with _explained(name):
        _check_depth(image, name)
        return detection_utils.convert_PIL_to_numpy(detection_utils._apply_exif_orientation(image), image_format)


def read_map(file_name: str, modes: tuple[str, ...], what: str) -> np.ndarray:
    """The pixels of a file as they are, numbers rather than colours.

    Args:
        file_name: of the map.
        modes: of Pillow that it may have.
        what: says what a map of another mode is not.

    Raises:
        DatasetError: another mode, or see :func:`open_image`.
    """
    with open_image(file_name) as image:
        _compare_sums(image)
        if image.mode not in modes:
            raise DatasetError(f"{file_name} has mode {image.mode}; {what}", Issue.OTHER_MODE)
        return np.asarray(image)


def image_facts(file_name: str) -> ImageFacts:
    """What a file holds, after every pixel has been decoded as for a training; raises DatasetError, see open_image."""
    with open_image(file_name) as image:
        _compare_sums(image)
        mode, orientation = image.mode, _orientation(image)
        turned = detection_utils._apply_exif_orientation(image)
        detection_utils.convert_PIL_to_numpy(turned, "RGB")
        return ImageFacts((turned.height, turned.width), mode, orientation)


def image_size(file_name: str) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone; raises DatasetError, see open_image."""
    with open_image(file_name) as image:
        return _size(image)


def drawing_scale(size: tuple[int, int]) -> float:
    """By how much an image of this size is drawn larger, so that the labels on it can be read; 1 or more."""
    return max(1.0, min(DRAWN_SIDE / min(size), MAX_DRAWN_SIDE / max(size)))


def _size(image: Image.Image) -> tuple[int, int]:
    return image.size if _orientation(image) >= 5 else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Detectron2 too reads an image whose EXIF block is broken as if it had none
        return 1
    return found if found in range(1, 9) else 1
