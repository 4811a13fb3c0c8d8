"""Finds the checkpoint to resume from in the folder of a training, and deletes old ones."""

import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, UserError
from .checksums import sum_file, verify, write_record
from .reader import load_plain, refuse_repeated

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"  # the file in which Detectron2 notes the name of the newest checkpoint of a folder
MAX_NAME_LENGTH = 255
# What a training writes besides config.yaml and log.txt.
OF_A_TRAINING = (
    "model_*.pth",
    "model_*.pth.sha256",
    POINTER,
    "metrics.json",
    "best_metric*.json",
    "early_stopping.json",
    "last_evaluation.json",
    "instability.npz",
    "events.out.tfevents.*",
    *("inference", "ema", "nan_report", "report"),  # folders
)
STARTED = time.time()  # of this process


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
    whole = {}
    for path in (path for path in files if path != named):
        with suppress(CheckpointError):
            whole[path] = iteration_of(path)
    if not whole:
        raise CheckpointError(
            f"the checkpoint to resume from, {named or folder}, is damaged or gone ({fault}), and {folder} has no other "
            "that is whole; start anew without --resume and, if you have a copy of the weights, with MODEL.WEIGHTS"
        )
    newest = max(whole, key=lambda path: (whole[path], path.stat().st_mtime_ns))
    logger.warning(
        "%s cannot be resumed from (%s); the training goes on from %s, the newest checkpoint that is whole, and repeats "
        "what came after its iteration %d",
        named or folder,
        fault,
        newest,
        whole[newest],
    )
    return newest


def has_checkpoints(folder: Path) -> bool:
    """Whether there is something that --resume would go on from, or refuse."""
    return (folder / POINTER).exists() or any(folder.glob("model_*.pth"))


def pointed_checkpoint(folder: str | os.PathLike) -> str:
    """Path of the checkpoint that ``last_checkpoint`` in a folder names; "" if there is no such file.

    The name must be that of a file in the same folder: a folder that somebody else has made must not name files elsewhere.

    Raises:
        CheckpointError: it is a link, too long, not text, or names something outside the folder.
    """
    pointer = Path(folder) / POINTER
    if not pointer.exists():
        return ""
    way_out = "write the name of a .pth file of this folder into it"
    if pointer.is_symlink() or not pointer.is_file() or pointer.stat().st_size > MAX_NAME_LENGTH:
        raise CheckpointError(f"{pointer} must be a short text file, and no link; {way_out}")
    try:
        name = pointer.read_text().strip()
    except UnicodeDecodeError:
        raise CheckpointError(f"{pointer} is not text; {way_out}") from None
    if not name or not name.isprintable() or name.startswith(".") or "/" in name or "\\" in name:
        raise CheckpointError(f"{pointer} names {name!r}, which is not a file beside it; {way_out}")
    if (Path(folder) / name).resolve().parent != Path(folder).resolve():
        raise CheckpointError(f"{pointer} names {name!r}, which is a link out of its folder; {way_out}")
    return str(Path(folder) / name)


def fault_of(path: Path) -> str | None:
    """Why a training cannot go on from a file, None if it can."""
    try:
        read_resumable(path, mapped=True)
    except CheckpointError as error:
        return str(error)
    return None


def iteration_of(path: Path) -> int:
    """The iteration after which a checkpoint was written; raises CheckpointError as :func:`read_resumable`."""
    return read_resumable(path, mapped=True)["trainer"]["iteration"]


def read_resumable(path: Path, *, mapped: bool = False) -> dict:
    """A checkpoint with all that a training needs to go on.

    Args:
        path: of the file.
        mapped: leave the tensors on the disk if the file matches its checksum.

    Raises:
        CheckpointError: the file does not exist, is damaged or hostile, holds a tensor larger than itself, or is no
            checkpoint of a training.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    summed = verify(path)
    content = load_plain(path, mapped=mapped and summed)
    refuse_repeated(path, _leaves(content))
    if lacking := _lacking(content):
        raise CheckpointError(
            f"checkpoint {str(path)!r} holds no state of a training that can go on ({lacking}); to start anew with its "
            "weights, name it in MODEL.WEIGHTS and leave --resume out"
        )
    return content


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Around restoring the content of a checkpoint: one that does not fit raises an error of one sentence.

    Raises:
        CheckpointError: instead of Python's and PyTorch's own errors.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not fit this training ({type(error).__name__}: {first:.200}); resume with the "
            "config.yaml beside it, or start anew without --resume"
        ) from error


def _leaves(content) -> Iterator[tuple[object, object]]:
    """(name, value) of every leaf of nested dicts, lists, tuples and sets, which may contain themselves."""
    rest, seen = [("", content)], set()
    while rest:
        name, part = rest.pop()
        if not isinstance(part, dict | list | tuple | set):
            yield name, part
        elif id(part) not in seen:
            seen.add(id(part))
            rest.extend(part.items() if isinstance(part, dict) else ((name, x) for x in part))


def _lacking(content) -> str:
    """What a training needs and a checkpoint lacks; "" if nothing."""
    needed = {
        ("model",): dict,
        ("trainer", "iteration"): int,
        ("trainer", "_trainer", "iteration"): int,
        ("trainer", "_trainer", "optimizer"): dict,
    }
    for place, kind in needed.items():
        found = content
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, kind) or isinstance(found, bool):
            return f"{'.'.join(place)} is {'missing' if found is None else 'no ' + kind.__name__}"
    if not any(isinstance(x, Tensor) for x in content["model"].values()):
        return "model has no tensors"
    return "" if content["trainer"]["iteration"] >= 0 else "trainer.iteration is negative"


def read_record(path: Path, take: Callable):
    """What a hook has written down beside the checkpoints.

    Args:
        path: of a JSON file.
        take: makes of its content what the hook needs; what does not fit raises one of Python's usual errors.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    try:
        return take(json.loads(path.read_text()))
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read, it may be damaged ({type(error).__name__}: {fault}); repair it, or delete it and what "
            "it remembers is counted anew"
        ) from None


