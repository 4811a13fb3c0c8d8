"""Panoptic data sets in COCO's format: each pixel of a png holds the id of its segment, R + 256 G + 256^2 B, 0 = none.

Classes are numbered from 0, things first, each in ascending order of their ids; :mod:`.mapper` takes every segment, thing or
stuff, as one object.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import DatasetError
from .coco_custom import (
    categories_of,
    dataset_path,
    image_records,
    is_registered,
    log_left_out,
    read_content,
    require_files,
)
from .images import ImageFolder, read_map
from .issues import Issue
from .normalise import as_box, as_written, is_id, normalised, objects_of, sort_key, usable_area, with_whole
from .report import Report
from .segment_map import NOTHING, SegmentMap, require_size

logger = logging.getLogger(__name__)

MAX_ID = 256**3 - 1
LABEL_DIVISOR = 1000  # as Detectron2 has them


def register_panoptic(name: str, json_file: str, png_folder: str, image_folder: str, must_exist: bool = True) -> None:
    """Registers a panoptic data set with Detectron2 under ``name``; the same registration twice is fine.

    Args:
        name: must not be taken by another data set.
        json_file, png_folder, image_folder: see :func:`.coco_custom.dataset_path`.
        must_exist: False for a set that is not going to be read; it stays unregistered.

    Raises:
        DatasetError: files are missing or have a fault, see :func:`load_panoptic`.
        ConfigError: the name is taken.
    """
    paths = map(dataset_path, (json_file, png_folder, image_folder))
    files = dict(zip(("panoptic_json", "panoptic_root", "image_root"), paths, strict=True))
    if is_registered(name, "DATASETS.COCO_PANOPTIC", files) or not must_exist:
        return
    require_files(name, files)
    records, metadata = load_panoptic(*files.values())
    DatasetCatalog.register(name, lambda: records)
    set_metadata(name, metadata, {key: str(path) for key, path in files.items()})


def set_metadata(name: str, metadata: dict, files: dict[str, str]) -> None:
    """What Detectron2 knows of a panoptic data set of its own, also of ``name``."""
    MetadataCatalog.get(name).set(
        evaluator_type="coco_panoptic_seg", ignore_label=NOTHING, label_divisor=LABEL_DIVISOR, **metadata, **files
    )


def load_panoptic(json_file: Path, png_folder: Path, image_folder: Path) -> tuple[list[dict], dict]:
    """(dataset dicts, metadata of the classes).

    A dict has ``pan_seg_file_name`` and ``segments_info``, as Detectron2 has them, and the same segments as ``annotations``
    with their boxes, so that a detector can be trained on them too. No png is read.

    Args:
        json_file: with "images", "annotations" (``image_id``, ``file_name``, ``segments_info`` of ``id``, ``category_id``,
            ``bbox``, ``area``, ``iscrowd``) and "categories" (``id``, ``name``, ``isthing``).
        png_folder, image_folder: what the ``file_name`` of annotations and images are relative to.

    Raises:
        DatasetError: anything that is missing, doubled, of a wrong type or refers to nothing.
    """
    content = _normalised(read_content(json_file), json_file)
    classes, metadata = _classes(content, json_file)
    records, pngs = image_records(content, json_file, image_folder, repair=""), ImageFolder(png_folder)
    for i, annotation in enumerate(objects_of(content, "annotations")):
        where = f"{json_file}: annotation number {i}"
        image_id, segments = annotation.get("image_id"), annotation.get("segments_info")
        if not is_id(image_id) or image_id not in records or not isinstance(segments, list):
            raise DatasetError(
                f"{where} needs the image_id of a listed image and a list segments_info, got image_id {image_id!r:.60} and "
                f"{segments!r:.60}; is it a panoptic file, and not one of instances?"
            )
        record = records[image_id]
        if "pan_seg_file_name" in record:
            raise DatasetError(f"{where} is the second one of image {image_id!r:.60}; leave one of them out")
        try:
            record["pan_seg_file_name"] = pngs.find(str(annotation.get("file_name")))
        except DatasetError as error:
            raise DatasetError(f"{where}: {error}", error.kind) from None
        record["annotations"] = [_segment(x, classes, f"{where}, segment {x!r:.200}") for x in segments]
        ids = Counter(x["id"] for x in record["annotations"])
        if ids and max(ids.values()) > 1:
            raise DatasetError(f"{where} has segment id {max(ids, key=ids.get)} more than once; give each its own")
        things = {*metadata["thing_dataset_id_to_contiguous_id"].values()}
        record["segments_info"] = [
            {key: x[key] for key in ("id", "category_id", "iscrowd", "area")} | {"isthing": x["category_id"] in things}
            for x in record["annotations"]
        ]
    found = [records[key] for key in sorted(records, key=sort_key) if "pan_seg_file_name" in records[key]]
    if not found:
        raise DatasetError(f"{json_file} has no annotations; a panoptic set needs one of each image")
    if left_out := len(records) - len(found):
        logger.warning("%s: %d images without an annotation are left out", json_file, left_out)
    segments = sum(len(record["annotations"]) for record in found)
    logger.info("Loaded %d images with %d segments from %s", len(found), segments, json_file)
    return found, metadata


def _normalised(content: dict, json_file: Path) -> dict:
    """One notation for each meaning, as of a detection file, see :func:`.normalise.normalised`.

    Annotations of images that are not listed are left out with a line in the log, unless all are.
    """
    if not isinstance(content.get("annotations"), list):
        return content
    segments = [_written_alike(x) for x in content["annotations"]]
    flat = [
        {"image_id": x.get("image_id"), "category_id": part.get("category_id")}
        for x in segments
        if isinstance(x, dict)
        for part in objects_of(x, "segments_info") or [{}]
    ]
    report = Report()
    alike, _ = normalised(content | {"annotations": flat}, report)
    del report.counts[Issue.UNKNOWN_IMAGE]  # of segments; their annotations are counted below
    log_left_out(report, json_file)
    listed = {image.get("id") for image in objects_of(alike, "images") if is_id(image.get("id"))}
    kept = [x for x in segments if not isinstance(x, dict) or (is_id(x.get("image_id")) and x["image_id"] in listed)]
    if kept and len(kept) < len(segments):
        logger.warning(
            "%s: %d annotations of images that are not listed are left out", json_file, len(segments) - len(kept)
        )
        segments = kept
    return alike | {"annotations": segments}


def _written_alike(annotation):
    """An annotation whose ids are whole numbers, and ``iscrowd`` of its segments 0 or 1, where they mean that."""
    if not isinstance(annotation, dict):
        return annotation
    annotation = with_whole(annotation, ("image_id",))
    if not isinstance(annotation.get("segments_info"), list):
        return annotation
    return annotation | {"segments_info": [as_written(x) for x in annotation["segments_info"]]}


def _classes(content: dict, json_file: Path) -> tuple[dict, dict]:
    """({category id: class}, what Detectron2's metadata says of classes)."""
    names = categories_of(content, json_file)
    things = {x["id"]: x.get("isthing") for x in content["categories"]}
    if bad := [key for key, thing in things.items() if thing not in (0, 1)]:
        raise DatasetError(
            f"{json_file}: category {bad[0]!r:.60} has isthing {things[bad[0]]!r:.60}; it must be 0 or 1"
        )
    order = sorted(names, key=lambda key: not things[key])  # stable
    classes = {key: i for i, key in enumerate(order)}
    listed = [names[key] for key in order]
    return classes, {
        "thing_classes": listed,
        "stuff_classes": listed,
        "thing_dataset_id_to_contiguous_id": {key: i for key, i in classes.items() if things[key]},
        "stuff_dataset_id_to_contiguous_id": {key: i for key, i in classes.items() if not things[key]},
    }


def _segment(segment, classes: dict, where: str) -> dict:
    """A segment as an annotation."""
    found = segment if isinstance(segment, dict) else {}
    number, category, crowd = found.get("id"), found.get("category_id"), found.get("iscrowd", 0)
    if type(number) is not int or not 0 < number <= MAX_ID:
        raise DatasetError(f"{where} has id {number!r:.60}; it must be a whole number from 1 to {MAX_ID}")
    if not is_id(category) or category not in classes:
        raise DatasetError(
            f"{where} has category_id {category!r:.60}, which is not among the categories {[*classes][:10]}"
        )
    if crowd not in (0, 1):
        raise DatasetError(f"{where} has iscrowd {crowd!r:.60}; it must be 0 or 1")
    box, area = as_box(found.get("bbox")), usable_area(found.get("area"))
    if box is None:
        raise DatasetError(f"{where} has bbox {found.get('bbox')!r:.60}; it must be four numbers [x, y, width, height]")
    return {
        "id": number,
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": classes[category],
        "iscrowd": int(crowd),
        "area": box[2] * box[3] if area is None else area,
    }


def read_panoptic_png(path: str) -> np.ndarray:
    """(H, W) int32 segment ids, 0 = none; raises DatasetError if the file cannot be read or has no colours."""
    pixels = read_map(path, ("RGB", "RGBA"), "segment ids of a panoptic png are R + 256 G + 256^2 B, so it must be RGB")
    pixels = pixels[..., :3].astype(np.int32)
    return pixels @ np.array([1, 256, 256**2], np.int32)


def panoptic_map(record: dict, size: tuple[int, int], segments: list[tuple[int, int]]) -> SegmentMap:
    """The segments of a record's png, see :class:`SegmentMap`.

    Args:
        record: with ``pan_seg_file_name`` and ``annotations``.
        size: (height, width) of the image.
        segments: (number among the annotations, label) of those that become objects.

    Raises:
        DatasetError: the png has another size than the image, or other ids than the annotations.
    """
    path = record["pan_seg_file_name"]
    ids = read_panoptic_png(path)
    require_size(path, ids.shape, record["file_name"], size)
    known = np.unique([0, *(x["id"] for x in record["annotations"])])
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    unknown = np.unique(ids[known[places] != ids])
    lacking = np.setdiff1d(known[np.bincount(places.ravel(), minlength=len(known)) == 0], [0])
    if len(unknown) or len(lacking):
        what = (
            f"lacks the segment ids {lacking[:5].tolist()}" if len(lacking) else f"has the ids {unknown[:5].tolist()}"
        )
        raise DatasetError(
            f"panoptic png {path} {what}, unlike segments_info of {record['file_name']}, which lists {len(known) - 1} "
            "segments; write both from the same source"
        )
    values = [i + (i >= NOTHING) for i in range(len(segments))]
    table = np.full(len(known), NOTHING, np.float32 if len(segments) > NOTHING else np.uint8)
    table[np.searchsorted(known, [record["annotations"][i]["id"] for i, _ in segments])] = values
    return SegmentMap(table[places], values, [label for _, label in segments], [i for i, _ in segments])
