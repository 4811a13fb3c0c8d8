"""What a batch of Detectron2's input dicts says: how many objects, which sizes, which targets."""

import math

import torch
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor
from torch.nn.functional import pad

from ..boxes import image_scale, xyxy_to_cxcywh
from ..errors import DatasetError
from ..structures import Targets


def divisor_of(size_divisibility: int, backbone: Backbone) -> int:
    """What the sides of a batch are multiples of, at least 1: of ``SIZE_DIVISIBILITY`` and of what the backbone asks for."""
    return math.lcm(max(size_divisibility, 1), max(backbone.size_divisibility, 1))


def padded_shape(
    sizes: list[tuple[int, int]], size_divisibility: int, constraints: dict[str, int] | None = None
) -> tuple[int, int]:
    """(height, width) that images of these sizes are padded to, as :class:`detectron2.structures.ImageList` pads.

    Args:
        sizes: (height, width) of each image.
        size_divisibility: both become multiples of it; 0 = any.
        constraints: ``padding_constraints`` of a Detectron2 backbone: ``square_size`` instead of the largest image where it
            is positive, ``size_divisibility`` in place of the other.
    """
    constraints = constraints or {}
    square = constraints.get("square_size", 0)
    shape = (square, square) if square > 0 else (max(h for h, _ in sizes), max(w for _, w in sizes))
    step = max(constraints.get("size_divisibility", size_divisibility), 1)
    height, width = (-(-side // step) * step for side in shape)
    return height, width


def normalised_batch(images: list[Tensor], mean: Tensor, std: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N, C, height, width) images, (x - mean) / std each, with zeros right of and below them.

    The batch is made once: images of whatever number type are copied into their places, and what is around them is the mean,
    whose normalised value is 0. Nothing is normalised or padded image by image.

    Args:
        images: (C, H, W) each, on the device of ``mean``.
        mean, std: (C, 1, 1).
        shape: (height, width) of the batch, at least that of each image.
    """
    batch = mean.new_empty((len(images), len(mean), *shape), dtype=torch.result_type(images[0], mean))
    if any(image.shape[-2:] != shape for image in images):
        batch.copy_(mean)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[-2], : image.shape[-1]].copy_(image)
    return batch.sub_(mean).div_(std)


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
        instances: with ``gt_boxes`` and ``gt_classes``, and perhaps all with ``gt_masks``, or all with ``gt_weights`` and
            ``gt_noise_factors``, see :class:`~dn_detr_d2.structures.Targets`.
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
    optional = {"masks": masks if masks and len(masks) == len(boxes) else None}
    for name in ("weights", "noise_factors"):
        if all(image.has(f"gt_{name}") for image in instances):
            optional[name] = [image.get(f"gt_{name}") for image in instances]
    return Targets.pad(labels, boxes, device, min_slots=min_slots, **optional)


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
