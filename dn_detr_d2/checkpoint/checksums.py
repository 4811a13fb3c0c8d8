"""Checkpoints with their SHA-256, so that damage is noticed when they are read.

The SHA-256 of a checkpoint is kept beside it in ``name.sha256``, in the format of ``sha256sum -c``. While a checkpoint is
replaced the file lists the checksums of both versions, so an interruption at any moment leaves one that is recognised.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..utils.files import atomic_write, sha256_of

MARGIN = 1 << 20  # bytes that a checkpoint needs besides its tensors, at most


class _HashingFile:
    """A file to write to that computes the SHA-256 of what passes."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data) -> int:
        """As a file's."""
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """As a file's."""
        self.file.flush()


def write_record(path: Path, text: str) -> None:
    """Writes a small text file atomically, such as the name of the newest checkpoint.

    Raises:
        CheckpointError: the disk is full or cannot be written to; the old file is unchanged.
    """
    with _explained(path, "record"), atomic_write(path) as file:
        file.write(text.encode())


def write_summed(path: Path, write: Callable) -> None:
    """Writes a checkpoint and its checksum.

    Args:
        path: an existing file is replaced atomically.
        write: is given an open binary file.

    Raises:
        CheckpointError: the disk is full or cannot be written to; the old file is unchanged, and no draft is left.
    """
    with _explained(path, "checkpoint"), atomic_write(path) as file:
        hashing = _HashingFile(file)
        write(hashing)
        file.flush()
        os.fsync(file.fileno())  # notices a full disk before the checksums change
        digest = hashing.hash.hexdigest()
        before = recorded_sums(path) if path.exists() else []
        _write_sums(path, [digest, *before])
    if before:
        _write_sums(path, [digest])


def verify(path: Path) -> bool:
    """Compares a checkpoint with its checksum; False if it has none.

    Raises:
        CheckpointError: the file, or its checksum, has changed since it was written.
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
    """The file with the checksum of a checkpoint."""
    return path.with_name(f"{path.name}.sha256")


def recorded_sums(path: Path) -> list[str]:
    """The checksums that a checkpoint may have; [] if there is no readable file of them."""
    try:
        return [line.split()[0] for line in sum_file(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        return []


def require_space(path: Path, content) -> None:
    """Raises CheckpointError, with both sizes, if a checkpoint would not fit on the disk.

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
    write_record(sum_file(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


@contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Turns a failed write into a CheckpointError of one sentence; PyTorch raises RuntimeError for one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(_explain(path, error, kind)) from None


def _explain(path: Path, error: Exception, kind: str) -> str:
    causes = (error, error.__context__, error.__cause__)
    full = any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes)
    reason = "the disk is full (ENOSPC)" if full else " ".join(str(error).split())
    return f"{kind} {str(path)!r} cannot be written: {reason}; earlier checkpoints are as they were"