def number(value) -> float:
    """A number of a JSON file, which may be NaN; raises TypeError."""
    if type(value) not in (int, float):
        raise TypeError(f"a number is needed, not a {type(value).__name__}")
    return float(value)


def point_to(folder: Path, name: str) -> None:
    """Names the checkpoint to resume from."""
    write_record(folder / POINTER, name)


def set_aside(folder: Path) -> Path | None:
    """Moves what an earlier training has left in a folder into a folder of its own below, so that none of it is mixed.

    ``config.yaml`` is copied: it may be read once more; ``log.txt`` goes on. A checkpoint that the new training begins with
    moves too, or the new one would be resumed from it, and would overwrite it at last; see :func:`moved_path`.

    Args:
        folder: of the training that begins.

    Returns:
        The new folder, None if there was no earlier training.
    """
    found = [path for pattern in OF_A_TRAINING for path in sorted(folder.glob(pattern))]
    if not any(path.name in (POINTER, "metrics.json") or path.suffix == ".pth" for path in found):
        return None
    number = next(i for i in itertools.count(1) if not (folder / f"earlier_{i}").exists())
    target = folder / f"earlier_{number}"
    target.mkdir()
    for path in found:
        path.replace(target / path.name)
    if (folder / "config.yaml").is_file():
        shutil.copy2(folder / "config.yaml", target)
    logger.warning(
        "%s holds an earlier training, and --resume was not given or found nothing to go on from: its checkpoints, metrics, "
        "predictions and report were moved to %s",
        folder,
        target,
    )
    return target


def moved_path(named: str, target: Path) -> str:
    """A path of the config after :func:`set_aside` has moved files to ``target``, where it may be one of them.

    Args:
        named: ``MODEL.WEIGHTS``, whose options behind a "?" stay, or another path.
        target: what :func:`set_aside` returned.
    """
    path, question, options = named.partition("?")
    real, folder = (Path(os.path.realpath(x)) for x in (path, target.parent))  # of a link the file that was moved
    if "://" in path or not path or real.exists() or not real.is_relative_to(folder):
        return named
    moved = target / real.relative_to(folder)
    return f"{moved}{question}{options}" if moved.exists() or real.parent == folder else named


def bring_back(target: Path) -> None:
    """Undoes :func:`set_aside`: the training that was to begin has been refused.

    Args:
        target: what :func:`set_aside` returned.
    """
    for path in list(target.iterdir()):
        path.replace(target.parent / path.name)
    target.rmdir()
    logger.warning("the training was refused; what lay in %s is back", target.parent)


def iterations_of(path: Path) -> int | None:
    """Iterations after which a periodic checkpoint was written, by its name ``model_0000299.pth``; None for other names."""
    found = re.fullmatch(r"model_(\d+)", path.stem)
    return int(found[1]) + 1 if found else None


def periodic_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that have their iteration in their name, oldest first."""
    return sorted((path for path in folder.glob("model_*.pth") if iterations_of(path)), key=iterations_of)


def remove_old(folder: Path, keep: int) -> None:
    """Deletes periodic checkpoints but the ``keep`` newest; never the one to resume from, the best, or the final one.

    Nothing is deleted unless the checkpoint to resume from can be read back from the disk unchanged.

    Args:
        folder: of the training; files of earlier runs count.
        keep: 0 = all.
    """
    for part in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            if part.stat().st_mtime < STARTED:  # of a process that was killed, not of another one that writes now
                part.unlink()
    periodic = periodic_checkpoints(folder)
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
