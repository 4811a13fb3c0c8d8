#!/usr/bin/env python3
"""Detections from an exported ONNX file, with NumPy, ONNX Runtime and Pillow alone: copy this file into an application.

    python onnx_predictor.py model.onnx photograph.jpg

or, in Python:

    predictor = OnnxPredictor("model.onnx")
    for one in predictor("photograph.jpg"):
        print(one.class_name, one.score, one.box)

Everything that the file must be told about - size, channels, classes - it says itself, see :attr:`OnnxPredictor.metadata`.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

KNOWN_VERSIONS = ("1", "2")  # of the metadata
STRIDE = 4  # of mask logits, in pixels of the padded image


@dataclass
class Detection:
    """One object.

    Attributes:
        class_name: its name.
        class_number: its number among the names.
        score: in [0, 1].
        box: (x0, y0, x1, y1) in pixels of the image.
        mask: (height, width) bool, or None.
    """

    class_name: str
    class_number: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class OnnxPredictor:
    """An exported file.

    Args:
        path: the ONNX file.
        providers: of ONNX Runtime, such as ["CUDAExecutionProvider"].
        threads: of ONNX Runtime; 0 = as many as there are cores.

    Attributes:
        metadata: what the file says of itself, as a dict.

    Raises:
        ValueError: the file has no metadata of this kind.
    """

    def __init__(self, path, providers=("CPUExecutionProvider",), threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        found = self.session.get_modelmeta().custom_metadata_map
        if found.get("format_version") not in KNOWN_VERSIONS:
            raise ValueError(
                f"{path} has metadata of version {found.get('format_version')}, but this program reads versions "
                f"{' and '.join(KNOWN_VERSIONS)}; export the model anew"
            )
        self.metadata = {name: text if name == "config" else json.loads(text) for name, text in found.items()}

    def __call__(self, image, threshold: float = 0.0) -> list[Detection]:
        """Objects of one image, best first.

        Args:
            image: a path, a Pillow image, or a NumPy array (height, width, 3) of uint8 in RGB.
            threshold: least score, in [0, 1].

        Raises:
            ValueError: another threshold.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        scores, classes, boxes, masks = self.arrays(image)
        names = self.metadata["class_names"]
        return [
            Detection(
                names[classes[i]],
                int(classes[i]),
                float(scores[i]),
                tuple(map(float, boxes[i])),
                None if masks is None else masks[i],
            )
            for i in range(len(scores))
            if scores[i] >= threshold
        ]

    def arrays(self, image) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """(n,) scores, (n,) class numbers, (n, 4) boxes and (n, height, width) masks or None of one image; see
        :meth:`__call__`."""
        picture = open_image(image)
        wanted = (picture.height, picture.width)
        images, size = self.prepare(picture)
        outputs = self.raw(images, np.array([size], np.int64))
        outputs = {name: x[0].astype(np.float32) for name, x in outputs.items()}
        if "masks" in outputs:
            found = self._with_masks(outputs, size, images.shape[2:], wanted)
        else:
            found = self._boxes(outputs, wanted)
        limit = self.metadata.get("nms", 1.0)
        if limit >= 1:
            return found
        kept = distinct(*found[1:3], limit)
        return tuple(None if x is None else x[kept] for x in found)

    def prepare(self, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """(1, 3, H, W) float32 for the file, and (height, width) of the image in it without padding."""
        rule, step = self.metadata["resize"], self.metadata["size_divisibility"]
        height, width = new_size(picture.height, picture.width, rule["shortest_edge"], rule["longest_edge"])
        if (height, width) != (picture.height, picture.width):
            # Pillow's bilinear filter averages where it shrinks; one that does not gives other detections.
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.float32)
        if self.metadata["channel_order"] == "BGR":
            pixels = pixels[:, :, ::-1]
        padded = np.zeros((1, 3, -(-height // step) * step, -(-width // step) * step), np.float32)
        padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        return padded, (height, width)

    def raw(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """What the file itself gives: (N, 3, H, W) float32 in 0..255 and (N, 2) int64 -> an array for each output."""
        return dict(
            zip(self.metadata["outputs"], self.session.run(None, {"images": images, "sizes": sizes}), strict=True)
        )

    def _boxes(self, outputs: dict, wanted: tuple[int, int]):
        """Scores, classes and boxes of the best detections, clipped to the image; empty boxes are left out."""
        if self.metadata["scores"] == "softmax":
            probability = softmax(outputs["logits"])[:, :-1]
            classes, scores = probability.argmax(1), probability.max(1)
            query = best(scores, self.metadata["top_k"])
            scores, classes = scores[query], classes[query]
        else:
            scores, query, classes = self._pairs(sigmoid(outputs["logits"]))
        height, width = wanted
        boxes = corners(outputs["boxes"][query]) * np.array([width, height] * 2, np.float32)
        boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return scores[kept], classes[kept], boxes[kept], None

    def _pairs(self, probability: np.ndarray):
        """(n,) scores, queries and classes of the best pairs of (Q, P) probabilities."""
        index = best(probability.reshape(-1), self.metadata["top_k"])
        query, classes = np.divmod(index, probability.shape[1])
        return probability.reshape(-1)[index], query, classes

    def _with_masks(self, outputs: dict, size, padded, wanted):
        """Instances with masks; see the class MaskPostprocess of the package."""
        rule = self.metadata["masks"]
        if "instances" not in rule["outputs"]:
            raise ValueError(f"this model gives {rule['outputs']} and no instances; use raw() and its mask logits")
        softmaxed = self.metadata["scores"] == "softmax"
        probability = softmax(outputs["logits"])[:, :-1] if softmaxed else sigmoid(outputs["logits"])
        scores, query, classes = self._pairs(probability)
        if "panoptic_seg" in rule["outputs"] and rule["things"]:
            kept = np.isin(classes, rule["things"])
            scores, query, classes = scores[kept], query[kept], classes[kept]
        distinct, place = np.unique(query, return_inverse=True)
        masks = np.zeros((len(distinct), *wanted), bool)
        means = np.zeros(len(distinct), np.float32)
        for i in range(len(distinct)):
            logits = resize(resize(outputs["masks"][distinct[i]], padded)[: size[0], : size[1]], wanted)
            masks[i] = logits > 0
            means[i] = sigmoid(logits)[masks[i]].sum() / (masks[i].sum() + 1e-6)
        if rule["score_by_mask"]:
            scores = scores * means[place]
            order = np.argsort(-scores, kind="stable")
            scores, query, classes, place = scores[order], query[order], classes[order], place[order]
        if "boxes" in outputs:
            scale = np.array([p / s * w for p, s, w in zip(padded, size, wanted, strict=True)], np.float32)
            boxes = corners(outputs["boxes"][query]) * np.tile(scale[::-1], 2)
        else:
            boxes = np.array([box_of(mask) for mask in masks], np.float32).reshape(-1, 4)[place]
        return scores, classes, boxes, masks[place]


def open_image(image) -> Image.Image:
    """A path, a Pillow image or a NumPy array as a Pillow image in RGB, turned upright as its EXIF says."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be (height, width, 3) of uint8 in RGB, got {image.dtype} {image.shape}")
        return Image.fromarray(image)
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    if picture.mode.split(";")[0] in ("I", "F"):  # conversion to RGB would make nearly all of it white
        raise ValueError(
            f"an image must have 8 bits a channel, got mode {picture.mode}; convert it, with the range that matters"
        )
    return ImageOps.exif_transpose(picture).convert("RGB")


def new_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) with the shorter side at ``shortest``, or less, so that the longer one is at most ``longest``."""
    if shortest == 0:
        return height, width
    scale = shortest / min(height, width)
    new = [shortest, scale * width] if height < width else [scale * height, shortest]
    if max(new) > longest:
        new = [x * (longest / max(new)) for x in new]
    return max(int(new[0] + 0.5), 1), max(int(new[1] + 0.5), 1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest, largest first."""
    return np.argsort(-scores, kind="stable")[:count]


def distinct(classes: np.ndarray, boxes: np.ndarray, limit: float) -> np.ndarray:
    """Indices of detections, best first, without those whose IoU with a better one of their class is above ``limit``.

    Of (n,) class numbers and (n, 4) boxes, in any one unit, in the order of their scores.
    """
    kept = []
    for i in range(len(boxes)):
        others = [j for j in kept if classes[j] == classes[i]]
        if not others or (overlaps(boxes[i], boxes[others]) <= limit).all():
            kept.append(i)
    return np.array(kept, np.int64)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n,) IoU of a box with (n, 4) others; 0 where neither has an area."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = sides.clip(0).prod(1)
    whole = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common
    return common / np.maximum(whole, 1e-9)


def corners(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) centre, width, height -> x0, y0, x1, y1."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around a bool mask; zeros for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> ``size``, bilinear between the centres of cells and without averaging, as PyTorch's interpolate does."""
    for axis, new in enumerate(size):
        old = x.shape[axis]
        place = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
        low = place.astype(np.int64)
        high, part = np.minimum(low + 1, old - 1), (place - low).astype(np.float32)
        part = part[:, None] if axis == 0 else part
        x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
    return x


def main(arguments: list[str]) -> int:
    """Prints the detections of images with a score of at least one half."""
    if len(arguments) < 2:
        print("usage: python onnx_predictor.py model.onnx image ...", file=sys.stderr)
        return 2
    predictor = OnnxPredictor(arguments[0])
    for path in arguments[1:]:
        for one in predictor(path, threshold=0.5):
            print(f"{path}: {one.class_name} {one.score:.3f} at {[round(x, 1) for x in one.box]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
