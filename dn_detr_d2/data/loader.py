"""Data loaders of training and evaluation; they log how images without boxes are treated."""

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from detectron2.data import build_detection_train_loader, print_instances_class_histogram
from detectron2.utils import comm

from ..coco import RAW_IDS, coco_names, raw_names
from ..errors import DatasetError
from .coco_custom import listed_classes, sort_key
from .interruption import evaluation_loader
from .mapper import AnnotatedDatasetMapper, DetrDatasetMapper, has_queries, mask_key, trains_masks
from .mask_check import refuse_unusable_masks
from .registered import records_of
from .semantic import is_semantic
from .stream import MixedPositions, MixedStream, Positions, StreamLoader, TrainingStream
from .summary import log_summary
from .unlabeled import UnlabeledMapper, UnlabeledStream, unlabeled_records
from .worker_process import guard

logger = logging.getLogger(__name__)


def build_train_loader(cfg):
    """An endless loader of this process's batches; logs how images without boxes are treated.

    The batches are a function of the seed and the iteration, see :mod:`.stream`; those of Detectron2's other samplers and of
    its grouping by aspect ratio are not, and a warning says so.

    Raises:
        DatasetError: no image has a box.
    """
    everything, usable = [], 0
    num_queries = cfg.MODEL.DN_DETR.NUM_QUERIES if has_queries(cfg) else 0
    for name in cfg.DATASETS.TRAIN:  # one by one; resolve_classes has checked that they have the same classes
        records = _counted_records(name, trains_masks(cfg))
        if trains_masks(cfg):
            refuse_unusable_masks(name, records, mask_key(cfg))
        usable += log_summary(name, records, num_queries)
        refuse_other_order(records, name, cfg.MODEL.DN_DETR.CLASS_NAMES)
        everything += in_model_order(records, name, cfg.MODEL.DN_DETR.CLASS_NAMES)
    empty = sum(not has_boxes(record) for record in everything)
    if empty == len(everything):
        crowds = sum(len(record.get("annotations", [])) for record in everything)
        if crowds:
            raise DatasetError(
                f"all {crowds} annotations of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} are crowds (iscrowd 1), which are "
                "not trained on; set iscrowd to 0 where they are single objects"
            )
        raise DatasetError(
            f"no image of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has a box; add images with boxes, "
            "and see what dn-detr check says of those that are there"
        )
    if not usable:
        raise DatasetError(
            f"no box of DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} can be trained on: all have no size, are not finite or "
            "lie outside their image; dn-detr check lists them"
        )
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    logger.info(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS = %s: %d of %d training images have no boxes and are %s.",
        filtered,
        empty,
        len(everything),
        "left out" if filtered else "trained on",
    )
    kept = [record for record in everything if has_boxes(record)] if filtered else everything
    mapper, node = DetrDatasetMapper(cfg, True), cfg.DATALOADER
    if not resumes_order(cfg):
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN = %s, ASPECT_RATIO_GROUPING = %s: a training that is resumed begins a new order of "
            "images; with TrainingSampler and False it would go on with its own",
            node.SAMPLER_TRAIN,
            node.ASPECT_RATIO_GROUPING,
        )
        return guard(build_detection_train_loader(cfg, dataset=kept, mapper=mapper, pin_memory=goes_to_gpu(cfg)))
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    processes = comm.get_rank(), comm.get_world_size()
    positions = Positions(cfg.SOLVER.IMS_PER_BATCH, *processes)
    stream = TrainingStream(kept, mapper, seed)
    if cfg.SEMI_SUPERVISED.ENABLED:
        stream = MixedStream(stream, UnlabeledStream(unlabeled_records(cfg), UnlabeledMapper(cfg), 0))
        others = Positions(cfg.SOLVER.IMS_PER_BATCH * cfg.SEMI_SUPERVISED.UNLABELED_RATIO, *processes)
        positions = MixedPositions(positions, others, cfg.SEMI_SUPERVISED.BURN_IN)
    return StreamLoader(stream, positions, node.NUM_WORKERS, pin_memory=goes_to_gpu(cfg))


def resumes_order(cfg) -> bool:
    """Whether a training that is resumed goes on with its own order of images: with TrainingSampler, ungrouped."""
    return cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler" and not cfg.DATALOADER.ASPECT_RATIO_GROUPING


