"""COCO-format data sets of users: registered from the config, without a line of Python.

Category ids may be of any kind (gaps, 0-based, large, strings); inside they become 0 .. P-1 in ascending order. Every
complaint names the file, the record and the field.
"""

import contextlib
import difflib
import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import ConfigError, DatasetError
from ..utils.text_output import escaped
from .conventions import declared, other_convention
from .images import ImageFolder, image_size
from .issues import Issue
from .label_files import best_folder
from .normalise import (
    as_box,
    foreign_references,
    is_file_name,
    is_id,
    is_length,
    normalised,
    objects_of,
    sort_key,
    usable_area,
)
from .report import Report

logger = logging.getLogger(__name__)

FIX = "dn-detr check ANNOTATIONS.json IMAGE_FOLDER --fix OUT.json"
LOOKED_AT = 32  # images whose headers are read where a file has no sizes
# What a data set is made of: attribute of Detectron2's metadata, what it is called in an error.
FILES = {
    "json_file": "annotation file",
    "panoptic_json": "panoptic annotation file",
    "image_root": "image folder",
    "panoptic_root": "folder of panoptic png",
    "sem_seg_root": "folder of semantic maps",
}
# What the reader leaves out, with the level of its line in the log.
LEFT_OUT = {
    Issue.UNKNOWN_IMAGE: logging.WARNING,
    Issue.TWIN: logging.WARNING,
    Issue.TWICE: logging.WARNING,
    Issue.RESOURCE_FORK: logging.INFO,
}


def dataset_path(path: str) -> Path:
    """``path`` as it is if absolute, otherwise below DETECTRON2_DATASETS (default ./datasets)."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / Path(path).expanduser()


def register_coco_json(name: str, json_file: str, image_folder: str, must_exist: bool = True) -> None:
    """Registers a data set with Detectron2 under ``name``; the same registration twice is fine.

    Args:
        name: must not be taken by another data set.
        json_file, image_folder: see :func:`dataset_path`.
        must_exist: False for a set that is not going to be read; it stays unregistered.

    Raises:
        DatasetError: file or folder is missing, or the file has no usable categories.
        ConfigError: the name is taken.
    """
    json_path, folder = dataset_path(json_file), dataset_path(image_folder)
    files = {"json_file": json_path, "image_root": folder}
    if is_registered(name, "DATASETS.COCO_JSON", files) or not must_exist:
        return
    require_files(name, files)
    # Now, so that a broken file is refused before anything starts.
    records, categories = load_with_categories(json_path, folder)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        json_file=str(json_path),
        image_root=str(folder),
        evaluator_type="coco",
        thing_classes=list(categories.values()),
        thing_dataset_id_to_contiguous_id={category: i for i, category in enumerate(categories)},
    )


def class_names(name: str) -> list[str] | None:
    """Class names of a registered data set, None if it does not say; raises ConfigError for an unknown name."""
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=1)
        own = "list your own data sets in DATASETS.COCO_JSON, COCO_PANOPTIC or SEM_SEG"
        hint = f"did you mean {near[0]!r}?" if near else own
        raise ConfigError(f"DATASETS names {name!r}, which is not a known data set; {hint}")
    return listed_classes(name)


def listed_classes(name: str) -> list[str] | None:
    """Class names in the metadata of a data set: of semantic sets all, of others those of objects (panoptic sets: all)."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("stuff_classes" if metadata.get("evaluator_type") == "sem_seg" else "thing_classes")


def check_files(name: str) -> None:
    """Raises DatasetError if the files of a registered data set are not there; a set that makes its own files passes."""
    metadata = MetadataCatalog.get(name)
    files = {key: Path(path) for key in FILES if (path := metadata.get(key)) and "://" not in str(path)}
    if "panoptic_json" in files and "sem_seg_root" not in files:
        files.pop("json_file", None)  # of the same images' instances, which are not read
    if "image_root" in files and len(files) > 1:
        require_files(name, files)


def is_registered(name: str, option: str, files: dict[str, Path]) -> bool:
    """Whether a data set of that name, made of those files, is registered already.

    Args:
        name: of the data set.
        option: the key of the config that names it, for the error.
        files: {attribute of its metadata: path}.

    Raises:
        ConfigError: the name is taken by a set of other files.
    """
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    if any(metadata.get(key) != str(path) for key, path in files.items()):
        raise ConfigError(f"{option} names {name!r}, which is already registered with other files; choose another name")
    return True


def require_files(name: str, files: dict[str, Path]) -> None:
    """Raises DatasetError if a file or folder of a data set, {key of ``FILES``: path}, is not there."""
    for key, path in files.items():
        if not (path.is_file() if FILES[key].endswith("file") else path.is_dir()):
            raise DatasetError(
                f"{FILES[key]} of data set {name!r} does not exist: {path.absolute()} (relative paths start at "
                f"DETECTRON2_DATASETS = {os.environ.get('DETECTRON2_DATASETS', './datasets (not set)')}){_way_out(name)}"
            )


