"""How settled the matching is, from probes: pure functions on arrays.

Shapes: K decoder layers, Q matching queries, T pairs of a query and a ground truth.
"""

from collections.abc import Iterable

import numpy as np

from ..errors import DatasetError
from .probe import ProbedImage

# COCO's border between small and larger objects, in square pixels of the original image.
SMALL_AREA = 32.0**2


def instability(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    """IS of DN-DETR (Sec. 3.2): queries whose ground truth changed between two states of a model, averaged over images.

    IS = mean over images of sum_q 1(V_after[q] != V_before[q]). An object that moves from one query to another counts
    twice, so IS is at most twice the mean number of objects. Two-stage systems choose their queries anew for each image;
    there a change of rank counts as a change.

    Args:
        before, after: {image id: (K, Q) ground truths}, see ``ProbedImage.matched``.

    Returns:
        np.ndarray: (K,) IS of each decoder layer.

    Raises:
        DatasetError: the two are not of the same images, or not of the same layers and queries.
    """
    if before.keys() != after.keys():
        only = [sorted(a.keys() - b.keys())[:3] for a, b in ((before, after), (after, before))]
        raise DatasetError(
            f"the instability needs the same images twice, got {len(before)} and {len(after)}; only the first has "
            f"{only[0]}, only the second {only[1]}"
        )
    shapes = {matched.shape for side in (before, after) for matched in side.values()}
    if len(shapes) != 1:
        raise DatasetError(f"the instability needs one number of layers and queries, got {sorted(shapes)}")
    return np.mean([(before[key] != after[key]).sum(-1) for key in sorted(before)], 0)


def churn(images: Iterable[ProbedImage]) -> np.ndarray:
    """(K - 1,) queries whose ground truth differs between a decoder layer and the one before, averaged over images."""
    return np.mean([(image.matched[1:] != image.matched[:-1]).sum(-1) for image in images], 0)


def anchor_distances(images: Iterable[ProbedImage]) -> tuple[np.ndarray, np.ndarray]:
    """How far each matched ground truth is from the anchor that its query started from.

    Returns:
        tuple: (T,) L1 distances of cxcywh in [0, 1], summed over the four numbers, by the matching of the last layer; (T,)
        areas of the ground truths in square pixels of the original image.
    """
    distances, areas = [np.zeros(0)], [np.zeros(0)]
    for image in images:
        query = np.flatnonzero(image.matched[-1] >= 0)
        target = image.matched[-1][query]
        distances.append(np.abs(image.anchors[query] - image.boxes[target]).sum(-1, dtype=np.float64))
        areas.append(image.areas[target])
    return np.concatenate(distances), np.concatenate(areas)


def average_top_k(distances: np.ndarray, k: int) -> float:
    """ATD(k) of DINO (Sec. 4): mean of the k largest distances, of all if there are fewer.

    Args:
        distances: (T,) with T >= 1, over the ground truths of all images.
        k: at least 1.
    """
    return float(np.sort(distances)[-k:].mean())


def anchor_metrics(images: Iterable[ProbedImage], k: int) -> dict[str, float]:
    """Mean distance and ATD(k), of all objects and of small ones.

    Returns:
        dict: ``distance`` and ``atd``, and with ``_small`` behind for objects below 32 x 32 pixels; what has no object is
        left out. Nothing of models without boxes.
    """
    images = [image for image in images if image.anchors is not None]
    distances, areas = anchor_distances(images)
    groups = {"": distances, "_small": distances[areas < SMALL_AREA]}
    metrics = {}
    for suffix, group in groups.items():
        if len(group):
            metrics |= {f"distance{suffix}": float(group.mean()), f"atd{suffix}": average_top_k(group, k)}
    return metrics
