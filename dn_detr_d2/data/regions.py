"""Regions of images that look like objects of no particular class: what a detector can learn from without labels.

An image is segmented as Felzenszwalb and Huttenlocher (IJCV 2004) do, at several scales, which are the first regions of
Selective Search (Uijlings et al., IJCV 2013). A region counts the more, the more its colour differs from what is around it
and the better it fills its box.
"""

import numpy as np
import torch
from scipy import ndimage
from torchvision.ops import nms

from ..errors import UserError

SCALES = (50, 100, 200, 400)  # of the segmentation: the larger, the larger its regions
LONGER_SIDE = 320  # pixels that an image is reduced to
SIDES = (0.02, 0.8)  # of a box, as shares of the sides of the image
LEAST_SCORE = 5.0  # distance in CIE Lab from the colour around, times the filled share of the box
RING = 0.25  # of a box's sides: how far around it its colour is compared


def propose_regions(image: np.ndarray, top: int = 30, overlap: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of the regions that look most like objects.

    Args:
        image: (H, W, 3) uint8.
        top: at most so many.
        overlap: of two boxes whose IoU is larger, the better one is kept.

    Returns:
        tuple: (R, 4) xyxy boxes in pixels, and (R,) scores in descending order.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.color import rgb2lab
        from skimage.segmentation import felzenszwalb
        from skimage.transform import resize
    except ImportError as error:
        raise UserError("regions need scikit-image; pip install 'dn_detr_d2[regions]' brings it") from error
    factor = min(LONGER_SIDE / max(image.shape[:2]), 1.0)
    shape = [max(round(side * factor), 1) for side in image.shape[:2]]
    small = resize(image, shape, anti_aliasing=factor < 1)  # in [0, 1]
    lab, found = rgb2lab(small), []
    for scale in SCALES:
        labels = felzenszwalb(small, scale=scale, sigma=0.8, min_size=max(shape[0] * shape[1] // 2000, 4))
        found += _judged(labels, lab)
    if not found:
        return np.zeros((0, 4)), np.zeros(0)
    boxes, scores = torch.tensor([box for box, _ in found]), torch.tensor([score for _, score in found])
    kept = nms(boxes, scores, overlap)[:top].numpy()
    height, width = shape
    scaled = boxes.numpy()[kept] / [width, height, width, height] * [*image.shape[1::-1], *image.shape[1::-1]]
    return scaled, scores.numpy()[kept]


def _judged(labels: np.ndarray, lab: np.ndarray) -> list[tuple[list[float], float]]:
    """(xyxy box, score) of each region of a segmentation whose sides are those of objects; ``lab`` is (H, W, 3)."""
    shape, found = np.array(labels.shape), []
    for index, window in enumerate(ndimage.find_objects(labels + 1)):
        sides = np.array([part.stop - part.start for part in window])
        if not ((sides >= SIDES[0] * shape) & (sides <= SIDES[1] * shape)).all():
            continue
        reach = np.ceil(RING * sides).astype(int)
        wider = tuple(
            slice(max(part.start - more, 0), part.stop + more) for part, more in zip(window, reach, strict=True)
        )
        inside = labels[wider] == index
        if inside.all():
            continue
        colours, count = lab[wider], inside.sum()
        contrast = np.linalg.norm(colours[inside].mean(0) - colours[~inside].mean(0))
        (y, x), score = window, float(contrast * count / sides.prod())
        if score >= LEAST_SCORE:
            found.append(([float(v) for v in (x.start, y.start, x.stop, y.stop)], score))
    return found
