"""What is wrong with the image files of a data set, and which of them another set has too.

    dn-detr check ANNOTATIONS.json IMAGE_FOLDER --val OTHER.json OTHER_FOLDER

Every image is decoded by the code that decodes it for training. A *row* is the index of an image in its list.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from ..utils.files import sha256_of
from .check import annotated_sizes, name_of
from .images import ImageFacts, ImageFolder, image_facts, image_size
from .issues import Issue
from .normalise import is_file_name, is_length
from .report import Report

MODES = {
    "RGB": None,
    "L": Issue.GREY,
    "1": Issue.GREY,
    "P": Issue.PALETTE,
    "RGBA": Issue.ALPHA,
    "LA": Issue.ALPHA,
    "PA": Issue.ALPHA,
    "RGBX": Issue.ALPHA,
    "RGBa": Issue.ALPHA,
    "La": Issue.ALPHA,
    "CMYK": Issue.CMYK,
}
# Issues of images that stop the training.
STOPPING = (
    Issue.MISSING,
    Issue.OUTSIDE,
    Issue.NOT_AN_IMAGE,
    Issue.DAMAGED,
    Issue.TOO_LARGE,
    Issue.DEEP,
    Issue.SIZE,
)


def check_images(
    images: list[dict],
    folder: str | Path,
    report: Report,
    unusable: dict[int, str] | None = None,
    *,
    links: bool = False,
) -> np.ndarray:
    """Decodes every image and adds what is wrong with it to ``report``.

    Args:
        images: entries of an annotation file.
        folder: what their ``file_name`` is relative to.
        report: is added to.
        unusable: {row of an image that training would stop at: the reason} is added to.
        links: whether files may be links that lead out of the folder: where it was searched and no annotation file has
            named them.

    Returns:
        numpy.ndarray: (I, 2) float64 (height, width) of the files; as annotated, or infinite, where one cannot be read.
    """
    sizes, find = annotated_sizes(images), Path(folder).joinpath if links else ImageFolder(folder).find
    unusable = {} if unusable is None else unusable
    rows = [i for i, image in enumerate(images) if is_file_name(image.get("file_name"))]  # the others are reported
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
        looks = pool.map(lambda i: _look(find, images[i]["file_name"]), rows)
        for i, facts in zip(rows, looks, strict=True):
            if isinstance(facts, DatasetError):
                report.add(facts.kind, f"{name_of(images[i])}: {facts}")
                unusable[i] = str(facts)
                continue
            sizes[i] = facts.size
            if reason := _compare(images[i], facts, report):
                unusable[i] = reason
    return sizes


def header_sizes(images: list[dict], folder: str | Path) -> np.ndarray:
    """(I, 2) float64 (height, width) of the files of an annotation file, from their headers; infinite without one."""
    finder, sizes = ImageFolder(folder), np.full((len(images), 2), np.inf)
    for i, image in enumerate(images):
        if is_file_name(image.get("file_name")):
            with contextlib.suppress(DatasetError):  # decoding it raises it again
                sizes[i] = image_size(finder.find(image["file_name"]))
    return sizes


def _look(find: Callable[[str], str | Path], file_name: str) -> ImageFacts | DatasetError:
    try:
        return image_facts(str(find(file_name)))
    except DatasetError as error:
        return error


def _compare(image: dict, facts: ImageFacts, report: Report) -> str:
    """Reports on a readable file; returns why training would stop at it, or ""."""
    height, width = facts.size
    said = [image.get(key) for key in ("height", "width")]
    reason = ""
    if any(is_length(x) and x != truth for x, truth in zip(said, facts.size, strict=True)):
        annotated = f"{image.get('width', width)!r:.20}x{image.get('height', height)!r:.20}"
        reason = f"{name_of(image)} is {width}x{height}, annotated {annotated} (width x height)"
        report.add(Issue.SIZE, reason)
    if kind := MODES.get(facts.mode, Issue.OTHER_MODE):
        report.add(kind, f"{name_of(image)}, mode {facts.mode}")
    if facts.orientation != 1:
        report.add(Issue.TURNED, f"{name_of(image)}, orientation {facts.orientation}")
    return reason


def check_overlap(first: list[dict], folder: str, second: list[dict], other: str, report: Report, read: bool) -> None:
    """Adds to ``report`` the images that are in both sets: the same file, or another with the same bytes.

    Args:
        first, second: entries of two annotation files.
        folder, other: their image folders.
        report: is added to.
        read: whether files may be read; without that, names alone are compared.
    """
    ours, theirs = _paths(first, folder), _paths(second, other)
    copies = _copies(list(ours), list(theirs)) if read else {}
    names = {image.get("file_name") for path, image in theirs.items() if path not in ours}
    for path, image in ours.items():
        twin = theirs.get(path) or theirs.get(copies.get(path))
        same_name = twin is not None and twin.get("file_name") == image["file_name"]
        if twin is not None:
            kind = Issue.SAME_FILE if path in theirs or same_name else Issue.SAME_BYTES
            report.add(kind, f"{name_of(image)} is {name_of(twin)} of the other set")
        elif image["file_name"] in names:
            report.add(Issue.NAMESAKE if read else Issue.NOT_COMPARED, name_of(image))


def _paths(images: list[dict], folder: str) -> dict[str, dict]:
    """{path without links: entry} of the images that have a file name."""
    root = os.path.realpath(folder)
    named = (image for image in images if is_file_name(image.get("file_name")) and "\0" not in image["file_name"])
    return {os.path.normpath(os.path.join(root, image["file_name"])): image for image in named}


def _copies(first: list[str], second: list[str]) -> dict[str, str]:
    """{path of ``first``: one of ``second`` with the same bytes}; only files of a length that both have are read."""
    lengths = {path: _length(path) for path in (*first, *second)}
    shared = {lengths[path] for path in first} & {lengths[path] for path in second} - {-1}
    digests = {sha256_of(path): path for path in second if lengths[path] in shared}
    candidates = {path: sha256_of(path) for path in first if lengths[path] in shared}
    return {path: digests[digest] for path, digest in candidates.items() if digest in digests}


def _length(path: str) -> int:
    """Bytes of a readable regular file; -1 for everything else, which check_images reports."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) and os.access(path, os.R_OK) else -1
    except (OSError, ValueError):
        return -1
