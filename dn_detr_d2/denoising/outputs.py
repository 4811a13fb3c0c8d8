"""The forms in which decoders give their outputs: ``(logits, boxes)``, DETR's dict, or Predictions.

Shapes: K decoder layers, N images, Q queries, P logits.
"""

import torch
from torch import Tensor

from ..structures import Predictions

AUXILIARY = "aux_outputs"


def to_predictions(outputs) -> Predictions:
    """Any of the forms as :class:`~dn_detr_d2.structures.Predictions`.

    Args:
        outputs: ``(logits, boxes)`` of shapes (K, N, Q, P) and (K, N, Q, 4), or without K for a single layer; a dict with
            ``pred_logits`` (N, Q, P) and ``pred_boxes`` (N, Q, 4) of the last layer and optionally ``aux_outputs``, a list
            of such dicts of the layers before; or Predictions.

    Raises:
        TypeError: another form.
        ValueError: a key of the dict is missing, or shapes do not go together.
    """
    if isinstance(outputs, Predictions):
        return outputs
    if isinstance(outputs, dict):
        layers = [*(outputs.get(AUXILIARY) or ()), outputs]
        logits, boxes = (torch.stack([_entry(layer, key) for layer in layers]) for key in ("pred_logits", "pred_boxes"))
    elif _is_pair(outputs):
        logits, boxes = (x[None] if x.dim() == 3 else x for x in outputs)
    else:
        raise TypeError(
            "decoder outputs are (logits, boxes), or a dict with pred_logits and pred_boxes, got "
            f"{type(outputs).__name__}"
        )
    if logits.dim() != 4 or boxes.shape != (*logits.shape[:3], 4):
        raise ValueError(
            "decoder outputs have the shapes (K, N, Q, P) and (K, N, Q, 4) for K layers, got "
            f"{tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    return Predictions(logits, boxes)


def slice_outputs(outputs, part: slice):
    """``part`` of the query axis of outputs in any form, in the same form; of a dict the entries ``pred_*``."""
    if isinstance(outputs, dict):
        cut = {key: x[:, part] if key.startswith("pred_") else x for key, x in outputs.items() if key != AUXILIARY}
        if outputs.get(AUXILIARY) is not None:
            cut[AUXILIARY] = [slice_outputs(layer, part) for layer in outputs[AUXILIARY]]
        return cut
    if _is_pair(outputs):
        return tuple(x[..., part, :] for x in outputs)
    raise TypeError(
        f"decoder outputs are (logits, boxes), or a dict with pred_logits and pred_boxes, got {type(outputs).__name__}"
    )


def _is_pair(outputs) -> bool:
    return isinstance(outputs, tuple | list) and len(outputs) == 2 and all(isinstance(x, Tensor) for x in outputs)


def _entry(layer: dict, key: str) -> Tensor:
    if key not in layer:
        raise ValueError(f"the decoder's outputs have no {key!r}, but {sorted(layer)}; losses need logits and boxes")
    return layer[key]
