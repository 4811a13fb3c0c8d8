"""Class names and splits of a YOLO set: Ultralytics' data.yaml, or a text file with one class a line.

Source of the rules: Ultralytics' ``check_det_dataset``, ``img2label_paths`` and ``check_class_names``.
"""

import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from ..errors import DatasetError
from .label_files import SUFFIXES, lines_of, read_text, whole_number

YAML = (".yaml", ".yml")
SPLITS = ("train", "val", "test")
NULL = "tag:yaml.org,2002:null"
SHORT = reprlib.Repr()  # of what may be nested without end
SHORT.maxlevel, SHORT.maxother, SHORT.maxstring = 2, 200, 200


@dataclass(frozen=True)
class Names:
    """Class ``names`` in the order of their numbers; ``keypoints`` is how many numbers of a line are a pose, 0 = none."""

    names: list[str]
    keypoints: int = 0


def read_names(path: Path) -> list[str]:
    """Class names from ``names`` of a data.yaml (list, {number: name}, one text), or from a text file with one a line.

    Raises:
        DatasetError: the file cannot be read, or the names are none, doubled, not numbered 0 .. P-1, or not ``nc`` many.
    """
    return read_classes(path).names


def read_classes(path: Path) -> Names:
    """The names, see :func:`read_names`, with ``kpt_shape`` of a data.yaml."""
    keypoints = 0
    if path.suffix.lower() in YAML:
        content = read_yaml(path)
        names, keypoints = _names_of(content, path), _keypoints(content, path)
    else:
        try:
            names = lines_of(read_text(path))
        except (OSError, DatasetError) as error:
            raise DatasetError(f"{path} holds no class names: {error}") from None
    names = [" ".join(str(name).split()) for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or len(set(names)) < len(names) or "" in names:
        raise DatasetError(f"{path} must name each class once, without empty lines between them, got {names[:10]}")
    return Names(names, keypoints)


class TextLoader(yaml.SafeLoader):
    """Reads numbers, dates, yes and no as the text they are, which as names they must stay; refuses keys that
    stand twice, of which YAML would keep the last in silence, and knows no merge key."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == NULL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        """Called for every mapping."""
        doubled = [key for key, n in Counter(key.value for key, _ in node.value if key.value != []).items() if n > 1]
        if doubled:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the mapping in line {line} has a key twice: {doubled[0]!r:.60}; take one out")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in a data.yaml; raises DatasetError that names the file."""
    try:
        loader = TextLoader(read_text(path))
        content = loader.get_single_data()
    except (OSError, ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds no class names: it must be a mapping with names, got {SHORT.repr(content)}")
    return content


def _names_of(content: dict, path: Path) -> list:
    names = content.get("names")
    if isinstance(names, str) and not names.isdecimal():
        names = [names]
    if isinstance(names, dict):
        names = _in_order(names, path)
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise DatasetError(
            f"{path} holds no class names: names must be a list, or {{0: name, 1: ...}}, got {SHORT.repr(names)}"
        )
    count = content.get("nc", len(names))
    if _count(count) != len(names):
        raise DatasetError(
            f"{path} says nc: {SHORT.repr(count)}, but names {len(names)} classes {names[:10]}; take nc out, or correct the "
            "names"
        )
    return names


def _in_order(names: dict, path: Path) -> list:
    """The values of {number: name}; numbers may be text."""
    try:
        numbered = {whole_number(str(key)): name for key, name in names.items()}
    except ValueError as error:
        raise DatasetError(
            f"{path} has names with the key {error}; keys are the numbers 0 .. {len(names) - 1}"
        ) from None
    if sorted(numbered) != list(range(len(names))):
        missing = sorted(set(range(max(numbered, default=0) + 1)) - set(numbered))
        raise DatasetError(
            f"{path} gives its class names the numbers {sorted(numbered)[:10]}, without {missing[:10]}; number them from 0 "
            "without gaps, as the label files count, and give a number that is not used a name of its own"
        )
    return [numbered[i] for i in range(len(names))]


def _count(value: object) -> int:
    """A whole number that is not negative, -1 for anything else."""
    try:
        return max(whole_number(str(value)), -1) if isinstance(value, str | int) else -1
    except ValueError:
        return -1


def _keypoints(content: dict, path: Path) -> int:
    """How many numbers of a line describe key points, from ``kpt_shape: [points, 2 or 3]``."""
    shape = content.get("kpt_shape", [0, 0])
    counts = [_count(value) for value in shape] if isinstance(shape, list) else []
    if len(counts) != 2 or min(counts) < 0:
        raise DatasetError(
            f"{path} has kpt_shape: {SHORT.repr(shape)}; it must be [number of key points, 2 or 3], or left out"
        )
    return counts[0] * counts[1]


@dataclass(frozen=True)
class Split:
    """Where the images of a split are: ``folders``, and single ``files`` from lists; ``root`` is what paths start at,
    ``moved`` is a ``path`` of the data.yaml that does not exist, or ""."""

    root: Path
    folders: list[Path]
    files: list[Path]
    moved: str = ""


def read_split(path: Path, split: str) -> Split:
    """The images of ``split`` in a data.yaml: a folder, a .txt list of images, or a list of those.

    Paths start at ``path``, which starts at the folder of the data.yaml or at the current one; where it does not exist,
    because the set was moved, at the folder of the data.yaml. Roboflow's "../train/images" is found as Ultralytics finds
    it, also without the "../". Those in a .txt list start at the list's folder, at ``path``, or at the current folder,
    whichever has the file.

    Raises:
        DatasetError: there is no such split, or a folder or a list does not exist.
    """
    content = read_yaml(path)
    if split == "val" and "val" not in content:
        content["val"] = content.get("validation")
    entries = content.get(split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(x, str) and x for x in entries):
        there = [key for key in SPLITS if content.get(key)]
        raise DatasetError(
            f"{path} has {split}: {SHORT.repr(content.get(split))}, which is no folder or list; it has {there}"
        )
    base = content.get("path") or "."
    if not isinstance(base, str):
        raise DatasetError(f"{path} has path: {SHORT.repr(base)}; it must be a folder")
    root = next((place for place in (path.parent / base, Path(base)) if place.is_dir()), None)
    moved, root = ("", root) if root is not None else (base, path.parent)
    folders, files = [], []
    for entry in entries:
        found = _find(root, entry.replace("\\", "/") if os.sep == "/" else entry)
        if found is None:
            raise DatasetError(
                f"{path} has {split}: {entry!r:.200}, which does not exist below {root.absolute()}; correct it, or path"
            )
        if found.is_dir():
            folders.append(found)
        else:
            files += [found] if found.suffix.lower() in SUFFIXES else _listed(found, root)
    return Split(root, folders, files, moved)


def _find(root: Path, entry: str) -> Path | None:
    for name in (entry, entry.removeprefix("../")):
        if (root / name).is_dir() or (root / name).is_file():  # not a pipe, which would be waited for
            return Path(os.path.normpath(root / name))
    return None


def _listed(file: Path, root: Path) -> list[Path]:
    """The images that a .txt names, one a line."""
    try:
        lines = [line.strip() for line in lines_of(read_text(file))]
    except (OSError, DatasetError) as error:
        raise DatasetError(f"{file}: {error}") from None
    found = []
    for name in (line.replace("\\", "/") if os.sep == "/" else line for line in lines if line):
        names = (name, name.removeprefix("data/"))  # CVAT writes "data/images/..." beside a folder images
        places = [base / name for name in names for base in (file.parent, root, Path())]
        found.append(Path(os.path.normpath(next((place for place in places if place.exists()), places[0]))))
    return found


def labels_folder(images: Path) -> Path:
    """Where the label files of the images in a folder are: its last part "images" becomes "labels"."""
    parts = list(images.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts)
