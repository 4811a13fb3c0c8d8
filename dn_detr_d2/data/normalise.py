"""Values of an annotation file that mean the same, as one value; entries that mean nothing, left out and counted.

The reader of trainings, ``dn-detr check`` and its ``--fix`` all look at a file through :func:`normalised`, so what
one of them accepts the others accept too. A *row* is the index of an entry among those of its list that are objects.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import PureWindowsPath

from .images import MAX_PIXELS
from .issues import Issue
from .report import Report

MAX_NUMBER = sys.float_info.max
# COCOeval counts areas up to 1e5 ** 2; an annotation beyond is ignored as if it were a crowd.
MAX_AREA = 1e10
REFERENCES = {"image_id": "images", "category_id": "categories"}
NUMBER = re.compile(r"\s*([+-]?\d{1,400})(\.0*)?\s*", re.ASCII)


def normalised(content: dict, report: Report) -> tuple[dict, list[int]]:
    """The content of an annotation file with one notation for each meaning.

    Ids and references 2.0 become 2; ``iscrowd`` null, false and 0.0 become 0, true and 1.0 become 1; a width or height of
    null, 0 or -1 is taken out, and so are "annotations" of null. Left out: annotations of images that are not listed, unless
    all are; categories without annotations whose name another category has too; entries of macOS's ``._`` files without
    annotations; images that are listed again with the same values.

    Args:
        content: stays as it is; entries that need no change are shared.
        report: what is left out is counted here.

    Returns:
        (content, rows of its images among those of the given content).
    """
    given = {name: content.get(name) for name in ("images", "annotations", "categories")}
    lists = {name: entries for name, entries in given.items() if isinstance(entries, list)}
    if "annotations" in lists:
        lists["annotations"] = [as_written(entry) for entry in lists["annotations"]]
    if "categories" in lists:
        lists["categories"] = [with_whole(entry, ("id",)) for entry in lists["categories"]]
    rows = list(range(len(objects_of(content, "images"))))
    if "images" in lists:
        lists["images"] = [_image(entry) for entry in lists["images"]]
        lists["images"], rows = _without_resource_forks(lists, report)
    result, rows = listed_once(content | lists, rows, report)
    if "annotations" in content and content["annotations"] is None:
        del result["annotations"]
    if "annotations" in lists and "images" in lists:
        result["annotations"] = _without_orphans(result, report)
    if "categories" in lists:
        result["categories"] = _without_twins(result, report)
    return result, rows


def is_id(value) -> bool:
    """Whether ``value`` can be an id: a whole number or text."""
    return type(value) is int or type(value) is str


def is_file_name(value) -> bool:
    """Whether ``value`` can name a file."""
    return type(value) is str and value != ""


def is_length(value) -> bool:
    """Whether ``value`` can be a width or height in pixels."""
    return type(value) in (int, float) and 0 < value <= MAX_PIXELS and value == int(value)


def sort_key(identifier: int | str) -> tuple:
    """Orders ids of any kind: numbers first, then strings."""
    return (isinstance(identifier, str), identifier)


def as_box(box) -> list[float] | None:
    """Four floats, None if ``box`` is not a list of four numbers; a whole number beyond float64 becomes infinite."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) is int or type(x) is float for x in box):
        return None
    try:
        return [float(x) for x in box]
    except OverflowError:
        return [float(x) if not abs(x) > MAX_NUMBER else math.inf if x > 0 else -math.inf for x in box]


def usable_area(value) -> float | None:
    """``value`` if it is an area that COCO's evaluation can use, otherwise None."""
    return float(value) if type(value) in (int, float) and 0 <= value <= MAX_AREA else None


def objects_of(content: dict, name: str) -> list[dict]:
    """The entries of a list in the file that are objects; [] if there is no such list."""
    entries = content.get(name)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def namesakes(identifiers: Iterable) -> dict:
    """{whole number: the id that is written so, as number or as text}, without numbers that two ids are written as."""
    found, doubled = {}, set()
    for identifier in identifiers:
        number = as_number(identifier)
        if number is None:
            continue
        if found.setdefault(number, identifier) != identifier:
            doubled.add(number)
    return {number: identifier for number, identifier in found.items() if number not in doubled}


def as_number(identifier) -> int | None:
    """The whole number that an id is or is written as; None for any other."""
    if type(identifier) is int:
        return identifier
    match = NUMBER.fullmatch(identifier) if type(identifier) is str else None
    return int(match[1]) if match else None


def foreign_references(content: dict, field: str) -> dict:
    """{reference that no id equals: the id that is written as the same number}, for ``image_id`` or ``category_id``."""
    known = {entry.get("id") for entry in objects_of(content, REFERENCES[field]) if is_id(entry.get("id"))}
    values = (entry.get(field) for entry in objects_of(content, "annotations"))
    missing = {value for value in values if is_id(value) and value not in known}
    if not missing:
        return {}
    written = namesakes(known)
    pairs = ((value, written.get(as_number(value))) for value in missing)
    return {value: identifier for value, identifier in pairs if identifier is not None}


