"""From a dataset dict to what the model takes: reads the image, augments it, checks the boxes.

Naming: *raw* boxes are as annotated, absolute xyxy of the image as stored; after the augmentations boxes are absolute xyxy
of the augmented image.
"""

import copy
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks

from ..coco import RAW_IDS, raw_names
from ..errors import ConfigError, DatasetError
from .augmentations import ResizeShortestEdge, training_augmentations
from .coco_custom import FIX
from .images import read_image
from .masks import boxes_of, draw_mask, has_mask
from .panoptic import panoptic_map
from .prompts import PresentLabels, build_prompts
from .segment_map import SegmentMap
from .semantic import is_semantic, semantic_map

logger = logging.getLogger(__name__)

# A box may reach out of the image by rounding; up to so many pixels it is clipped without a warning.
ROUNDING = 1.0


def has_queries(cfg) -> bool:
    """Whether the meta-architecture of the config is ours: its object queries limit the objects."""
    return cfg.MODEL.META_ARCHITECTURE == "DenoisingDETR"


def trains_masks(cfg) -> bool:
    """Whether the detector of the config takes masks in training."""
    return cfg.MODEL.DN_DETR.MASK.ENABLED if has_queries(cfg) else cfg.MODEL.MASK_ON


def mask_key(cfg) -> str:
    """Name of the key that says whether the detector of the config takes masks."""
    return "MODEL.DN_DETR.MASK.ENABLED" if has_queries(cfg) else "MODEL.MASK_ON"


class BoxChecker:
    """Sorts out boxes that cannot be trained on, and counts what it did.

    A box that is not finite, has no positive width and height, or lies outside the image is dropped; one that sticks out
    is clipped. The first box of each kind is named in a warning, and later the count at every power of ten; a box that
    is met again in a later epoch does not count again. Each loader worker counts for itself.
    """

    def __init__(self):
        self.counts = Counter()
        self._seen = set()

    def __call__(self, box: list[float], image_size: tuple[int, int], what: str) -> list[float] | None:
        """Checks one raw box.

        Args:
            box: absolute xyxy.
            image_size: (height, width) in pixels.
            what: names the annotation in the warning.

        Returns:
            The box inside the image, or None if it is dropped.
        """
        height, width = image_size
        x0, y0, x1, y1 = box
        if not np.isfinite(box).all():
            return self._report("dropped", "is not finite", box, what)
        if x1 <= x0 or y1 <= y0:
            return self._report("dropped", "has no positive width and height", box, what)
        clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)]
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            return self._report("dropped", f"lies outside its {width}x{height} image", box, what)
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > ROUNDING:
            self._report("clipped", f"sticks out of its {width}x{height} image", box, what)
        return clipped

    def _report(self, action: str, reason: str, box: list[float], what: str) -> None:
        if what in self._seen:
            return
        self._seen.add(what)
        kind = f"{action} because it {reason.split(' its ')[0]}"
        self.counts[kind] += 1
        count = self.counts[kind]
        if count == 10 ** (len(str(count)) - 1):
            shown = [round(x, 2) for x in box]
            logger.warning("%s: box %s (x0, y0, x1, y1) was %s, it %s; %d so far", what, shown, action, reason, count)


def raw_corners(annotation: dict) -> list[float]:
    """The xyxy box of an annotation, in pixels: the numbers of Detectron2's BoxMode, which makes a tensor of each box.

    Like BoxMode it adds in float32 where a number of the box is not an integer.
    """
    box, mode = annotation["bbox"], annotation["bbox_mode"]
    if mode != BoxMode.XYWH_ABS or not isinstance(box, list | tuple) or len(box) != 4:
        return [float(x) for x in BoxMode.convert(box, mode, BoxMode.XYXY_ABS)]
    numbers = np.array(box)
    if numbers.dtype.kind == "f":
        numbers = numbers.astype(np.float32)
    numbers[2:] += numbers[:2]
    return numbers.tolist() if numbers.dtype.kind == "f" else [float(x) for x in numbers]


