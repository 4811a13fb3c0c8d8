"""COCO's AP. The ground truth is the records that training and evaluation have read, not a second reading of the file."""

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt, COCOevalMaxDets
from detectron2.structures import BoxMode, PolygonMasks
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..coco import NUM_RAW_CLASSES, RAW_IDS, raw_names
from ..data.columns import VERDICTS, clip_boxes, judge_boxes
from ..data.interruption import agree, without_exchange
from ..data.mask_check import refuse_unusable_masks
from ..data.masks import encoded, has_mask
from ..data.normalise import is_id, sort_key, usable_area
from ..data.panoptic import read_panoptic_png
from ..data.registered import records_of
from ..errors import ConfigError, DatasetError
from ..utils.files import atomic_write
from ..utils.requirements import is_installed
from .confusion import IOU_THRESHOLD, count_confusions
from .panoptic_evaluator import require_same_size
from .precision_recall import write_precision_recall

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"  # in OUTPUT_DIR/inference
LIMITS = (1, 10, 100)  # detections of an image and class that COCO counts
LEFT_OUT = 3  # VERDICTS up to here: training drops the box, and no detection can match it
# Ground truth is replaced by what a model can give for it, in float32 and inside the image, if their IoU is below this.
ALIKE = 0.96  # above the highest threshold of COCO; rounding in its own files leaves more


class _COCOeval(COCOeval_opt):
    """Detectron2's fast COCOeval, whose summary names the number of detections that is counted."""

    summarize = COCOevalMaxDets.summarize


def eval_class(name: str, *, usual: bool) -> Callable:
    """What makes a COCOeval from ground truth, detections and the kind of IoU.

    Args:
        name: as ``TEST.COCO_EVAL``.
        usual: whether COCO's numbers of detections are counted.
    """
    if name == "faster_coco_eval":
        from faster_coco_eval import COCOeval_faster

        kind = type("_FasterCOCOeval", (COCOeval_faster,), {"summarize": COCOevalMaxDets.summarize})
        return partial(kind, extra_calc=False)  # which would write into the annotations
    return COCOeval_opt if usual else _COCOeval


