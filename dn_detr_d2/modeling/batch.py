"""What a batch of Detectron2's input dicts says: how many objects, which sizes, which targets."""

import torch
from detectron2.structures import Instances

from ..boxes import image_scale, xyxy_to_cxcywh
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


def group_by_size(batched_inputs: list[dict]) -> list[list[int]]:
    """Indices of the images of each size, so that none has to be padded for another."""
    groups = {}
    for i, image in enumerate(batched_inputs):
        groups.setdefault(image["image"].shape, []).append(i)
    return list(groups.values())


def make_targets(instances: list[Instances], device: torch.device, min_slots: int = 1) -> Targets:
    """Absolute xyxy boxes of each augmented image -> padded cxcywh in [0, 1].

    Args:
        instances: with ``gt_boxes`` and ``gt_classes``.
        device: of the result.
        min_slots: of :meth:`~dn_detr_d2.structures.Targets.pad`.
    """
    boxes = []
    for image in instances:
        absolute = image.gt_boxes.tensor.to(torch.promote_types(image.gt_boxes.tensor.dtype, torch.float32))
        boxes.append(xyxy_to_cxcywh(absolute / image_scale(image.image_size, absolute)))
    return Targets.pad([image.gt_classes for image in instances], boxes, device, min_slots=min_slots)