class DetrDatasetMapper:
    """Augmentation and target checks, as a Detectron2 mapper.

    Training: the augmentation of ``INPUT.AUGMENTATION``. DETR's is a horizontal flip, then with equal chance either a
    resize, or a resize to one of ``INPUT.CROP.RESIZE``, a random crop and a resize. Otherwise only the resize of
    ``INPUT.*_SIZE_TEST``. Images leave as uint8; the model normalises them on its device. Objects are the annotations of a
    record, or the segments of its panoptic png, or the classes in its semantic map.

    Args:
        is_train: whether to augment and to attach ``instances``.
        image_format: channel order, "RGB" or "BGR".
        num_classes: P; labels must lie in [0, P). 0 = not checked.
        new_labels: label of each class of the data set, None to keep them (raw COCO ids, see :mod:`dn_detr_d2.coco`).
        masks: "polygon" or "bitmask" attaches ``gt_masks`` in this form, made from the segmentations; None = no masks. Of
            bit masks the empty ones are left out with their boxes, and boxes that a crop has cut become those of the masks.
        mask_key: the key that asks for masks, for the error where one is missing.
        fit_boxes: with bit masks, take the boxes of the masks, also where no crop has cut them (large-scale jittering).
        flips, resizes, crops: augmentations; ``crops`` stand before ``resizes`` in the crop branch, [] = no such branch.
        prompts: what to tell the model beforehand, from the objects of an image, also outside of training; None = nothing.
            See :mod:`.prompts`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        image_format: str,
        num_classes: int,
        new_labels: tuple[int, ...] | None = None,
        masks: str | None = None,
        mask_key: str = "MODEL.MASK_ON",
        fit_boxes: bool = False,
        flips: list[T.Augmentation],
        resizes: list[T.Augmentation],
        crops: list[T.Augmentation],
        prompts: Callable[[Instances], dict] | None = None,
    ):
        self.is_train, self.prompts, self.fit_boxes = is_train, prompts, fit_boxes
        self.image_format = image_format
        self.num_classes, self.new_labels, self.masks, self.mask_key = num_classes, new_labels, masks, mask_key
        self.plain = T.AugmentationList([*flips, *resizes])
        self.cropping = T.AugmentationList([*flips, *crops, *resizes]) if crops else None
        self.check_box = BoxChecker()

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict:
        """Constructor arguments from ``INPUT`` and ``MODEL.DN_DETR.NUM_CLASSES``."""
        node, resize = cfg.INPUT, ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
        augmentations = training_augmentations(cfg) if is_train else {"flips": [], "resizes": [resize], "crops": []}
        # Models of this project compare masks at points, for which polygons would be drawn anyhow.
        form = "bitmask" if has_queries(cfg) else node.MASK_FORMAT
        masks = form if trains_masks(cfg) else None
        cuts = augmentations["crops"] or (is_train and node.AUGMENTATION != "detr")
        if masks == "polygon" and cuts and importlib.util.find_spec("shapely") is None:
            raise ConfigError(
                f"INPUT.MASK_FORMAT = 'polygon' with INPUT.CROP.ENABLED True or INPUT.AUGMENTATION = {node.AUGMENTATION!r} "
                "needs the package shapely, which cuts polygons; set MASK_FORMAT to bitmask, or install shapely"
            )
        return {
            "is_train": is_train,
            "image_format": node.FORMAT,
            "num_classes": cfg.MODEL.DN_DETR.NUM_CLASSES or 0,
            "new_labels": RAW_IDS if list(cfg.MODEL.DN_DETR.CLASS_NAMES) == list(raw_names()) else None,
            "masks": masks,
            "mask_key": mask_key(cfg),
            "fit_boxes": is_train and node.AUGMENTATION != "detr",
            **augmentations,
            "prompts": build_prompts(cfg, draw=is_train),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """One Detectron2 dataset dict -> the same with ``image`` (3, H, W) uint8 and, in training, ``instances``.

        Their ``gt_index`` is the index of each box among the annotations of the record, or the class in a semantic map. With
        prompts also ``known`` or ``labels``.

        Raises:
            DatasetError: the image cannot be read or has another size than annotated, a label is out of range, a mask is
                asked for that is not there, or a panoptic png or semantic map does not fit.
        """
        record = dict(dataset_dict)  # nothing below changes what is in it
        image = read_image(record["file_name"], self.image_format, partial(self._check_size, record))
        size = image.shape[:2]
        self._check_size(record, size)  # what was decoded, after what the header said
        annotated = self.is_train or self.prompts is not None
        segments = self._segments(record, size) if annotated else None
        raw = self._raw_boxes(record, size) if annotated and segments is None else ([], [], [])
        annotations = record.pop("annotations", [])

        crop = self.cropping is not None and np.random.rand() < 0.5
        augmented = T.AugInput(image, sem_seg=segments and segments.pixels)
        transforms = (self.cropping if crop else self.plain)(augmented)
        record["image"] = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if segments is not None:
            objects = segments.instances(augmented.sem_seg)
            if self.masks is None:
                objects.remove("gt_masks")
            record |= self._given(objects)
        elif annotated:
            objects = self._instances(*raw, transforms, augmented.image.shape[:2])
            if self.masks is not None:
                objects.gt_masks = self._masks(record["file_name"], objects, annotations, transforms, size)
            if self.masks == "bitmask":
                objects = fitted_to_masks(objects, boxes=crop or self.fit_boxes)
            record |= self._given(objects)
        return record

    def _segments(self, record: dict, size: tuple[int, int]) -> SegmentMap | None:
        """The objects of a record that are pixels of a panoptic png or of a semantic map; None if they are annotations."""
        if "pan_seg_file_name" in record and "annotations" in record:
            segments = [(i, label) for i, label, *_ in self._labelled(record)]
            return panoptic_map(record, size, segments)
        if is_semantic(record):
            return semantic_map(record, size, self.num_classes)
        return None

    def _given(self, objects: Instances) -> dict:
        """Prompts, and in training what is to be found."""
        given = {"instances": objects} if self.prompts is None else self.prompts(objects)
        return given if self.is_train else {key: x for key, x in given.items() if key != "instances"}

    @staticmethod
    def _check_size(record: dict, size: tuple[int, int]) -> None:
        annotated = (record.setdefault("height", size[0]), record.setdefault("width", size[1]))
        if annotated == tuple(size):
            return
        if annotated == tuple(size[::-1]):
            way_out = (
                "if it was annotated without its EXIF orientation, take that out of the file (exiftool -Orientation= FILE); "
                f"if the two numbers alone are exchanged, {FIX} --wrong-size ignore corrects them"
            )
        else:
            way_out = (
                f"{FIX} with --wrong-size ignore corrects the size, and with --wrong-size scale also moves the boxes of "
                "an image that was resized"
            )
        raise DatasetError(
            f"image {record['file_name']} is {size[1]}x{size[0]} (after EXIF orientation), but its annotation says "
            f"{annotated[1]}x{annotated[0]} (width x height); {way_out}"
        )

    def _raw_boxes(self, record: dict, image_size: tuple[int, int]) -> tuple[list[list[float]], list[int], list[int]]:
        """Checked boxes, absolute xyxy, their labels and annotation numbers; crowds are left out, as all DETRs do."""
        boxes, labels, numbers = [], [], []
        for i, label, annotation, what in self._labelled(record):
            box = self.check_box(raw_corners(annotation), image_size, what)
            if box is not None:
                boxes.append(box)
                labels.append(label)
                numbers.append(i)
        return boxes, labels, numbers

    def _labelled(self, record: dict) -> Iterator[tuple[int, int, dict, str]]:
        """(number, label of the model, annotation, its name in errors) of annotations that are no crowds."""
        for i, annotation in enumerate(record.get("annotations", [])):
            if annotation.get("iscrowd", 0):
                continue
            what = f"{record['file_name']}, annotation {annotation.get('id', f'number {i}')}"
            label = annotation["category_id"]
            if self.new_labels is not None and 0 <= label < len(self.new_labels):
                label = self.new_labels[label]
            if label < 0 or (self.num_classes and label >= self.num_classes):
                raise DatasetError(
                    f"{what} has class index {label}, but MODEL.DN_DETR.NUM_CLASSES = {self.num_classes} allows 0 to "
                    f"{self.num_classes - 1}"
                )
            yield i, label, annotation, what

    @staticmethod
    def _instances(boxes, labels, numbers, transforms: T.TransformList, image_size: tuple[int, int]) -> Instances:
        """Boxes moved with the image and clipped to it; what a crop has cut away entirely is left out."""
        moved = transforms.apply_box(np.array(boxes, dtype=np.float64).reshape(-1, 4))
        gt_boxes = Boxes(torch.from_numpy(moved).float())
        gt_boxes.clip(image_size)
        gt_classes, gt_index = (torch.tensor(column, dtype=torch.int64) for column in (labels, numbers))
        keep = gt_boxes.nonempty()
        return Instances(image_size, gt_boxes=gt_boxes[keep], gt_classes=gt_classes[keep], gt_index=gt_index[keep])

    def _masks(self, file_name: str, instances: Instances, annotations: list[dict], transforms, size):
        """Detectron2's PolygonMasks or BitMasks of the instances, moved with the image; ``size`` is that of the file."""
        moved, masks = instances.image_size, []
        bits = np.zeros((len(instances) if self.masks == "bitmask" else 0, *moved), bool)
        for row, i in enumerate(instances.gt_index.tolist()):
            what = f"{file_name}, annotation {annotations[i].get('id', f'number {i}')}"
            if not has_mask(annotations[i]):
                raise DatasetError(
                    f"{what} has no segmentation, but {self.mask_key} is True; set it to False, or add the mask"
                )
            try:
                if self.masks == "bitmask":
                    draw_mask(bits[row], annotations[i]["segmentation"], transforms, size)
                else:
                    moving = copy.deepcopy(annotations[i])  # Detectron2 writes into it
                    polygons = detection_utils.transform_instance_annotations(moving, transforms, moved)
                    masks.append(detection_utils.annotations_to_instances([polygons], moved, self.masks).gt_masks)
            except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise DatasetError(
                    f"{what} has a segmentation that cannot be used as a {self.masks}: {reason}; use "
                    "INPUT.MASK_FORMAT bitmask for run lengths, and correct or take out what is neither polygons nor "
                    "run lengths"
                ) from None
        if self.masks == "bitmask":
            return BitMasks(torch.from_numpy(bits))
        return PolygonMasks.cat(masks) if masks else PolygonMasks([])


def fitted_to_masks(instances: Instances, boxes: bool) -> Instances:
    """The instances whose bit mask is not empty; with ``boxes`` their boxes are those of the masks."""
    around, kept = boxes_of(instances.gt_masks.tensor.numpy())
    if boxes:
        instances.gt_boxes = Boxes(torch.from_numpy(around))
    return instances if kept.all() else instances[torch.from_numpy(kept)]


class AnnotatedDatasetMapper(DetrDatasetMapper):
    """Images as evaluation sees them, resized by ``INPUT.*_SIZE_TEST``, with the targets that training sees.

    Known objects are set apart; labels are not told.
    """

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments of the test-time mapper that also attaches ``instances``."""
        arguments = super().from_config(cfg, False)
        if isinstance(arguments["prompts"], PresentLabels):
            arguments["prompts"] = None
        return arguments | {"is_train": True}
