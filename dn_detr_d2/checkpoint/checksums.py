"""Files that are whole or not there, and that are known to be unchanged when they are read.

A file is written aside (``.name.part``), synced, and renamed. The SHA-256 of a checkpoint stands beside it in
``name.sha256``, in the format of ``sha256sum -c``; while a checkpoint is being replaced the sums of both versions stand
there, so a stop at any moment leaves one that is recognised.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..digest import sha256_of
from ..errors import CheckpointError

MARGIN = 1 << 20  # bytes that a checkpoint needs besides its tensors, at most


class _Summing:
    """A file to write to that sums up what passes."""

    def __init__(self, file):
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data) -> int:
        """As a file's."""
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """As a file's."""
        self.file.flush()


def replace_text(path: Path, text: str) -> None:
    """Writes a small record, such as the name of the newest checkpoint: whole, on the disk, or not at all.

    Raises:
        CheckpointError: the disk is full or cannot be written to; what was there stays.
    """
    _write_aside(path, lambda file: file.write(text.encode()), "record")
    _rename(path, "record")


def write_summed(path: Path, write: Callable) -> None:
    """Writes a checkpoint and its sum.

    Args:
        path: what is there is replaced at once or not at all.
        write: is given an open binary file.

    Raises:
        CheckpointError: the disk is full or cannot be written to; what was there stays, and no part is left behind.
    """
    digest = _write_aside(path, write)
    before = recorded_sums(path) if path.exists() else []
    _write_sums(path, [digest, *before])
    _rename(path)
    if before:
        _write_sums(path, [digest])


def verify(path: Path) -> bool:
    """Compares a checkpoint with its sum; False if it has none.

    Raises:
        CheckpointError: the file, or the sum, has changed since it was written.
    """
    if not sum_file(path).is_file():
        return False
    found = sha256_of(path)
    if found not in recorded_sums(path):
        raise CheckpointError(
            f"checkpoint {str(path)!r} is damaged: its SHA-256 is {found[:12]}..., not what {sum_file(path).name} says; "
            f"take another one, or delete {sum_file(path).name} if you have changed the file yourself"
        )
    return True


def sum_file(path: Path) -> Path:
    """Where the sum of a checkpoint stands."""
    return path.with_name(f"{path.name}.sha256")


def recorded_sums(path: Path) -> list[str]:
    """What a checkpoint's sum may be; [] if nothing legible says it."""
    try:
        return [line.split()[0] for line in sum_file(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        return []


def require_space(path: Path, content) -> None:
    """Refuses to begin a checkpoint that would not fit; raises CheckpointError with both numbers.

    Args:
        path: of the file to come.
        content: nested dicts and lists with tensors.
    """
    needed, free = tensor_bytes(content) + MARGIN, shutil.disk_usage(path.parent).free
    if free < needed:
        raise CheckpointError(
            f"checkpoint {str(path)!r} needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free on its disk; make "
            "room or lower SOLVER.CHECKPOINTS_KEPT, earlier checkpoints are as they were"
        )


def tensor_bytes(content) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(content, Tensor):
        return content.nelement() * content.element_size()
    if isinstance(content, Mapping):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return 0
    return sum(tensor_bytes(part) for part in content)


def _write_sums(path: Path, digests: Iterable[str]) -> None:
    replace_text(sum_file(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write_aside(path: Path, write: Callable, kind: str = "checkpoint") -> str:
    """Writes the part and syncs it; returns its SHA-256."""
    try:
        with _part(path).open("wb") as file:
            summing = _Summing(file)
            write(summing)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a write that failed
        _part(path).unlink(missing_ok=True)
        raise CheckpointError(_explain(path, error, kind)) from None
    return summing.sum.hexdigest()


def _rename(path: Path, kind: str = "checkpoint") -> None:
    """Puts the part in the place of the file, and syncs the folder."""
    try:
        _part(path).replace(path)
    except OSError as error:
        _part(path).unlink(missing_ok=True)
        raise CheckpointError(_explain(path, error, kind)) from None
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _explain(path: Path, error: Exception, kind: str) -> str:
    causes = (error, error.__context__, error.__cause__)
    full = any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes)
    reason = "the disk is full (ENOSPC)" if full else " ".join(str(error).split())
    return f"{kind} {str(path)!r} cannot be written: {reason}; earlier checkpoints are as they were"