def _whole(value):
    """2 for 2.0; everything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def with_whole(entry, fields: tuple[str, ...]):
    """An entry with 2 for 2.0 in some of its fields; what is no object stays as it is."""
    if not isinstance(entry, dict):
        return entry
    changes = {field: int(x) for field in fields if type(x := entry.get(field)) is float and x.is_integer()}
    return entry | changes if changes else entry


def as_written(entry):
    """An annotation, or a segment, with whole numbers for its ids and 0 or 1 for ``iscrowd`` where they mean that."""
    entry = with_whole(entry, ("id", "image_id", "category_id"))
    if not isinstance(entry, dict) or type(entry.get("iscrowd", 0)) is int:
        return entry
    crowd = entry["iscrowd"]
    if crowd is None or (isinstance(crowd, bool | float) and crowd in (0, 1)):
        return entry | {"iscrowd": int(crowd or 0)}
    return entry


def _image(entry):
    entry = with_whole(entry, ("id", "width", "height"))
    if not isinstance(entry, dict):
        return entry
    unknown = [key for key in ("width", "height") if key in entry and is_unknown(entry[key])]
    return {key: value for key, value in entry.items() if key not in unknown} if unknown else entry


def is_unknown(size) -> bool:
    """Whether a width or height stands for unknown: null, 0 or -1."""
    return size is None or (type(size) in (int, float) and size in (0, -1))


def _without_resource_forks(lists: dict, report: Report) -> tuple[list, list[int]]:
    """(images without those of macOS's ``._`` files, their rows)."""

    def _is_fork(entry):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        return isinstance(name, str) and PureWindowsPath(name).name.startswith("._")

    forks = {i for i, entry in enumerate(lists["images"]) if _is_fork(entry)}
    if forks:
        annotated = {x["image_id"] for x in objects_of(lists, "annotations") if is_id(x.get("image_id"))}
        forks = {i for i in forks if not is_id(x := lists["images"][i].get("id")) or x not in annotated}
    kept, rows, row = [], [], 0
    for i, entry in enumerate(lists["images"]):
        if i in forks:
            report.add(Issue.RESOURCE_FORK, f"images[{i}] {entry.get('file_name')!r:.80}")
        else:
            kept.append(entry)
            rows += [row] * isinstance(entry, dict)
        row += isinstance(entry, dict)
    return kept, rows


def listed_once(content: dict, rows: list[int], report: Report) -> tuple[dict, list[int]]:
    """(the content without images that are listed before with the same values, the rows of those that stay).

    Args:
        content: of an annotation file.
        rows: of its images.
        report: what is left out is counted here.
    """
    if not isinstance(content.get("images"), list):
        return content, rows
    seen, kept, kept_rows, row = set(), [], [], 0
    for i, entry in enumerate(content["images"]):
        known = isinstance(entry, dict)
        text = repr(sorted(entry.items())) if known and is_id(entry.get("id")) else None
        if text in seen:
            report.add(Issue.TWICE, f"images[{i}], id {entry['id']!r:.60}")
        else:
            kept.append(entry)
            kept_rows += rows[row : row + 1] if known else []
            seen |= {text} if text else set()
        row += known
    return content | {"images": kept}, kept_rows


def _without_orphans(content: dict, report: Report) -> list:
    """The annotations of listed images, and those whose reference is only written in another way."""
    known = {entry.get("id") for entry in objects_of(content, "images") if is_id(entry.get("id"))}
    foreign = foreign_references(content, "image_id")

    def _is_orphan(entry):
        value = entry.get("image_id")
        return not is_id(value) or (value not in known and value not in foreign)

    entries = content["annotations"]
    orphans = [i for i, entry in enumerate(entries) if isinstance(entry, dict) and _is_orphan(entry)]
    everything = len(orphans) == len(objects_of(content, "annotations"))
    report.add_rows(
        Issue.NO_MATCH if everything else Issue.UNKNOWN_IMAGE,
        orphans,
        lambda i: f"annotation {entries[i].get('id')!r:.60}, image_id {entries[i].get('image_id')!r:.80}",
    )
    if everything or not orphans:
        return entries
    left_out = set(orphans)
    return [entry for i, entry in enumerate(entries) if i not in left_out]


def _without_twins(content: dict, report: Report) -> list:
    """The categories without those that nothing refers to and whose name another one has."""
    entries = content["categories"]
    names = Counter(str(entry["name"]) for entry in objects_of(content, "categories") if is_id(entry.get("name")))
    if all(count == 1 for count in names.values()):
        return entries
    used = {x["category_id"] for x in objects_of(content, "annotations") if is_id(x.get("category_id"))}
    used |= set(foreign_references(content, "category_id").values())
    kept, seen = [], set()
    for i, entry in enumerate(entries):
        name, identifier = (str(entry["name"]), entry.get("id")) if _is_named(entry) else (None, None)
        again = (identifier, name) in seen
        if names[name] > 1 and (again or identifier not in used):
            names[name] -= 1
            report.add(Issue.TWIN, f"categories[{i}] {entry.get('name')!r:.60} with id {identifier!r:.60}")
            continue
        seen.add((identifier, name))
        kept.append(entry)
    return kept


def _is_named(entry) -> bool:
    return isinstance(entry, dict) and is_id(entry.get("name")) and is_id(entry.get("id"))