class RecordsEvaluator(COCOEvaluator):
    """COCO's AP on Detectron2's dataset dicts, of boxes, and of masks where they are asked for.

    Numbers are Detectron2's on a file without faults. Ids may be of any kind. Boxes that training drops, because they are
    not finite, have no size or lie outside their image, are left out with a warning, crowds too where they have no size.
    A box that sticks out of its image by more than training clips in silence is clipped, and so are the detections in its
    image. Without annotations, predictions are written and there are no results. A crowd without a mask has its box as one.

    Args:
        records: dicts with ``image_id``, ``height`` and ``width`` where known, and ``annotations`` with ``bbox``,
            ``bbox_mode``, ``category_id`` in 0 .. P-1, and where known ``iscrowd`` and ``area``.
        class_names: of the P classes; None = no AP of each class.
        category_ids: the P ids that ``coco_instances_results.json`` names classes by; None = 0 .. P-1.
        distributed: whether to collect the predictions of all processes.
        output_dir: of ``coco_instances_results.json``, ``instances_predictions.pth`` and, where there are annotations,
            ``confusion_matrix.json`` (see :func:`.confusion.count_confusions`); None = not written.
        raw_ids: the model predicts COCO's 91 raw ids; detections of unused ids are left out.
        model_classes: names of the classes that the model predicts, where they are others or in another order than
            ``class_names``; detections of those that are not among them are left out.
        detections_per_image: that the model gives.
        max_detections: of an image and class that AP counts; 0 = 100, and ``detections_per_image`` or the objects of the
            fullest image, whichever is more, where an image has more than 100 objects of one class.
        name: of the data set, for messages.
        only: names of the classes that AP is averaged over, their numbers where there are no names; [] = all.
        masks: whether to evaluate masks (``segm``) too; annotations then have a ``segmentation``.
        computed_by: "pycocotools" or "faster_coco_eval", which give the same numbers; the second is a package of its own.

    Raises:
        DatasetError: a record has no image id, or one that another has, or ``only`` names a class that is not there.
        ConfigError: the package of ``computed_by`` is not installed.
    """

    def __init__(
        self,
        records: list[dict],
        class_names: list[str] | None = None,
        category_ids: list | None = None,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        raw_ids: bool = False,
        model_classes: list[str] | None = None,
        detections_per_image: int = 0,
        max_detections: int = 0,
        name: str = "the data set",
        only: Sequence[str] = (),
        masks: bool = False,
        computed_by: str = "pycocotools",
    ):
        if computed_by == "faster_coco_eval" and not is_installed(computed_by):
            raise ConfigError(
                f"TEST.COCO_EVAL is {computed_by!r}, but the package is not installed; pip install 'dn_detr_d2[fast-eval]', "
                "or set it to 'pycocotools'"
            )
        self._computed_by = computed_by
        self._logger, self._cpu_device = logger, torch.device("cpu")
        self._distributed, self._output_dir = distributed, output_dir
        self._tasks = ("bbox", "segm") if masks else ("bbox",)
        if all(is_id(record.get("image_id")) for record in records):  # the order in which COCO breaks ties of scores
            records = sorted(records, key=lambda record: sort_key(record["image_id"]))
        self._name, self._records, self._class_names = name, records, class_names
        labels = [x["category_id"] for record in records for x in record.get("annotations", [])]
        count = len(class_names or category_ids or []) or max(labels, default=-1) + 1
        self._category_ids = list(range(count)) if category_ids is None else list(category_ids)
        self._open = not class_names and category_ids is None  # nobody says how many classes there are
        self._contiguous, self._masks = None, masks
        predicted = list(raw_names()) if raw_ids else list(model_classes or class_names or [])
        if class_names and predicted != list(class_names):
            place = {x: i for i, x in enumerate(class_names)}
            self._contiguous = torch.tensor([place.get(x, -1) for x in predicted])
        elif raw_ids:
            self._contiguous = torch.full((NUM_RAW_CLASSES,), -1)
            self._contiguous[list(RAW_IDS)] = torch.arange(len(RAW_IDS))
        self._rows = {}
        for row, record in enumerate(records):
            if "image_id" not in record or record["image_id"] in self._rows:
                raise DatasetError(
                    f"record number {row} of {name} has image_id {record.get('image_id')!r:.60}; each needs one of its own"
                )
            self._rows[record["image_id"]] = row
        self._do_evaluation = any("annotations" in record for record in records)
        self._segments = lru_cache(1)(read_panoptic_png)  # one image's annotations follow each other
        self._set_ground_truth()
        self._limits = self._choose_limits(detections_per_image, max_detections)
        self._only = self._chosen_categories(only)

    def process(self, inputs, outputs) -> None:
        """Takes the detections of a batch."""
        if self._contiguous is not None:
            outputs = [self._make_contiguous(output["instances"].to("cpu")) for output in outputs]
        super().process(inputs, outputs)
        for image, output, prediction in zip(inputs, outputs, self._predictions[-len(inputs) :], strict=True):
            if "height" in image and "width" in image:
                prediction["size"] = (image["height"], image["width"])
            elif self._masks:
                prediction["size"] = output["instances"].image_size

    def evaluate(self, img_ids=None):
        """As Detectron2's; raises Interrupted on all ranks if the training is to stop, see :mod:`..data.interruption`."""
        agree()
        return super().evaluate(img_ids)

    def _set_ground_truth(self, sizes: dict | None = None) -> None:
        """Makes the COCO object, with masks once there are ``sizes``.

        Args:
            sizes: {image id: (height, width)} that were seen, for records that have none.
        """
        rows, boxes, annotations = [], [], []
        shapes = np.array([_size_of(x, (sizes or {}).get(x["image_id"])) for x in self._records]).reshape(-1, 2)
        for row, record in enumerate(self._records):
            for annotation in record.get("annotations", []):
                rows.append(row)
                boxes.append(xywh_of(annotation))
                annotations.append(annotation)
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        with np.errstate(over="ignore", invalid="ignore"):
            corners = boxes.astype(np.float32)
            corners[:, 2:] += corners[:, :2]
        verdicts = judge_boxes(corners, shapes[rows].astype(np.float32))
        attainable = clip_boxes(corners, shapes[rows].astype(np.float32)).astype(np.float32)
        attainable[:, 2:] -= attainable[:, :2]
        crowd = np.array([bool(x.get("iscrowd", 0)) for x in annotations], bool)
        dropped = ((verdicts > 0) & (verdicts <= LEFT_OUT) & ~crowd) | (np.isin(verdicts, (1, 2)) & crowd)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            replaced = ~dropped & ~crowd & ~(_iou(boxes, attainable.astype(np.float64)) >= ALIKE)
        boxes[replaced] = attainable[replaced]
        self._clipped = {int(row) for row in np.array(rows, np.int64)[replaced]}
        self._dropped = Counter(VERDICTS[code] for code in verdicts[dropped])
        self._counts = Counter()
        entries = []
        for i in np.flatnonzero(~dropped).tolist():
            image_id, category_id = rows[i] + 1, annotations[i]["category_id"] + 1
            entry = {
                "id": len(entries) + 1,  # from 1: COCOeval takes the id 0 for "not matched"
                "image_id": image_id,
                "category_id": category_id,
                "bbox": boxes[i].tolist(),
                "area": _area(annotations[i], boxes[i]),
                "iscrowd": int(crowd[i]),
            }
            if self._masks and sizes is not None and np.isfinite(shapes[rows[i]]).all():
                size = tuple(int(side) for side in shapes[rows[i]])
                entry["segmentation"] = self._mask_of(self._records[rows[i]], annotations[i], boxes[i], size)
            entries.append(entry)
            self._counts[image_id, category_id] += not crowd[i]
        self._coco_api = COCO()
        self._coco_api.dataset = {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(shapes.tolist(), 1)],
            "categories": [
                {"id": i + 1, "name": str(x)} for i, x in enumerate(self._class_names or self._category_ids)
            ],
        } | ({"annotations": entries} if self._do_evaluation else {})
        self._create_index()

    def _mask_of(self, record: dict, annotation: dict, box: np.ndarray, size: tuple[int, int]) -> dict:
        """Run lengths of the mask of an annotation, of its segment, or of the box of a crowd that has neither."""
        mask, (x, y, width, height) = annotation.get("segmentation"), box.tolist()
        if "pan_seg_file_name" in record:
            mask = self._segments(record["pan_seg_file_name"]) == annotation["id"]
            require_same_size(record["pan_seg_file_name"], mask.shape, size)
        elif annotation.get("iscrowd", 0) and not has_mask(annotation):
            mask = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        try:
            return encoded(mask, size)
        except ValueError as fault:
            raise DatasetError(
                f"{self._name}: the mask of annotation {annotation.get('id')!r:.60} cannot be evaluated: {fault}"
            ) from None

    def _create_index(self) -> None:
        """As ``COCO.createIndex``, which prints."""
        api, data = self._coco_api, self._coco_api.dataset
        api.imgs = {image["id"]: image for image in data["images"]}
        api.cats = {category["id"]: category for category in data["categories"]}
        for annotation in data.get("annotations", []):
            api.anns[annotation["id"]] = annotation
            api.imgToAnns[annotation["image_id"]].append(annotation)
            api.catToImgs[annotation["category_id"]].append(annotation["image_id"])

    def _choose_limits(self, detections_per_image: int, max_detections: int) -> list[int]:
        """[1, 10, detections of an image and class that AP counts]."""
        (row, category), fullest = max(self._counts.items(), key=lambda x: x[1], default=((0, 0), 0))
        limit = max_detections or (LIMITS[-1] if fullest <= LIMITS[-1] else max(fullest, detections_per_image))
        if fullest > LIMITS[-1]:
            logger.warning(
                "%s: image %r has %d objects of class %r, COCO's AP counts %d detections of an image and class; here %d "
                "are counted (TEST.MAX_DETECTIONS_EVALUATED = %d)",
                *(self._name, self._records[row - 1]["image_id"], fullest, self._name_of(category), LIMITS[-1], limit),
                max_detections,
            )
        objects = Counter()
        for (image, _), count in self._counts.items():
            objects[image] += count
        row, most = max(objects.items(), key=lambda x: x[1], default=(0, 0))
        if 0 < detections_per_image < most:
            logger.warning(
                "%s: image %r has %d objects, but TEST.DETECTIONS_PER_IMAGE = %d detections are kept: not all can be found",
                *(self._name, self._records[row - 1]["image_id"], most, detections_per_image),
            )
        return [*LIMITS[:2], limit]

    def _chosen_categories(self, only: Sequence[str]) -> list[int]:
        """Ids of the COCO object for the classes of these names, in the order of the data set; [] = all."""
        names = [str(x) for x in self._class_names or range(len(self._category_ids))]
        if unknown := [x for x in only if x not in names]:
            raise DatasetError(
                f"AP is to be averaged over {unknown[:8]}, but {self._name} has the classes {names[:8]}; name some "
                "of these in TEST.AP_CLASSES"
            )
        if only:
            logger.info("%s: AP is averaged over the classes %s", self._name, list(only))
        return [i + 1 for i, x in enumerate(names) if x in only]

    def _name_of(self, category: int) -> str:
        return self._coco_api.cats[category]["name"] if category in self._coco_api.cats else str(category)

    def _eval_predictions(self, predictions, img_ids=None) -> None:
        """Evaluates in the order of the data set, whichever process predicted what.

        Raises:
            DatasetError: an image of the data set has no predictions or several, which would change AP in silence.
        """
        wanted = {image: self._rows[image] for image in (img_ids or self._rows)}
        counts = Counter(prediction["image_id"] for prediction in predictions)
        missing = [image for image in wanted if image not in counts]
        wrong = [image for image, count in counts.items() if count > 1 or image not in wanted]
        if missing or wrong:
            raise DatasetError(
                f"an evaluation must see each of {len(wanted)} images once: {len(missing)} were not seen {missing[:5]}, "
                f"{len(wrong)} several times or are not of the data set {wrong[:5]}; look at the test loader"
            )
        ordered = sorted(predictions, key=lambda x: wanted[x["image_id"]])
        results = list(itertools.chain(*[prediction["instances"] for prediction in ordered]))
        self._refuse_unknown_classes(results)
        if self._output_dir:
            written = [x | {"category_id": self._category_ids[x["category_id"]]} for x in results]
            path = os.path.join(self._output_dir, RESULTS)
            logger.info("Saving results to %s", path)
            with atomic_write(path, "w") as file:
                json.dump(written, file, default=_plain)
        if not self._do_evaluation:
            logger.warning("%s has no annotations: predictions are written, AP cannot be computed", self._name)
            return
        sizes = {x["image_id"]: x["size"] for x in predictions if "size" in x}
        self._set_ground_truth(sizes)
        if self._dropped:
            logger.warning(
                "%s: boxes that no detection can match are left out of the ground truth: %s; see dn-detr check",
                self._name,
                "; ".join(f"{count} x {kind}" for kind, count in self._dropped.items()),
            )
        numbered = [self._inside(x, sizes) for x in results]
        rows = sorted(row + 1 for row in wanted.values())
        with without_exchange():  # minutes on large data sets, while the other ranks wait
            evaluated = {task: self._evaluated(numbered, rows, task) for task in self._tasks}
            self._write_confusions(numbered, rows)
        chosen = self._only or range(1, len(self._category_ids) + 1)
        names = self._class_names and [self._class_names[i - 1] for i in chosen]
        for task, evaluation in evaluated.items():
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
            if self._output_dir:
                labels = [self._name_of(i) for i in chosen]
                write_precision_recall(self._output_dir, task, evaluation, labels)

    def _refuse_unknown_classes(self, results: list[dict]) -> None:
        found = max((x["category_id"] for x in results), default=-1)
        if self._open:
            self._category_ids = list(range(max(found + 1, len(self._category_ids))))
        if found >= len(self._category_ids):
            raise DatasetError(
                f"the model predicts class {found}, but {self._name} has {len(self._category_ids)} classes; evaluate it "
                "with the weights of the same classes"
            )

    def _inside(self, result: dict, sizes: dict) -> dict:
        """A detection with the ids of the COCO object, clipped where the ground truth of its image is."""
        row = self._rows[result["image_id"]]
        box = result["bbox"]
        if row in self._clipped:
            shape = np.array([_size_of(self._records[row], sizes.get(result["image_id"]))], np.float32)
            corners = np.array([box], np.float32)
            corners[:, 2:] += corners[:, :2]
            clipped = clip_boxes(corners, shape).astype(np.float32)
            clipped[:, 2:] -= clipped[:, :2]
            box = clipped[0].tolist() if not np.array_equal(clip_boxes(corners, shape), corners) else box
        return result | {"image_id": row + 1, "category_id": result["category_id"] + 1, "bbox": box}

    def _evaluated(self, results: list[dict], image_ids: list[int], task: str) -> COCOeval_opt:
        """COCOeval, summarised; sizes of detections are those of their boxes, or of their masks in ``segm``."""
        left_out = "bbox" if task == "segm" else "segmentation"
        results = [{key: value for key, value in x.items() if key != left_out} for x in results]
        ground_truth = copy.copy(self._coco_api)
        found = ground_truth.loadRes(results) if results else _without_detections(ground_truth)
        usual = self._limits == list(LIMITS)
        evaluation = eval_class(self._computed_by, usual=usual)(ground_truth, found, task)
        evaluation.params.imgIds = image_ids
        evaluation.params.catIds = self._only or evaluation.params.catIds
        evaluation.params.maxDets = list(self._limits)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    def _write_confusions(self, results: list[dict], image_ids: list[int]) -> None:
        if self._output_dir:
            objects = [x for image in image_ids for x in self._coco_api.imgToAnns[image]]
            names = [category["name"] for category in self._coco_api.dataset["categories"]]
            matrix = count_confusions(objects, results, len(self._category_ids)).tolist()
            with atomic_write(os.path.join(self._output_dir, "confusion_matrix.json"), "w") as file:
                json.dump({"iou_threshold": IOU_THRESHOLD, "classes": names, "matrix": matrix}, file)

    def _make_contiguous(self, instances) -> dict:
        known = instances[self._contiguous[instances.pred_classes] >= 0]
        known.pred_classes = self._contiguous[known.pred_classes]
        return {"instances": known}


