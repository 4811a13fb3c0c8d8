"""What a data set is evaluated by, from the config of the model."""

import logging
from collections.abc import Callable
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..coco import raw_names
from ..data import evaluated_classes
from ..data.mapper import has_queries, mask_key, trains_masks
from ..data.registered import records_of
from ..errors import DatasetError
from .coco_evaluator import TolerantCOCOEvaluator
from .panoptic_evaluator import PanopticEvaluator
from .semantic_evaluator import SemanticEvaluator

logger = logging.getLogger(__name__)


def build_evaluator(cfg, dataset_name: str) -> DatasetEvaluator:
    """Evaluators of everything that the model gives and the data set has ground truth for.

    Instances are evaluated by COCO's AP, of models with masks (Mask R-CNN too) for boxes and masks, panoptic output by
    panoptic quality, semantic output by the mean IoU. Results go to OUTPUT_DIR/inference.

    Raises:
        DatasetError: the data set has ground truth for nothing of it.
        ConfigError: a package is missing.
    """
    outputs = model_outputs(cfg)
    if not cfg.MODEL.DN_DETR.MASK.ENABLED:
        return _instances(cfg, dataset_name, [])
    records = records_of(dataset_name)
    able = [x for x in outputs if _HAS[x](records[0] if records else {})]
    if not able:
        raise DatasetError(
            f"data set {dataset_name!r} has no ground truth for MODEL.DN_DETR.MASK.OUTPUTS {outputs}; evaluate on another "
            "one, or set the outputs to what it has"
        )
    if left_out := [x for x in outputs if x not in able]:
        logger.warning("%s has no ground truth for %s, which is not evaluated", dataset_name, left_out)
    found = [_BUILDERS[x](cfg, dataset_name, records) for x in able]
    return found[0] if len(found) == 1 else DatasetEvaluators(found)


def model_outputs(cfg) -> list[str]:
    """What the model of a config gives, by Detectron2's names."""
    node = cfg.MODEL.DN_DETR.MASK
    return list(node.OUTPUTS) if node.ENABLED else ["instances"]


def main_metric(cfg) -> str:
    """The name of the result that says how good a model is: AP of boxes if it has a loss of boxes, else of masks; of models
    without instances panoptic quality or the mean IoU."""
    outputs, loss = model_outputs(cfg), cfg.MODEL.DN_DETR.LOSS
    if "instances" in outputs:
        boxes = not cfg.MODEL.DN_DETR.MASK.ENABLED or loss.L1_WEIGHT or loss.GIOU_WEIGHT
        return "bbox/AP" if boxes else "segm/AP"
    return "panoptic_seg/PQ" if "panoptic_seg" in outputs else "sem_seg/mIoU"


def _instances(cfg, name: str, _) -> DatasetEvaluator:
    return TolerantCOCOEvaluator(
        name,
        tasks=("bbox", "segm") if trains_masks(cfg) else ("bbox",),
        mask_key=mask_key(cfg),
        masks_required=has_queries(cfg),  # other detectors have boxes of their own
        output_dir=inference_folder(cfg, name),
        raw_ids=list(cfg.MODEL.DN_DETR.CLASS_NAMES) == list(raw_names()),
        model_classes=list(cfg.MODEL.DN_DETR.CLASS_NAMES),
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        max_detections=cfg.TEST.MAX_DETECTIONS_EVALUATED,
        only=evaluated_classes(cfg),
        computed_by=cfg.TEST.COCO_EVAL,
    )


def _panoptic(cfg, name: str, records: list[dict]) -> DatasetEvaluator:
    metadata = MetadataCatalog.get(name)
    things = metadata.thing_dataset_id_to_contiguous_id.values()
    classes = list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    return PanopticEvaluator(records, metadata.stuff_classes, things, model_classes=classes, name=name)


def _semantic(cfg, name: str, records: list[dict]) -> DatasetEvaluator:
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("stuff_dataset_id_to_contiguous_id", {})
    if "panoptic_json" in metadata.as_dict():
        ids = ids | metadata.thing_dataset_id_to_contiguous_id
    return SemanticEvaluator(
        records,
        metadata.stuff_classes,
        ignore_label=metadata.get("ignore_label", 255),
        output_dir=inference_folder(cfg, name),
        model_classes=list(cfg.MODEL.DN_DETR.CLASS_NAMES),
        category_ids={number: key for key, number in ids.items()} or None,
        name=name,
    )


def inference_folder(cfg, name: str) -> str:
    """Where the results of an evaluation go: ``OUTPUT_DIR/inference``, of several test sets each has a folder in it."""
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    return str(folder / name.replace("/", "_") if len(cfg.DATASETS.TEST) > 1 else folder)


# Whether a record has ground truth for an output; where there are no annotations at all, instances are written to a file.
_HAS = {
    "instances": lambda record: "annotations" in record or "sem_seg_file_name" not in record,
    "panoptic_seg": lambda record: "pan_seg_file_name" in record,
    "sem_seg": lambda record: "sem_seg_file_name" in record or "pan_seg_file_name" in record,
}
_BUILDERS: dict[str, Callable[..., DatasetEvaluator]] = {
    "instances": _instances,
    "panoptic_seg": _panoptic,
    "sem_seg": _semantic,
}