def goes_to_gpu(cfg) -> bool:
    """Whether the images of the config's loaders go to a GPU."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def build_test_loader(cfg, dataset_name: str):
    """A loader that yields every image of a data set once, ``TEST.IMS_PER_BATCH`` at a time.

    With ``TEST.TILE`` images are not resized: their tiles are, see :mod:`dn_detr_d2.tiling`.
    """
    if cfg.TEST.TILE.SIZE:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0
    records = in_model_order(_counted_records(dataset_name), dataset_name, cfg.MODEL.DN_DETR.CLASS_NAMES)
    workers = cfg.DATALOADER.NUM_WORKERS
    pinned = goes_to_gpu(cfg)
    return evaluation_loader(records, DetrDatasetMapper(cfg, False), cfg.TEST.IMS_PER_BATCH, workers, pin_memory=pinned)


def in_model_order(records: list[dict], dataset_name: str, class_names: list[str]) -> list[dict]:
    """The records with class indices of the model instead of those of their data set, matched by name.

    Args:
        records: dataset dicts; they stay as they are.
        dataset_name: registered; if it has no class names, its numbers are taken for those of the model.
        class_names: of the model, [] if unknown. Where they are COCO's 91 raw ids, the mapper translates.

    Raises:
        DatasetError: the data set has a class that the model has not.
    """
    own = listed_classes(dataset_name)
    if list(class_names) == list(raw_names()):
        class_names = coco_names()  # from these the mapper goes on
    if not own or not class_names or list(own) == list(class_names):
        return records
    place = {name: i for i, name in enumerate(class_names)}
    used = {x["category_id"] for record in records for x in record.get("annotations", [])}
    if unknown := [name for i, name in enumerate(own) if i in used and name not in place]:
        raise DatasetError(
            f"data set {dataset_name!r} has the classes {unknown[:8]}, which the model has not: {list(class_names)[:8]}; "
            "set MODEL.DN_DETR.NUM_CLASSES to auto, or take them out of its file"
        )
    new = [place.get(name) for name in own]
    return [
        record | {"annotations": [x | {"category_id": new[x["category_id"]]} for x in record["annotations"]]}
        if record.get("annotations")
        else record
        for record in records
    ]


def refuse_other_order(records: list[dict], dataset_name: str, class_names: list[str]) -> None:
    """Raises DatasetError if the pixels of semantic maps, which are numbers of classes, are counted unlike the model's."""
    own = listed_classes(dataset_name)
    if own and class_names and list(own) != list(class_names) and any(map(is_semantic, records)):
        raise DatasetError(
            f"data set {dataset_name!r} has the classes {list(own)[:8]}, but the model counts {list(class_names)[:8]}; the "
            "pixels of semantic maps are numbers of classes, so both must be the same in the same order"
        )


def count_classes(dataset_names: Iterable[str], class_names: list[str], num_classes: int) -> list[int]:
    """Objects of each class of the model in some data sets, crowds left out.

    Args:
        dataset_names: registered.
        class_names: of the model, see :func:`in_model_order`.
        num_classes: of the model.
    """
    raw = list(class_names) == list(raw_names())
    counts = Counter()
    for name in dataset_names:
        for record in in_model_order(records_of(name), name, class_names):
            counts.update(x["category_id"] for x in record.get("annotations", []) if not x.get("iscrowd", 0))
    if raw:
        counts = Counter({RAW_IDS[index]: count for index, count in counts.items()})
    return [counts[index] for index in range(num_classes)]


def _counted_records(dataset_name: str, masks: bool = False) -> list[dict]:
    """The records of a data set that has images, with Detectron2's count of objects a class in the log."""
    records = records_of(dataset_name, masks)
    if not len(records):
        raise DatasetError(f"data set {dataset_name!r} has no images; take it out of DATASETS")
    classes = listed_classes(dataset_name)
    if classes and "annotations" in records[0]:
        print_instances_class_histogram(records, classes)
    return records


def build_probe_loader(cfg, dataset_name: str, num_images: int = 0):
    """A loader for diagnostics: annotated images without augmentation, one a batch, each on one rank only.

    Args:
        cfg: for ``INPUT.*_SIZE_TEST`` and the classes.
        dataset_name: a registered data set.
        num_images: how many, see :func:`probe_records`.
    """
    return load_annotated(cfg, probe_records(cfg, dataset_name, num_images))


def load_annotated(cfg, records: list[dict]):
    """The loader of :func:`build_probe_loader` for records that are at hand."""
    return evaluation_loader(records, AnnotatedDatasetMapper(cfg), 1, cfg.DATALOADER.NUM_WORKERS)


def build_annotated_batch(cfg, dataset_name: str, num_images: int) -> list[dict]:
    """The first images with boxes as one batch, the same on every rank."""
    mapper = AnnotatedDatasetMapper(cfg)
    with_boxes = [record for record in probe_records(cfg, dataset_name, 0) if has_boxes(record)]
    return [mapper(record) for record in with_boxes[:num_images]]


def probe_records(cfg, dataset_name: str, num_images: int) -> list[dict]:
    """A fixed choice of images: evenly spaced in the order of the image ids, so that neighbours in a film are spread.

    Args:
        cfg: for the classes of the model.
        dataset_name: a registered data set.
        num_images: how many; 0, or more than there are, means all.

    Raises:
        DatasetError: there is no image, or none of those chosen has a box.
    """
    records = records_of(dataset_name, trains_masks(cfg))
    if trains_masks(cfg):
        refuse_unusable_masks(dataset_name, records, mask_key(cfg))
    refuse_other_order(records, dataset_name, cfg.MODEL.DN_DETR.CLASS_NAMES)
    records = in_model_order(records, dataset_name, cfg.MODEL.DN_DETR.CLASS_NAMES)
    records = sorted(records, key=lambda record: sort_key(record["image_id"]))
    count = min(num_images or len(records), len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    if not any(has_boxes(record) for record in chosen):
        raise DatasetError(
            f"none of the {len(chosen)} images chosen from {dataset_name!r} has a box; there is nothing to measure, take "
            "more images or another data set"
        )
    return chosen


def has_boxes(record: dict) -> bool:
    """Whether an image has an annotation that is not a crowd, or a semantic map, which is not read for this."""
    if is_semantic(record):
        return True
    return any(not annotation.get("iscrowd", 0) for annotation in record.get("annotations", []))
