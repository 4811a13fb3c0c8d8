"""The records of a registered data set; Detectron2's COCO sets come through our reader, like those of the config."""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import DatasetError
from .coco_custom import check_files, class_names, load_with_categories, register_coco_json
from .shapes import load_shapes

# Where Detectron2 makes the functions that read ``coco_2017_train`` and what its register_coco_instances is given.
THEIR_READER = "detectron2.data.datasets.coco"


def records_of(name: str, masks: bool = False) -> list[dict]:
    """Dataset dicts of a registered data set.

    Detectron2's own reader looks neither at where a ``file_name`` leads nor at what a record holds, so its detection sets
    in COCO format are read as those of ``DATASETS.COCO_JSON`` are. Images, their order, boxes and classes are the same; key
    points stay out, and so do masks unless they are asked for. An unusable mask does not cost its box. Any other set, such
    as one that is registered with a function of the user's, is what its function returns.

    Args:
        name: of the data set.
        masks: keep the ``segmentation`` of annotations; a set of ``DATASETS.COCO_JSON`` is read once more for it. What a
            function of the user's returns stays as it is.

    Raises:
        DatasetError: a file is missing or has a fault, see :func:`.coco_custom.load_coco_json`, or its categories are not
            those that the data set is known to have.
    """
    metadata = MetadataCatalog.get(name)
    if not _in_coco_format(name):
        if masks and _read_by(name) == register_coco_json.__module__:
            return load_with_categories(Path(metadata.json_file), Path(metadata.image_root), masks=True)[0]
        if masks and _read_by(name) == load_shapes.__module__:
            return load_shapes(name, masks=True)
        return DatasetCatalog.get(name)
    check_files(name)
    json_file = Path(metadata.json_file)
    records, categories = load_with_categories(json_file, Path(metadata.image_root), published=True, masks=masks)
    _refuse_other_categories(name, categories, json_file)
    metadata.set(  # as Detectron2's reader does
        thing_classes=list(categories.values()),
        thing_dataset_id_to_contiguous_id={category: i for i, category in enumerate(categories)},
    )
    return records


def known_classes(name: str) -> list[str] | None:
    """Class names of a registered data set, from its annotation file if nothing else has them; None if nothing does.

    ``register_coco_instances`` sets them at the first reading, which would be after the classes of sets are compared.

    Raises:
        ConfigError: an unknown name.
        DatasetError: see :func:`records_of`.
    """
    names = class_names(name)
    if names is None and _in_coco_format(name):
        records_of(name)
        names = MetadataCatalog.get(name).get("thing_classes")
    return names


def used_classes(name: str) -> set[str]:
    """Names of the classes of a registered data set that have objects; all, if its files are not there to be read."""
    names = known_classes(name) or []
    try:
        check_files(name)
    except DatasetError:
        return set(names)
    return {names[x["category_id"]] for record in records_of(name) for x in record.get("annotations", [])}


def check_records(name: str) -> None:
    """Raises DatasetError if files of a data set are missing, or its annotation file is for our reader and has a fault."""
    if _in_coco_format(name):
        records_of(name)
    else:
        check_files(name)


def _in_coco_format(name: str) -> bool:
    """Whether Detectron2 would read the set with its COCO reader, from files of this machine, for detection."""
    metadata = MetadataCatalog.get(name)
    files = (metadata.get("json_file"), metadata.get("image_root"))
    local = all(path and "://" not in str(path) for path in files)
    return _read_by(name) == THEIR_READER and local and metadata.get("evaluator_type") == "coco"


def _read_by(name: str) -> str:
    """The module of the function that the data set was registered with, "" if there is no such set."""
    return getattr(DatasetCatalog[name], "__module__", "") if name in DatasetCatalog else ""


def _refuse_other_categories(name: str, categories: dict, json_file: Path) -> None:
    """Compares {category id: name} of a file with what is known of the data set, if anything."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", list(categories.values()))
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {category: i for i, category in enumerate(categories)})
    known = list(zip(sorted(ids, key=ids.get), names, strict=False))
    found = list(categories.items())
    if found != known or len(names) != len(ids):
        differing = [pair for pair in (*found, *known) if (pair in found) != (pair in known)]
        raise DatasetError(
            f"{json_file}: {len(found)} categories, but data set {name!r} has {len(names)}, and they differ in (id, name) "
            f"{differing[:5]!r:.300}; list the file in DATASETS.COCO_JSON under another name"
        )