class TolerantCOCOEvaluator(RecordsEvaluator):
    """:class:`RecordsEvaluator` for a registered data set; of a panoptic one AP is averaged over the things.

    Args:
        dataset_name: its records, class names and category ids are taken.
        tasks: ("bbox",), or ("bbox", "segm") for masks too.
        distributed, output_dir, options: as for RecordsEvaluator.
        mask_key: of the config, which asks for masks; for messages.
        masks_required: whether a data set whose objects lack masks is refused; otherwise a warning says that its boxes alone
            are evaluated.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...] = ("bbox",),
        distributed: bool = True,
        output_dir: str | None = None,
        mask_key: str = "MODEL.DN_DETR.MASK.ENABLED",
        masks_required: bool = True,
        **options,
    ):
        if tuple(tasks) not in (("bbox",), ("bbox", "segm")):
            raise DatasetError(f"tasks must be ('bbox',) or ('bbox', 'segm'), got {tasks!r}")
        masks = "segm" in tasks
        records, metadata = records_of(dataset_name, masks), MetadataCatalog.get(dataset_name)
        names, ids = written_classes(dataset_name)
        if "panoptic_json" not in metadata.as_dict():
            masks = masks and _has_masks(dataset_name, records, mask_key, masks_required)
        elif things := metadata.get("thing_dataset_id_to_contiguous_id"):
            options["only"] = options.get("only") or [names[i] for i in sorted(things.values())]
        super().__init__(
            records,
            names,
            ids,
            distributed=distributed,
            output_dir=output_dir,
            name=dataset_name,
            masks=masks,
            **options,
        )


def _has_masks(name: str, records: list[dict], key: str, required: bool) -> bool:
    """Whether the objects of a data set have masks; says so where they lack them, or raises DatasetError."""
    try:
        refuse_unusable_masks(name, records, key)
    except DatasetError as error:
        if required:
            raise
        logger.warning("AP of masks is not computed: %s", error)
        return False
    return True


def _without_detections(ground_truth: COCO) -> COCO:
    """What ``loadRes`` would give for no results at all, of which it reads the first."""
    found = COCO()
    found.dataset = {key: ground_truth.dataset[key] for key in ("images", "categories")} | {"annotations": []}
    with contextlib.redirect_stdout(io.StringIO()):  # as loadRes is called
        found.createIndex()
    return found


def written_classes(dataset_name: str) -> tuple[list[str] | None, list | None]:
    """The classes of a registered data set whose records have been read, None where nothing says so.

    Returns:
        tuple: their P names; the P ids that ``coco_instances_results.json`` names them by.
    """
    metadata = MetadataCatalog.get(dataset_name)
    ids, names = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("thing_classes")
    if ids and "panoptic_json" in metadata.as_dict():
        ids = metadata.stuff_dataset_id_to_contiguous_id | ids
    return list(names) if names else None, sorted(ids, key=ids.get) if ids else None


def _size_of(record: dict, seen: tuple | None) -> tuple[float, float]:
    """(height, width) of a record, of the image that was seen, or infinite."""
    if "height" in record and "width" in record:
        return record["height"], record["width"]
    return seen or (np.inf, np.inf)


def xywh_of(annotation: dict) -> list[float]:
    """The box of an annotation of a dataset dict as COCO writes it, in pixels."""
    box = [float(x) for x in annotation["bbox"]]
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        return box
    x0, y0, x1, y1 = BoxMode.convert(box, BoxMode(annotation["bbox_mode"]), BoxMode.XYXY_ABS)
    return [x0, y0, x1 - x0, y1 - y0]


def _area(annotation: dict, box: np.ndarray) -> float:
    """The annotation's own area, that of its mask if it has a usable one, or that of its box, in pixels."""
    area = usable_area(annotation.get("area"))
    if area is None:
        area = usable_area(_mask_area(annotation.get("segmentation")))
    return area if area is not None else float(min(box[2] * box[3], 1e10))


def _mask_area(mask) -> float | None:
    try:
        if isinstance(mask, list) and mask:
            return float(PolygonMasks([mask]).area()[0])
        if isinstance(mask, dict):
            counts = mask["counts"]
            return float(sum(counts[1::2]) if isinstance(counts, list) else mask_util.area(mask))
    except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError):
        pass  # an unusable mask does not cost its box
    return None


def _plain(value):
    """NumPy's numbers, which data sets that are registered with a function may have as ids, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"image id {value!r:.60} of type {type(value).__name__} cannot be written to JSON; use int or str")


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(A,) IoU of (A, 4) xywh boxes with (A, 4) others, pair by pair."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    return common / (first[:, 2:].prod(1) + second[:, 2:].prod(1) - common)
