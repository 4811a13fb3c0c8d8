"""The table and the pictures of annotations that a model does not believe, see ``judge_annotations``."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw
from pycocotools import mask as mask_util

from ..data import read_image, records_of
from ..data.images import drawing_scale
from ..data.mapper import raw_corners
from ..errors import UserError
from .annotation_errors import BOX, CLASS, KINDS, MISSING, SPURIOUS, Suspicion

CORNERS = ("x0", "y0", "x1", "y1")
SUGGESTED_CORNERS = tuple(f"suggested_{key}" for key in CORNERS)
COLUMNS = (
    *("kind", "score", "image_id", "annotation", "file_name", "label", "suggested"),
    *(*CORNERS, *SUGGESTED_CORNERS),
)
IN_CROWD = 0.5  # a place of which so much lies in a crowd is not missing an annotation
RED, GREEN = (255, 0, 0), (0, 200, 0)


def as_rows(judged: Iterable[Suspicion], names: list[str], dataset: str) -> list[dict]:
    """One dict an annotation, or a place without one, with the keys of ``COLUMNS``.

    Boxes are in pixels of the image; what an error has not is "". Missing objects inside of crowds are left out.
    """
    records, rows = {record["image_id"]: record for record in records_of(dataset)}, []

    def _name_of(label: int | None) -> str:
        return "" if label is None else names[label] if label < len(names) else str(label)

    for found in judged:
        kind, record = found.kind, records[found.image_id]
        if kind == MISSING and _lies_in_a_crowd(found.suggested_box, record):
            continue
        annotations = record.get("annotations", {found.index: {}})  # none beside a semantic map
        annotation = "" if kind == MISSING else annotations[found.index].get("id", f"number {found.index}")
        values = (kind, round(found.score, 4), found.image_id, annotation, record["file_name"])
        values = (*values, _name_of(found.label), _name_of(found.suggested))
        corners = [round(x, 1) if box else "" for box in (found.box, found.suggested_box) for x in (box or CORNERS)]
        rows.append(dict(zip(COLUMNS, (*values, *corners), strict=True)))
    return rows


def _lies_in_a_crowd(box: list[float], record: dict) -> bool:
    """Whether much of a box (xyxy) lies in an annotation of many objects."""
    corners = [raw_corners(x) for x in record.get("annotations", ()) if x.get("iscrowd", 0)]
    crowds = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in corners]
    found = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return bool(crowds) and mask_util.iou([found], crowds, [1] * len(crowds)).max() >= IN_CROWD  # over the found box


def describe(row: dict) -> str:
    """One clause about an error."""
    return {
        CLASS: "annotated {label}, rather {suggested}",
        BOX: "{label}: rather the green box",
        SPURIOUS: "{label}: nothing is seen here",
        MISSING: "{suggested} without annotation",
    }[row["kind"]].format(**row)


def write_report(rows: list[dict], top: int, folder: Path) -> None:
    """label_errors.csv with all rows, and one picture for each of the first ``top`` of each kind.

    Pictures of an earlier report in the folder are deleted: they have other ranks.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        _write_report(rows, top, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; name another folder") from None


def _write_report(rows: list[dict], top: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for path in folder.glob(f"{kind}_[0-9][0-9][0-9][0-9]_*.png"):
            path.unlink()
    with (folder / "label_errors.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for kind in KINDS:
        for rank, row in enumerate([row for row in rows if row["kind"] == kind][:top], 1):
            about = {CLASS: f"{row['label']}_or_{row['suggested']}", MISSING: row["suggested"]}.get(kind, row["label"])
            draw(row).save(folder / f"{kind}_{rank:04d}_{as_file_name(about)}.png")


def as_file_name(text: str) -> str:
    """Letters, digits, "." and "_" of a text with "-" for everything else, in at most 120 bytes."""
    return re.sub(r"[^\w.]", "-", text).encode()[:120].decode(errors="ignore")


def draw(row: dict) -> Image.Image:
    """The image with the annotated box in red, the suggested one in green, and what is wrong."""
    picture = Image.fromarray(read_image(row["file_name"], "RGB"))
    scale = drawing_scale(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    pen = ImageDraw.Draw(picture)
    for keys, colour in ((CORNERS, RED), (SUGGESTED_CORNERS, GREEN)):
        if row[keys[0]] != "":
            pen.rectangle([row[key] * scale for key in keys], outline=colour, width=3)
    text = f"{describe(row)} ({row['score']:+.2f})"
    place = pen.textbbox((4, 4), text, font_size=18)
    pen.rectangle(place, fill=(0, 0, 0))
    pen.text((4, 4), text, fill=(255, 255, 255), font_size=18)
    return picture
