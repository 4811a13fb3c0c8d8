"""DETR's target dicts as padded targets, checked.

Shapes: n objects of an image, P classes.
"""

import torch
from torch import Tensor

from ..structures import Targets

ROUNDING = 1e-3  # a box may reach out of [0, 1] by this much


def pad_targets(
    targets: list[dict[str, Tensor]], num_classes: int, device: torch.device | str | None = None
) -> Targets:
    """DETR's target dicts as padded :class:`~dn_detr_d2.structures.Targets`.

    Args:
        targets: one dict an image, see :meth:`~dn_detr_d2.QueryDenoising.forward`.
        num_classes: P.
        device: of the result; None = that of the labels.

    Raises:
        ValueError: there is no image, a tensor is missing, a shape is wrong, or a value on the CPU is outside its
            range (values on other devices are not read, because that would wait for the device).
    """
    if not targets:
        raise ValueError("there are no targets; give one dict an image, with empty tensors where it has no object")
    for i, image in enumerate(targets):
        for key in ("labels", "boxes"):
            if not isinstance(image, dict) or not isinstance(image.get(key), Tensor):
                raise ValueError(
                    f"targets are one dict an image with 'labels' and 'boxes', target {i} has no tensor {key!r}"
                )
        labels, boxes = image["labels"], image["boxes"]
        if labels.dim() != 1 or boxes.numel() != 4 * len(labels) or (len(labels) and boxes.shape != (len(labels), 4)):
            raise ValueError(
                f"target {i} must have labels (n,) and boxes (n, 4), got {tuple(labels.shape)} and {tuple(boxes.shape)}"
            )
        _check_values(i, labels, boxes.reshape(-1, 4), num_classes)
    if device is None:
        device = targets[0]["labels"].device
    return Targets.pad([x["labels"] for x in targets], [x["boxes"].reshape(-1, 4) for x in targets], device)


def _check_values(i: int, labels: Tensor, boxes: Tensor, num_classes: int) -> None:
    if labels.device.type == "cpu" and len(wrong := labels[(labels < 0) | (labels >= num_classes)]):
        raise ValueError(
            f"target {i} has the label {wrong[0].item()}, outside [0, {num_classes}); give the generator a num_classes "
            "above every label"
        )
    if boxes.device.type == "cpu":
        inside = ((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(-1)  # False for NaN
        if not inside.all():
            raise ValueError(
                f"target {i} has the box {boxes[~inside][0].tolist()}; boxes are (centre x, centre y, width, height) "
                "divided by the size of the image, so in [0, 1]"
            )
