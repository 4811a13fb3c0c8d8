"""The folder of a training: which checkpoint in it is whole and newest, and which may go."""

import logging
import re
from pathlib import Path

import torch

from ..checkpoint import pointed_checkpoint
from ..checkpoint.durable import replace_text, sum_file, verify
from ..checkpoint.files import POINTER
from ..errors import CheckpointError

logger = logging.getLogger(__name__)


def find_resumable(folder: Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names or, with a warning, the newest of the folder that is whole.

    Returns:
        None if the folder has no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    files, named, fault = sorted(folder.glob("model_*.pth")), None, f"{folder / POINTER} is missing"
    try:
        if name := pointed_checkpoint(folder):
            named, fault = Path(name), fault_of(Path(name))
        elif not files:
            return None
    except CheckpointError as error:
        fault = str(error)
    if fault is None:
        return named
    whole = [path for path in files if path != named and fault_of(path) is None]
    if not whole:
        raise CheckpointError(
            f"the checkpoint to resume from, {named or folder}, is damaged or gone ({fault}), and {folder} has no other "
            "that is whole; start anew without --resume and, if you have a copy of the weights, with MODEL.WEIGHTS"
        )
    newest = max(whole, key=lambda path: (iteration_of(path), path.stat().st_mtime_ns))
    logger.warning(
        "%s cannot be resumed from (%s); the training goes on from %s, the newest checkpoint that is whole, and repeats "
        "what came after its iteration %d",
        *(named or folder, fault, newest, iteration_of(newest)),
    )
    return newest


def fault_of(path: Path) -> str | None:
    """Why a training cannot go on from a file, None if it can."""
    if not path.is_file():
        return "it does not exist"
    try:
        summed = verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=summed)  # unread where the sum is right
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # a damaged file can end in any of them; nothing of it has been executed
        return (str(error).strip().splitlines() or [repr(error)])[0]
    return None if isinstance(content, dict) and "trainer" in content else "it holds no state of a training"


def iteration_of(path: Path) -> int:
    """The iteration after which a checkpoint that is whole was written."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["trainer"]["iteration"])


def point_to(folder: Path, name: str) -> None:
    """Names the checkpoint to resume from."""
    replace_text(folder / POINTER, name)


def remove_old(folder: Path, keep: int) -> None:
    """Deletes periodic checkpoints but the ``keep`` newest; never the one to resume from, the best, or the final one.

    Nothing is deleted unless the checkpoint to resume from can be read back from the disk unchanged.

    Args:
        folder: of the training; files of earlier runs count.
        keep: 0 = all.
    """
    for part in folder.glob(".*.part"):  # of a process that was killed
        part.unlink()
    periodic = sorted(path for path in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+", path.stem))
    if not keep or not (folder / POINTER).is_file():
        return
    last = Path(pointed_checkpoint(folder))
    old = [path for path in periodic[:-keep] if path != last]
    if old and fault_of(last) is not None:
        logger.warning("no checkpoint is deleted, because %s cannot be resumed from (%s)", last, fault_of(last))
        return
    for path in old:
        path.unlink()
        sum_file(path).unlink(missing_ok=True)
