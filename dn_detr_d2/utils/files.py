"""Atomic writes, and the SHA-256 of a file."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; raises OSError. hashlib.file_digest() came with Python 3.11."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def draft_of(path: Path) -> Path:
    """Where :func:`atomic_write` writes a file before it is complete: ``.name.part`` in the same folder."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", *, draft: Path | None = None) -> Iterator[IO]:
    """A file to write to. When the block ends it is synced and renamed to ``path``, which is replaced whole or not at all.

    Args:
        path: in a folder that exists.
        mode: of ``open``; text is written as UTF-8.
        draft: where it is written meanwhile, default :func:`draft_of`. Processes that may write the same file at the same
            time each need their own.

    Raises:
        OSError: it cannot be written. After any error ``path`` is as it was, and the draft is deleted.
    """
    path = Path(path)
    draft = draft or draft_of(path)
    try:
        with draft.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure; Windows has no way to sync a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