def _way_out(name: str) -> str:
    """For COCO's own sets, which the base configs name and many do not want."""
    if not name.startswith("coco_"):
        return ""
    return (
        "; if the base config names it and you do not want it, set DATASETS.TEST (and TRAIN) to data sets of yours, or "
        'DATASETS.TEST "()" to train without evaluation'
    )


def load_coco_json(json_file: str | Path, image_folder: str | Path) -> list[dict]:
    """Reads a COCO-format detection file into Detectron2's dataset dicts.

    Only boxes are used; an unusable segmentation does not cost its box. Annotations keep their ``id`` and have an ``area``
    in pixels: the file's own if it is a number from 0 to 1e10, otherwise width x height. What means the same is read as the
    same, and what nobody can use is left out with a line in the log, see :mod:`.normalise`. Whether a box makes sense in
    its image is checked by the mapper.

    Args:
        json_file: COCO format with "images" and "categories"; without "annotations" it is a test set, whose records have
            none. ``iscrowd``, ``area``, ``width`` and ``height`` may be absent.
        image_folder: what ``file_name`` is relative to.

    Returns:
        list: one dict an image, in the order of the image ids; ``category_id`` is 0 .. P-1.

    Raises:
        DatasetError: anything that is missing, doubled, of a wrong type or refers to nothing; boxes that are all written in
            another convention than [x, y, width, height] in pixels.
    """
    return load_with_categories(Path(json_file), Path(image_folder))[0]


def load_images(json_file: Path, image_folder: Path) -> list[dict]:
    """``file_name`` and ``image_id`` of the images that a COCO-format file lists, in the order of the ids.

    Nothing else in the file is looked at, so it needs no categories, and sizes or annotations may be wrong.

    Args:
        json_file: with "images".
        image_folder: what ``file_name`` is relative to.

    Raises:
        DatasetError: a file is missing, or the images are not listed as they should be.
    """
    images, report = read_content(json_file).get("images"), Report()
    if isinstance(images, list):
        kept = ("id", "file_name")
        images = [{key: x[key] for key in kept if key in x} if isinstance(x, dict) else x for x in images]
    content, _ = normalised({"images": images}, report)
    log_left_out(report, json_file)
    records = image_records(content, json_file, image_folder)
    return [records[key] for key in sorted(records, key=sort_key)]


def load_with_categories(
    json_file: Path, image_folder: Path, published: bool = False, masks: bool = False
) -> tuple[list[dict], dict]:
    """(dataset dicts, {category id: name}), see :func:`load_coco_json`.

    ``published`` allows what COCO's own files have: doubled ids in the minival of 2014. With ``masks`` annotations keep
    their ``segmentation``, which takes more memory than everything else, and have no ``area`` where the file has none.
    """
    report = Report()
    content, _ = normalised(read_content(json_file), report)
    log_left_out(report, json_file)
    categories = categories_of(content, json_file)
    records = image_records(content, json_file, image_folder)
    if "annotations" not in content:
        logger.info("Loaded %d images from %s, which has no annotations", len(records), json_file)
        return [records[key] for key in sorted(records, key=sort_key)], categories
    _refuse_foreign_references(content, json_file)
    annotations = _annotations(content, json_file)
    classes = {category: i for i, category in enumerate(categories)}
    for record in records.values():
        record["annotations"] = []
    seen = Counter()
    for annotation in annotations:
        seen[annotation["id"]] += 1
        added = _add(annotation, records, classes, json_file)
        if masks and "segmentation" in annotation:
            added["segmentation"] = annotation["segmentation"]
            if usable_area(annotation.get("area")) is None:
                del added["area"]  # that of the mask then counts, which is measured where it is needed
    doubled = [key for key, count in seen.items() if count > 1]
    if doubled and not (published and "minival" in json_file.name):
        raise DatasetError(
            f"{json_file}: annotation ids appear more than once: {doubled[:10]}; {FIX} numbers them anew"
        )
    ordered = [records[key] for key in sorted(records, key=sort_key)]
    if not declared(content):
        _refuse_other_conventions(ordered, json_file)
    logger.info("Loaded %d images with %d boxes from %s", len(records), sum(seen.values()), json_file)
    return ordered, categories


def log_left_out(report: Report, json_file: Path) -> None:
    """A line for each kind of what :func:`.normalise.normalised` has left out of a file."""
    for kind, level in LEFT_OUT.items():
        if report.counts[kind]:
            logger.log(level, "%s: %d x %s: %s", json_file, report.counts[kind], kind, "; ".join(report.first[kind]))


