"""Label files and images as they lie in folders: found, read as text and numbers, and counted where something is amiss."""

import itertools
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import DatasetError

# Endings of files that the formats of images.py usually have.
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".mpo",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
EXAMPLES = 5  # names listed of each kind
MAX_SEARCHED_FOLDERS = 500  # folders looked into for files that are not where they were expected
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

HIDDEN = "hidden files and folders, not read"
LINKED = "links to folders, not followed"


class Tally:
    """What was dropped, missing or changed, by kind, in the order of the first of each."""

    def __init__(self):
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, place: object) -> None:
        """Counts one more of ``kind``, found at ``place``."""
        self._places.setdefault(kind, []).append(str(place))

    def add_once(self, kind: str, place: object) -> None:
        """The same for what may be met several times."""
        if str(place) not in self._places.get(kind, ()):
            self.add(kind, place)

    def lines(self) -> list[str]:
        """One line a kind: how many, and where the first were."""
        return [
            f"{kind}: {len(places)} ({', '.join(places[:EXAMPLES])}{', ...' if len(places) > EXAMPLES else ''})"
            for kind, places in self._places.items()
        ]

    def __str__(self) -> str:
        """All lines as the end of a sentence."""
        return "".join(f"; {line}" for line in self.lines())


def number(text: str) -> float:
    """A finite decimal number in any notation; raises ValueError that names the text."""
    text = text.strip()
    if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{text!r:.60}, which is no finite decimal number")
    return float(text)


def whole_number(text: str) -> int:
    """A whole number in any notation (1, 1.0, 1e0); raises ValueError that names the text."""
    value = number(text)
    if value != int(value):
        raise ValueError(f"{text!r:.60}, which is no whole number")
    return int(value)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; raises DatasetError that names the line, and OSError."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DatasetError(
            f"line {line} is not {encoding.upper().removesuffix('-SIG')}; save the file as UTF-8"
        ) from None


def lines_of(text: str) -> list[str]:
    """Lines as an editor counts them, whatever ends them."""
    return re.split("\r\n|\r|\n", text)


def normal(name: str) -> str:
    """A file's name in one of the spellings that mean the same: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def walk(folder: Path, suffixes: tuple[str, ...], tally: Tally) -> list[str]:
    """Files below ``folder`` that end in one of ``suffixes``, relative to it with slashes, in order.

    Hidden ones (.DS_Store, ._name, __MACOSX) and links to folders are left out and counted; raises DatasetError.
    """
    found = []

    for root, folders, files in os.walk(folder, onerror=_fail):
        below = os.path.relpath(root, folder)
        for name in [name for name in folders + files if name.startswith(".") or name == "__MACOSX"]:
            tally.add_once(HIDDEN, os.path.join(root, name))
            (folders if name in folders else files).remove(name)
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                tally.add_once(LINKED, os.path.join(root, name))
        paths = (os.path.normpath(os.path.join(below, name)) for name in files)
        found += [Path(path).as_posix() for path in paths if path.lower().endswith(suffixes)]
    return sorted(found)


def _fail(error: OSError):
    raise DatasetError(
        f"{error.filename} cannot be searched: {error.strerror}; allow it, or move it elsewhere"
    ) from None


def check_label_file(path: Path, roots: list[str]) -> None:
    """Raises DatasetError if ``path`` is no regular file, or lies, its links followed, below none of the real ``roots``."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DatasetError("it is no regular file")
    real = os.path.realpath(path)
    if not any(os.path.commonpath([root, real]) == root for root in roots):
        raise DatasetError("it leads out of the folder with the label files; put the file itself there")


def best_folder(start: Path, score: Callable[[Path], int]) -> tuple[Path, int]:
    """The folder at, below or beside ``start`` with the largest score, and the score; looks at ``MAX_SEARCHED_FOLDERS``."""
    candidates = itertools.islice(_around(start), MAX_SEARCHED_FOLDERS)
    scored = [(score(folder), folder) for folder in candidates]
    most = max((n for n, _ in scored), default=0)
    return next(((folder, n) for n, folder in scored if n == most), (start, 0))


def _around(start: Path) -> Iterator[Path]:
    seen = set()
    for top in (start, Path(os.path.abspath(start)).parent):
        for root, folders, _ in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if len(Path(root).relative_to(top).parts) >= 3:
                folders.clear()
            if os.path.realpath(root) not in seen:
                seen.add(os.path.realpath(root))
                yield Path(root)
