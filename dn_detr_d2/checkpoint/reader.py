"""Reading and writing checkpoint files without ever running what is inside."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checksums import verify, write_summed

# Types without behaviour that the authors' files hold beside their tensors.
PLAIN_TYPES = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, collections.defaultdict, dict, set]
# What a NumPy array needs to be read from a pickle.
NUMPY_NAMES = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("collections", "OrderedDict")}
EMA = "model_ema"  # key of the averaged weights, as torch's AveragedModel has them


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
        """The object that a name in the file refers to, if it is allowed."""
        if (module, name) == ("_codecs", "encode"):  # how Python 2 wrote bytes
            return _encode_latin1
        if (module, name) not in NUMPY_NAMES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return super().find_class(module, name)


def _encode_latin1(text: str, codec: str) -> bytes:
    """The one codec that files use; naming another would import it."""
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the file asks for the codec {codec!r:.40}")
    return text.encode("latin1")


def allow_plain_types() -> None:
    """Lets ``torch.load(weights_only=True)`` read an argparse namespace and paths, wherever it is called from."""
    torch.serialization.add_safe_globals(PLAIN_TYPES)


def read_checkpoint(path: str | os.PathLike, *, averaged: bool = False) -> CheckpointFile:
    """Reads ``.pth`` (ours, the authors', torchvision's), ``.pkl`` of Detectron2's zoo, or ``.safetensors``.

    Args:
        path: of the file.
        averaged: the moving average of the weights, which a training with ``MODEL_EMA.ENABLED`` keeps beside them.

    Raises:
        CheckpointError: the file is not there, is damaged, differs from its checksum (see :mod:`.checksums`), asks for
            something to be executed, or holds no tensors, or no averaged ones.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    verify(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, averaged)
    content = load_plain(path)
    return _unpack(_averaged(content, path) if averaged else content, path)


def load_plain(path: Path, *, mapped: bool = False):
    """The content of a ``.pth`` or ``.pkl`` if it is tensors and plain values; its checksum is not verified.

    Args:
        path: of a file that exists.
        mapped: leave the tensors of a ``.pth`` on the disk until they are used; damage to them is then not noticed.

    Raises:
        CheckpointError: it is damaged, asks for something to be executed, or is an archive that unpacks to far more.
    """
    _refuse_compressed(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                return _ArraysOnly(file, encoding="latin1").load()
        allow_plain_types()
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was refused: it is damaged, or holds more than tensors and plain values, and nothing "
            f"in it was executed ({_cause(error)})"
        ) from None
    except Exception as error:  # a damaged file can end in any of them; nothing of it has been executed
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read, it may be damaged: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """The sentence of PyTorch's text that says what is wrong, without its advice to read the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    told = [line.removeprefix("WeightsUnpickler error:").strip() for line in lines if "weights_only" not in line]
    return (told or ["what it holds is not known"])[0].partition(". ")[0][:200]


def refuse_repeated(path: Path, content: Iterable[tuple[object, object]]) -> None:
    """Refuses tensors that are larger than their file: they repeat one number, and a copy would fill the memory.

    Args:
        path: of the file.
        content: (name, value) of whatever it holds; values other than tensors and arrays pass.

    Raises:
        CheckpointError: names the first such tensor.
    """
    largest = path.stat().st_size
    for name, x in content:
        if not _is_tensor(x):
            continue
        size = x.nelement() * x.element_size() if isinstance(x, Tensor) else x.nbytes  # a sparse one has no nbytes
        if size > largest:
            raise CheckpointError(
                f"checkpoint {str(path)!r} was refused: it has {largest} bytes, but {str(name)!r:.80} would take {size}"
            )


def check_pickle(weights: str) -> None:
    """Refuses a hostile ``.pkl`` on this machine before Detectron2's own checkpointer, which would run it, opens it.

    Args:
        weights: MODEL.WEIGHTS; anything but a local ``.pkl`` passes.
    """
    path = (weights or "").split("?")[0]  # Detectron2 lets options follow
    if path.endswith(".pkl") and Path(path).is_file():
        read_checkpoint(path)


def _averaged(content, path: Path) -> dict:
    """A checkpoint's content with the averaged weights instead of the raw ones."""
    average = content.get(EMA) if isinstance(content, dict) else None
    if not isinstance(average, dict):
        raise CheckpointError(
            f"checkpoint {str(path)!r} has no averaged weights ({EMA}); set MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY False"
        )
    weights = {str(name).removeprefix("module."): x for name, x in average.items() if name != "n_averaged"}
    return {**content, "model": weights}


def _unpack(content, path: Path) -> CheckpointFile:
    """The state dict of a file, which may lie under "model" or "state_dict"."""
    extra = content if isinstance(content, dict) else {}
    state = next((extra[key] for key in ("model", "state_dict") if isinstance(extra.get(key), dict)), content)
    if not isinstance(state, dict) or not any(_is_tensor(x) for x in state.values()):
        held = f", only {', '.join(map(str, list(state)[:4]))!r:.80}" if isinstance(state, dict) and state else ""
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of a model: it holds no named tensors{held}; name a file with the state "
            "dict of a model, by itself or under 'model' or 'state_dict'"
        )
    refuse_repeated(path, state.items())
    state = {str(name): torch.as_tensor(x) for name, x in state.items() if _is_tensor(x)}
    config = extra.get("config", "")
    return CheckpointFile(state, _names(extra.get("class_names"), path), config if isinstance(config, str) else "")


def _refuse_compressed(path: Path) -> None:
    """A checkpoint is a ZIP archive of plain entries; one that unpacks to far more is there to fill the memory."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read, it may be damaged: {error}") from None
    if unpacked > 2 * path.stat().st_size:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was refused: it has {path.stat().st_size} bytes and would unpack to {unpacked}; "
            "checkpoints are not compressed"
        )


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "fiub")


def _names(names, path: Path) -> list[str]:
    """Class names as a file has them; none is an empty list."""
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"checkpoint {str(path)!r} may be damaged: its class names are not a list of names")
    return names


def _read_safetensors(path: Path, averaged: bool) -> CheckpointFile:
    from safetensors import SafetensorError, safe_open

    if averaged:
        _averaged({}, path)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
        names = json.loads(metadata.get("class_names", "[]"))
    except (SafetensorError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read, it may be damaged: {first}") from None
    return CheckpointFile(state, _names(names, path), metadata.get("config", ""))


def _sorted_header(content: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file, and what follows it; the package writes metadata in an order that changes by chance.

    The file begins with the length of its header as 8 bytes, then comes JSON, filled up with blanks to a multiple of 8.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, memoryview(content)[end:]


def write_checkpoint(path: str | os.PathLike, checkpoint: CheckpointFile) -> None:
    """Writes ``.pth`` or ``.safetensors`` atomically.

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
        header, tensors = _sorted_header(save({name: x.clone() for name, x in state.items()}, metadata))
        write_summed(path, lambda file: (file.write(header), file.write(tensors)))
    else:
        whole = {"model": state, "class_names": checkpoint.class_names, "config": checkpoint.config}
        write_summed(path, lambda file: torch.save(whole, file))
