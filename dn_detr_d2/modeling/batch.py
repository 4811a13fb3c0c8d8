"""What a batch of Detectron2's input dicts says: how many objects, which sizes, which targets."""

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor
from torch.nn.functional import pad

from ..boxes import image_scale, xyxy_to_cxcywh
from ..errors import DatasetError
from ..structures import Targets


def matching_objects(record: dict) -> Instances:
    """What the matching queries of a training image shall find: ``instances``, with ``labels`` those of its one label."""
    objects = record["instances"]
    return objects[objects.gt_classes == record["labels"][0]] if "labels" in record else objects


def denoised_objects(record: dict) -> Instances:
    """What the denoising queries of an image stand for: ``known`` objects where they are given, else ``instances``."""
    return record["known"] if "known" in record else record["instances"]


def count_objects(batched_inputs: list[dict]) -> tuple[list[int], list[int]]:
    """Objects of each image in the matching and in the denoising part."""
    return [len(matching_objects(x)) for x in batched_inputs], [len(denoised_objects(x)) for x in batched_inputs]


def require_masks(batched_inputs: list[dict]) -> None:
    """Raises DatasetError unless the training images have ``gt_masks``."""
    for record in batched_inputs:
        if not record["instances"].has("gt_masks"):
            raise DatasetError(
                f"a model with masks trains on gt_masks, but the instances of {record.get('file_name', 'an image')} have "
                f"only {sorted(record['instances'].get_fields())}; add masks, or set MODEL.DN_DETR.MASK.ENABLED to False"
            )


def make_targets(
    instances: list[Instances],
    device: torch.device,
    min_slots: int = 1,
    padded_size: tuple[int, int] | None = None,
) -> Targets:
    """Absolute xyxy boxes of each augmented image -> padded cxcywh in [0, 1].

    Args:
        instances: with ``gt_boxes`` and ``gt_classes``, and perhaps all with ``gt_masks``.
        device: of the result.
        min_slots: of :meth:`~dn_detr_d2.structures.Targets.pad`.
        padded_size: (height, width) of the padded images in models with masks, where padding is a part of the image: boxes
            are relative to it, and masks are padded to it. None in all other models.
    """
    boxes, masks = [], []
    for image in instances:
        absolute = image.gt_boxes.tensor.to(torch.promote_types(image.gt_boxes.tensor.dtype, torch.float32))
        boxes.append(xyxy_to_cxcywh(absolute / image_scale(padded_size or image.image_size, absolute)))
        if padded_size is not None and image.has("gt_masks"):
            masks.append(padded_masks(image, padded_size))
    labels = [image.gt_classes for image in instances]
    return Targets.pad(
        labels, boxes, device, masks=masks if masks and len(masks) == len(boxes) else None, min_slots=min_slots
    )


def padded_masks(image: Instances, size: tuple[int, int]) -> Tensor:
    """(n, height, width) bool masks of the instances of an image, with nothing on the padding.

    Args:
        image: with ``gt_masks``: BitMasks, PolygonMasks or a tensor.
        size: (height, width) of the padded image.

    Raises:
        DatasetError: masks of a larger image.
    """
    masks, (height, width) = image.gt_masks, size
    if not len(image):
        return torch.zeros(0, height, width, dtype=torch.bool)
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *image.image_size)
    bits = (masks if isinstance(masks, Tensor) else masks.tensor).bool()
    if bits.shape[1] > height or bits.shape[2] > width:
        raise DatasetError(
            f"gt_masks of {bits.shape[2]}x{bits.shape[1]} pixels (width x height) belong to an image of {width}x{height} "
            "with its padding; move them with the image"
        )
    return pad(bits, (0, width - bits.shape[2], 0, height - bits.shape[1]))