def _add(annotation: dict, records: dict, classes: dict, json_file: Path) -> dict:
    """Puts an annotation into the record of its image, and returns what it has put there."""
    where = f"{json_file}: annotation {annotation['id']!r:.200}"
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    record = records.get(image_id) if is_id(image_id) else None
    if record is None:
        raise DatasetError(
            f"{where} has image_id {image_id!r:.200}, which is not among the images, nor is that of any other annotation; "
            "are they of another file?"
        )
    if not is_id(category_id) or category_id not in classes:
        raise DatasetError(
            f"{where} has category_id {category_id!r:.200}, which is not among the categories {list(classes)[:10]}; add "
            f"the category, or leave out such annotations with {FIX} --drop-bad"
        )
    crowd = annotation.get("iscrowd", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        way = f"{FIX} writes it as a number" if crowd in ("0", "1") else f"{FIX} --drop-bad leaves such annotations out"
        raise DatasetError(f"{where} has iscrowd {crowd!r:.60}; it must be 0 or 1; {way}")
    box = _box(annotation.get("bbox"), where)
    area = usable_area(annotation.get("area"))
    added = {
        "id": annotation["id"],
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": classes[category_id],
        "iscrowd": crowd,
        "area": box[2] * box[3] if area is None else area,
    }
    record["annotations"].append(added)
    return added


def _refuse_foreign_references(content: dict, json_file: Path) -> None:
    """Ids that are text on one side and a number on the other."""
    for field in ("category_id", "image_id"):
        foreign = foreign_references(content, field)
        if not foreign:
            continue
        entries = objects_of(content, "annotations")
        number, entry = next((i, x) for i, x in enumerate(entries) if is_id(x.get(field)) and x[field] in foreign)
        record = repr(entry["id"]) if is_id(entry.get("id")) else f"number {number}"
        raise DatasetError(
            f"{json_file}: annotation {record:.200} has {field} {entry[field]!r:.60}, but the id is "
            f"{foreign[entry[field]]!r:.60}, text against a number; {FIX} makes them equal"
        )


def _refuse_other_conventions(records: list[dict], json_file: Path) -> None:
    boxes, sizes, looked_at = [], [], _sizes_of_some(records)
    for record in records:
        found = [x["bbox"] for x in record["annotations"] if not x["iscrowd"]]
        boxes += found
        annotated = record.get("height", np.inf), record.get("width", np.inf)
        sizes += [looked_at.get(record["image_id"], annotated)] * len(found)
    shapes = np.array(boxes, np.float64).reshape(-1, 4), np.array(sizes, np.float64).reshape(-1, 2)
    if words := other_convention(*shapes):
        raise DatasetError(f"{json_file}: {convention_sentence(words)}", Issue.CONVENTION)


def _sizes_of_some(records: list[dict]) -> dict:
    """{image id: (height, width)} of ``LOOKED_AT`` images at most, from their headers, if the file says the size of none."""
    annotated = [record for record in records if record["annotations"]]
    if any("height" in record and "width" in record for record in annotated):
        return {}
    sizes = {}
    for record in annotated[:: max(1, len(annotated) // LOOKED_AT)][:LOOKED_AT]:
        with contextlib.suppress(DatasetError):  # reading the image raises it again
            sizes[record["image_id"]] = image_size(record["file_name"])
    return sizes


def convention_sentence(words: str) -> str:
    """What is wrong with boxes of another convention, and the way out."""
    return (
        f"the boxes look like {words}, not [x, y, width, height] in pixels; {FIX} --boxes CONVENTION converts them, and "
        "--boxes xywh says that they are right as they are"
    )


def read_content(json_file: Path) -> dict:
    """The object in a JSON file; raises DatasetError, with the file's name, if there is none."""
    try:
        content = json.loads(json_file.read_bytes(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{json_file} is not valid JSON: {error}") from None
    except OSError as error:
        raise DatasetError(f"{json_file} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{json_file} must hold an object with images, annotations and categories")
    return content


def _unique_keys(pairs: list[tuple]) -> dict:
    """An object of a file; raises ValueError where a key stands twice with two values, of which JSON would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        different = [key for key, value in pairs if value != found[key] and repr(value) != repr(found[key])]
        if different:
            raise ValueError(f"the key {different[0]!r:.60} stands twice in the object {found!r:.200}, with two values")
    return found


def _annotations(content: dict, json_file: Path) -> list[dict]:
    annotations = content.get("annotations")
    where, what, way_out = "", f"{annotations!r:.60}", "write a list, which may be empty"
    if isinstance(annotations, list):
        bad = (i for i, x in enumerate(annotations) if not isinstance(x, dict) or not is_id(x.get("id")))
        number = next(bad, None)
        if number is None:
            return annotations
        where, what = f"annotation number {number}: ", f"{annotations[number]!r:.200}"
        numbered = isinstance(annotations[number], dict)
        way_out = f"{FIX} numbers them" if numbered else f"{FIX} --drop-bad leaves such entries out"
    raise DatasetError(
        f"{json_file}: {where}annotations must be a list of objects with an id each, a whole number or text, got {what}; "
        f"{way_out}"
    )


def categories_of(content: dict, json_file: Path) -> dict:
    """{category id: name} in ascending order of the ids."""
    categories = content.get("categories")
    if not categories or not isinstance(categories, list):
        raise DatasetError(f"{json_file} has no categories")
    for i, category in enumerate(categories):
        if not isinstance(category, dict) or not is_id(category.get("id")) or not is_id(category.get("name")):
            raise DatasetError(
                f"{json_file}: category number {i} needs an id and a name, whole numbers or text, got {category!r:.200}"
            )
    for field, values in (("id", [c["id"] for c in categories]), ("name", [str(c["name"]) for c in categories])):
        if doubled := [value for value, count in Counter(values).items() if count > 1]:
            raise DatasetError(
                f"{json_file}: category {field}s appear more than once: {doubled[:10]!r:.300}; give each its own, or make "
                "them one category"
            )
    return {c["id"]: escaped(str(c["name"])) for c in sorted(categories, key=lambda c: sort_key(c["id"]))}


def image_records(content: dict, json_file: Path, image_folder: Path, repair: str = FIX) -> dict:
    """{image id: its record without annotations}; raises DatasetError if an image is not listed as it should, or missing.

    Args:
        content: of an annotation file.
        json_file: for the sentences.
        image_folder: what ``file_name`` is relative to.
        repair: the program that mends such a file, "" where there is none.
    """
    images = content.get("images")
    if not images or not isinstance(images, list):
        raise DatasetError(f"{json_file} has no images; is it an annotation file in COCO format?")
    records, missing, hint, folder = {}, [], "", ImageFolder(image_folder)
    for i, image in enumerate(images):
        if not isinstance(image, dict) or not is_id(image.get("id")) or not is_file_name(image.get("file_name")):
            raise DatasetError(
                f"{json_file}: image number {i} needs an id and a file_name, got {image!r:.200}; an id is a whole number or "
                "text"
            )
        if image["id"] in records:
            raise DatasetError(
                f"{json_file}: image id {image['id']!r:.200} appears more than once, with other values; give each its own id"
            )
        try:
            path = folder.find(image["file_name"])
        except DatasetError as error:
            if error.kind == Issue.OUTSIDE:
                raise DatasetError(f"{json_file}, image {image['id']!r}: {error}") from None
            path = ""
            if folder.with_slashes(image["file_name"]):
                hint = f" (but with / for each back slash it does{repair and f'; {repair} writes it so'})"
            missing.append(str(image_folder / image["file_name"]))
        record = {"file_name": path, "image_id": image["id"]}
        records[image["id"]] = record | _annotated_size(image, json_file, repair)
    if len(missing) == len(images):
        names = [image["file_name"] for image in images[:20]]
        right, found = best_folder(image_folder, lambda folder: sum((folder / name).is_file() for name in names))
        way_out = f"they lie in {right}: name that folder" if found == len(names) else "name the folder that holds them"
        raise DatasetError(
            f"{json_file}: none of its {len(images)} image files lies in {image_folder}, first {missing[0]}{hint}; {way_out}"
        )
    if missing:
        raise DatasetError(
            f"{json_file}: {len(missing)} of {len(images)} image files do not exist, first {missing[0]}{hint}; add them, or "
            f"leave them out{repair and f' with {repair} --drop-bad'}"
        )
    return records


def _annotated_size(image: dict, json_file: Path, repair: str) -> dict:
    size = {key: image[key] for key in ("height", "width") if key in image}
    for key, value in size.items():
        if not is_length(value):
            raise DatasetError(
                f"{json_file}: image {image['id']!r:.200} has {key} {value!r:.60}; it must be a positive number of pixels "
                f"without a fraction; {f'{repair} takes it from the image' if repair else 'leave it out'}"
            )
    return size


def _box(box, where: str) -> list[float]:
    """A box as four floats; NaN and Inf, which JSON dialects allow, pass on to the mapper's count."""
    numbers = as_box(box)
    if numbers is None:
        raise DatasetError(
            f"{where} has bbox {box!r:.200}; it must be four numbers [x, y, width, height] in pixels; {FIX} takes a missing "
            "one from the mask and reads numbers that are text, and with --drop-bad leaves other such annotations out"
        )
    return numbers
