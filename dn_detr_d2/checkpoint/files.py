"""Reading and writing checkpoint files without ever running what is inside."""

import argparse
import collections
import json
import os
import pathlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .durable import verify, write_summed

# Types without behaviour that the authors' files hold beside their tensors.
PLAIN_TYPES = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, collections.defaultdict, dict, set]
# What a NumPy array needs to be read from a pickle.
NUMPY_NAMES = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")}


@dataclass
class CheckpointFile:
    """What a file holds.

    Attributes:
        state: name -> tensor.
        class_names: in order of their ids, [] if the file does not say.
        config: YAML text of the config that it was made with, "" if the file does not say.
    """

    state: dict[str, Tensor]
    class_names: list[str] = field(default_factory=list)
    config: str = ""


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and containers; any other name in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str):
        """What a name in the file stands for, if it is allowed."""
        if (module, name) not in NUMPY_NAMES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return super().find_class(module, name)


def allow_plain_types() -> None:
    """Lets ``torch.load(weights_only=True)`` read an argparse namespace and paths, wherever it is called from."""
    torch.serialization.add_safe_globals(PLAIN_TYPES)


def read_checkpoint(path: str | os.PathLike) -> CheckpointFile:
    """Reads ``.pth`` (ours, the authors', torchvision's), ``.pkl`` of Detectron2's zoo, or ``.safetensors``.

    Raises:
        CheckpointError: the file is not there, is damaged, differs from the sum beside it (see :mod:`.durable`), asks for
            something to be executed, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    verify(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="latin1").load()
        else:
            allow_plain_types()
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r} was refused: it is damaged, or holds more than tensors and plain values, and nothing "
            f"in it was executed ({first})"
        ) from None
    except Exception as error:  # a damaged file can end in any of them; nothing of it has been executed
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read, it may be damaged: {first}") from None
    return _unpack(content, path)


def _unpack(content, path: Path) -> CheckpointFile:
    """The state dict of a file, which may lie under "model" or "state_dict"."""
    extra = content if isinstance(content, dict) else {}
    state = next((extra[key] for key in ("model", "state_dict") if isinstance(extra.get(key), dict)), content)
    if not isinstance(state, dict) or not any(_is_tensor(x) for x in state.values()):
        raise CheckpointError(f"{str(path)!r} is not a checkpoint: it holds no named tensors")
    state = {str(name): torch.as_tensor(x) for name, x in state.items() if _is_tensor(x)}
    return CheckpointFile(state, _names(extra.get("class_names"), path), str(extra.get("config", "")))


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "fiub")


def _names(names, path: Path) -> list[str]:
    """Class names as a file has them; none is an empty list."""
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"checkpoint {str(path)!r} may be damaged: its class names are {names!r}")
    return names


def _read_safetensors(path: Path) -> CheckpointFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
        names = json.loads(metadata.get("class_names", "[]"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read, it may be damaged: {error}") from None
    return CheckpointFile(state, _names(names, path), metadata.get("config", ""))


def write_checkpoint(path: str | os.PathLike, checkpoint: CheckpointFile) -> None:
    """Writes ``.pth`` or ``.safetensors``, whole or not at all.

    Raises:
        CheckpointError: another suffix, or a folder that is not there.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(f"a checkpoint is written as .pth or .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise CheckpointError(f"the folder {str(path.parent)!r} for {path.name} does not exist")
    state = {name: x.detach().contiguous().cpu() for name, x in checkpoint.state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        metadata = {"class_names": json.dumps(checkpoint.class_names), "config": checkpoint.config, "format": "pt"}
        content = save({name: x.clone() for name, x in state.items()}, metadata)
        write_summed(path, lambda file: file.write(content))
    else:
        whole = {"model": state, "class_names": checkpoint.class_names, "config": checkpoint.config}
        write_summed(path, lambda file: torch.save(whole, file))
