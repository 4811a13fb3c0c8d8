"""The table and the pictures of annotations whose label a model does not believe, see ``denoising_health.judge_labels``."""

import csv
from pathlib import Path

from PIL import Image, ImageDraw

from ..data import read_image, records_of
from ..data.images import drawing_scale
from .denoising_health import JudgedLabel

COLUMNS = ("score", "image_id", "annotation", "file_name", "label", "suggested", "x0", "y0", "x1", "y1")


def as_rows(judged: list[JudgedLabel], names: list[str], dataset: str) -> list[dict]:
    """One dict an annotation with the keys of ``COLUMNS``; boxes in pixels of the image."""
    records, rows = {record["image_id"]: record for record in records_of(dataset)}, []
    for found in judged:
        record = records[found.image_id]
        annotations = record.get("annotations", {found.index: {}})  # none beside a semantic map
        annotation = annotations[found.index].get("id", f"number {found.index}")
        label, suggested = (names[i] if i < len(names) else str(i) for i in (found.label, found.suggested))
        values = (round(found.score, 4), found.image_id, annotation, record["file_name"], label, suggested)
        rows.append(dict(zip(COLUMNS, (*values, *(round(x, 1) for x in found.box)), strict=True)))
    return rows


def write_report(rows: list[dict], top: int, folder: Path) -> None:
    """label_errors.csv with all rows and one picture for each of the first ``top``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "label_errors.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for rank, row in enumerate(rows[:top], 1):
        draw(row).save(
            folder / f"{rank:04d}_{row['label']}_or_{row['suggested']}.png".replace("/", "-").replace(" ", "-")
        )


def draw(row: dict) -> Image.Image:
    """The image with the box, the annotated and the suggested class."""
    picture = Image.fromarray(read_image(row["file_name"], "RGB"))
    scale = drawing_scale(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    box = [row[key] * scale for key in ("x0", "y0", "x1", "y1")]
    pen = ImageDraw.Draw(picture)
    pen.rectangle(box, outline=(255, 0, 0), width=3)
    text = f"annotated {row['label']}, rather {row['suggested']} ({row['score']:+.2f})"
    place = pen.textbbox((4, 4), text, font_size=18)
    pen.rectangle(place, fill=(0, 0, 0))
    pen.text((4, 4), text, fill=(255, 255, 255), font_size=18)
    return picture
