"""Weights, images and targets of the golden cases, made from names and a seed (see README.md)."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
EMBEDDINGS = ("refpoint", "tgt_embed", "level_embed", "query_embed")
DOUBLED = ("in_proj_weight", "qcontent_proj", "qpos_proj", "kcontent_proj", "kpos_proj", "sampling_offsets")
DOUBLED += ("attention_weights",)


def draw(name, seed):
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def weight(key, shape, seed):
    """Value of one checkpoint entry; the first rule that holds."""
    z = draw(key, seed).standard_normal(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        return 0.5 + np.abs(z)
    if len(shape) >= 2:
        if len(shape) == 2 and last == "weight" and any(part in key for part in EMBEDDINGS):
            return z
        z = z / np.sqrt(int(np.prod(shape[1:])))
        return 2 * z if any(part in key for part in DOUBLED) else z
    small = np.float32(0.1) * z
    if last == "weight":
        return 1 + small
    return small - 4 if "class_embed" in key and last == "bias" else small


def recorded(case):
    """(meta, arrays): what is stored."""
    with np.load(FOLDER / f"{case}.npz") as file:
        return json.loads((FOLDER / f"{case}.json").read_text()), dict(file)


def load(case):
    """(meta, arrays, {authors' key: array}, images uint8 CHW RGB, [(labels, cxcywh boxes)])."""
    meta, arrays = recorded(case)
    seed = meta["seed"]
    shapes = {k: tuple(v) for k, v in meta["params"].items() if not k.endswith("num_batches_tracked")}
    images, targets = [], []
    for i, ((height, width), count) in enumerate(zip(meta["image_sizes"], meta["gt_counts"], strict=True)):
        images.append(draw(f"image{i}", seed).randint(0, 256, (3, height, width)).astype(np.uint8))
        stream = draw(f"target{i}", seed)
        boxes = [stream.uniform(0.2, 0.8, (count, 2)), stream.uniform(0.05, 0.35, (count, 2))]
        labels = stream.randint(0, meta.get("num_classes", 91), count)
        targets.append((labels, np.concatenate(boxes, 1).astype(np.float32)))
    canonical = next((rename for start, rename in SHARED.items() if case.startswith(start)), str)
    return meta, arrays, {k: weight(canonical(k), shape, seed) for k, shape in shapes.items()}, images, targets


def ellipses(boxes, size):
    """(n, h, w) bool: the object in each (n, 4) float32 cxcywh box of an image of ``size`` (h, w) is the ellipse in it."""
    height, width = size
    cx, cy, w, h = boxes.astype(np.float64).T[:, :, None, None]
    y, x = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width) + 0.5) / width
    return ((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2 <= 1


def points(name, count, seed):
    """(count, 2) float32 (x, y) in [0, 1] of one kind of draw: "match", "loss" or "rest"."""
    return draw(f"points_{name}", seed).uniform(0, 1, (count, 2)).astype(np.float32)


def shared_head(key):
    """DINO's layers share their heads: every copy has the values of the first."""
    return re.sub(r"^(?:transformer\.decoder\.)?(class|bbox)_embed\.\d+", r"\1_embed.0", key)


def shared_modules(key):
    """Mask DINO has one box head and one norm under several names: the values are those of the names it owns them by."""
    key = re.sub(r"predictor\.(?:decoder\.)?bbox_embed\.\d+\.", "predictor._bbox_embed.", key)
    return key.replace("predictor.decoder.norm.", "predictor.decoder_norm.")


SHARED = {"dino_4scale": shared_head, "mask_dino": shared_modules}
