"""What a file must say about itself so that a program without this package can use it."""

import json
from pathlib import Path

from .. import __version__
from ..utils.files import sha256_of

FORMAT_VERSION = 1  # 2 where NMS is wanted, which readers of version 1 leave out
INPUTS = ("images", "sizes")


def output_names(model) -> list[str]:
    """Names of what :meth:`~dn_detr_d2.modeling.DenoisingDETR.forward_tensors` of a model gives, in its order."""
    return list(model.tensor_names)


def describe(cfg, model, weights: Path) -> dict[str, str]:
    """The metadata of a file, as strings; docs/export.md explains each.

    Args:
        cfg: of the model, with its classes.
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`.
        weights: the checkpoint that it was loaded from.
    """
    root = cfg.MODEL.DN_DETR
    entries = {
        "format_version": FORMAT_VERSION if cfg.TEST.NMS >= 1 else 2,
        "package_version": __version__,
        "class_names": list(root.CLASS_NAMES) or [str(i) for i in range(root.NUM_CLASSES)],
        "channel_order": cfg.INPUT.FORMAT,
        "resize": {
            "shortest_edge": cfg.INPUT.MIN_SIZE_TEST,
            "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
            "filter": "Pillow bilinear",
        },
        "normalization": {"mean": list(cfg.MODEL.PIXEL_MEAN), "std": list(cfg.MODEL.PIXEL_STD), "in_the_graph": True},
        "size_divisibility": max(model.size_divisibility, 1),
        "outputs": output_names(model),
        "scores": "softmax" if root.LOSS.CLASS_LOSS == "softmax" else "sigmoid",
        "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
        "nms": cfg.TEST.NMS,
        "weights_sha256": sha256_of(weights),
    }
    if root.MASK.ENABLED:
        entries["masks"] = {
            "outputs": list(root.MASK.OUTPUTS),
            "things": list(root.MASK.THING_CLASSES),
            "score_by_mask": root.MASK.SCORE_BY_MASK,
        }
    return {name: json.dumps(value) for name, value in entries.items()} | {"config": cfg.dump()}
