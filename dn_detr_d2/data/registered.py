"""The records of a registered data set; Detectron2's COCO sets come through our reader, like those of the config."""

from collections.abc import Collection
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError, DatasetError
from .coco_custom import check_files, class_names, load_with_categories, register_coco_json
from .panoptic import load_panoptic, register_panoptic
from .semantic import load_semantic, register_semantic
from .shapes import load_shapes

# Where Detectron2 makes the functions that read ``coco_2017_train`` and what its register_coco_instances is given.
THEIR_READER = "detectron2.data.datasets.coco"
THEIR_PANOPTIC_READER = "detectron2.data.datasets.coco_panoptic"
THEIR_SEMANTIC_READERS = ("detectron2.data.datasets.builtin", THEIR_PANOPTIC_READER)  # of ADE20K and of COCO's stuff


# Keys of DATASETS for data sets of users: what registers an entry, and what it consists of.
USERS_SETS = {
    "COCO_JSON": (register_coco_json, "name, json, image folder"),
    "COCO_PANOPTIC": (register_panoptic, "name, panoptic json, png folder, image folder"),
    "SEM_SEG": (register_semantic, "name, image folder, folder of semantic maps, file of class names"),
}


def register_data_sets(cfg, used: Collection[str], unlabeled: Collection[str] = ()) -> None:
    """Registers the data sets that the config lists; those that are used are read and must be there.

    Args:
        cfg: its ``DATASETS``.
        used: names of data sets whose annotations are used.
        unlabeled: entries whose images alone are used. A set of ``COCO_JSON`` is not registered for them: that its images
            can be read without categories is the affair of :mod:`.unlabeled`.

    Raises:
        ConfigError: an entry of another form, or a name that is taken.
        DatasetError: see the functions of ``USERS_SETS``.
    """
    for key, (register, parts) in USERS_SETS.items():
        for entry in cfg.DATASETS[key]:
            if not isinstance(entry, list | tuple) or len(entry) != parts.count(",") + 1 or not entry[0]:
                raise ConfigError(f"DATASETS.{key} takes [{parts}] entries, got {entry!r}")
            images_alone = entry[0] in unlabeled and key != "COCO_JSON"
            register(*entry, must_exist=entry[0] in used or images_alone)


def listed_sets(cfg) -> set[str]:
    """Names of the data sets that the config lists."""
    return {entry[0] for key in USERS_SETS for entry in cfg.DATASETS[key]}


def records_of(name: str, masks: bool = False) -> list[dict]:
    """Dataset dicts of a registered data set.

    Detectron2's own reader looks neither at where a ``file_name`` leads nor at what a record holds, so its detection sets
    in COCO format are read as those of ``DATASETS.COCO_JSON`` are. Images, their order, boxes and classes are the same; key
    points stay out, and so do masks unless they are asked for. An unusable mask does not cost its box. So are its panoptic
    sets (``coco_2017_train_panoptic``) and semantic ones (``ade20k_sem_seg_train``). Any other set, such as one that is
    registered with a function of the user's, is what its function returns.

    Args:
        name: of the data set.
        masks: keep the ``segmentation`` of annotations; a set of ``DATASETS.COCO_JSON`` is read once more for it. What a
            function of the user's returns stays as it is.

    Raises:
        DatasetError: a file is missing or has a fault, see :func:`.coco_custom.load_coco_json`, or its categories are not
            those that the data set is known to have.
    """
    metadata = MetadataCatalog.get(name)
    if _is_panoptic(name):
        return _panoptic_records(name)
    if _is_semantic(name):
        check_files(name)
        return load_semantic(Path(metadata.image_root), Path(metadata.sem_seg_root))
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


def _panoptic_records(name: str) -> list[dict]:
    """Those of a panoptic set of Detectron2's, whose classes must be those that Detectron2 knows of."""
    check_files(name)
    metadata = MetadataCatalog.get(name)
    files = [Path(metadata.get(key)) for key in ("panoptic_json", "panoptic_root", "image_root")]
    records, found = load_panoptic(*files)
    for key, value in found.items():
        if metadata.get(key) != value:
            raise DatasetError(
                f"{files[0]}: its {key} are {value!r:.120}, but those of data set {name!r} are {metadata.get(key)!r:.120}; "
                "list the files in DATASETS.COCO_PANOPTIC under another name"
            )
    return records


def known_things(name: str) -> list[int] | None:
    """Numbers of the classes of a data set that are things, None where it does not tell things from stuff."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "sem_seg" or not metadata.get("stuff_dataset_id_to_contiguous_id"):
        return None
    return sorted(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())


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
    if MetadataCatalog.get(name).get("evaluator_type") == "sem_seg":
        return set(names)  # to count their pixels would take too long
    try:
        check_files(name)
    except DatasetError:
        return set(names)
    return {names[x["category_id"]] for record in records_of(name) for x in record.get("annotations", [])}


def check_records(name: str) -> None:
    """Raises DatasetError if files of a data set are missing, or its annotation file is for our reader and has a fault."""
    if _in_coco_format(name) or _is_panoptic(name) or _is_semantic(name):
        records_of(name)
    else:
        check_files(name)


def _is_panoptic(name: str) -> bool:
    """Whether Detectron2 would read the set as a panoptic one, things and stuff numbered together."""
    metadata = MetadataCatalog.get(name)
    theirs = _read_by(name) == THEIR_PANOPTIC_READER and metadata.get("evaluator_type") == "coco_panoptic_seg"
    return theirs and not metadata.get("sem_seg_root")


def _is_semantic(name: str) -> bool:
    metadata = MetadataCatalog.get(name)
    theirs = _read_by(name) in THEIR_SEMANTIC_READERS and metadata.get("evaluator_type") == "sem_seg"
    return theirs and bool(metadata.get("image_root"))


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
