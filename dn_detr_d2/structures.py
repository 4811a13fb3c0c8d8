"""The small dataclasses that pass between the rooms.

Shapes: N images, M ground truths of the fullest image (at least 1), C channels, L feature levels, S = sum of h * w over
the levels, Q queries, K prediction sets (decoder layers), T matched pairs, P classes.
In every mask True means blocked or padded, except ``Targets.valid``, which says what is real.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Targets:
    """Ground truth of a batch, padded to the fullest image so that no image and no batch is a special case.

    Attributes:
        labels: (N, M) int64 in [0, num_classes), 0 where padded.
        boxes: (N, M, 4) cxcywh in [0, 1] of the unpadded image, float32, 0.5 where padded.
        valid: (N, M) bool, False where padded.
        counts: objects of each image, on the host.
        whole: the same of all images of this process in this training step, where these are a part of them; else ``counts``.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: list[int]
    whole: list[int]

    @classmethod
    def pad(
        cls,
        labels: list[Tensor],
        boxes: list[Tensor],
        device: torch.device | str = "cpu",
        whole: list[int] | None = None,
    ) -> "Targets":
        """Joins one (n_i,) label and one (n_i, 4) box tensor per image; pads on their device, uploads once.

        Padded to the fullest image of ``whole``, so that a part of a batch has the layout of all of it.
        """
        counts = [len(image) for image in labels]
        if counts != [len(image) for image in boxes]:
            raise ValueError(f"labels and boxes must pair up, got {counts} labels and {[len(b) for b in boxes]} boxes")
        whole = whole or counts
        n, m = len(counts), max([*whole, 1])
        padded_labels = torch.zeros(n, m, dtype=torch.int64)
        padded_boxes = torch.full((n, m, 4), 0.5)
        for i, count in enumerate(counts):
            padded_labels[i, :count], padded_boxes[i, :count] = labels[i], boxes[i]
        valid = torch.arange(m) < torch.tensor(counts, dtype=torch.int64).reshape(n, 1)
        return cls(*(to_device(x, device) for x in (padded_labels, padded_boxes, valid)), counts, whole)


@dataclass
class Share:
    """What one forward pass must know of the whole training step, where the gradients of several are added up.

    Attributes:
        whole: objects of each image of this process in this step, on the host.
        objects: scalar, what matching losses are divided by: the mean number of objects over the processes, at least 1.
        copies: the same of noised copies, for the denoising losses.
    """

    whole: list[int]
    objects: Tensor
    copies: Tensor


@dataclass
class Assignment:
    """Which query answers for which ground truth, as flat pairs (image, query, target).

    The Hungarian matcher makes one with a row for each of the K prediction sets; the noise makes one with a single row
    that holds for all of them. The loss does not know which.

    Attributes:
        image: (T,) int64 index into the batch, the same for all rows.
        query: (K or 1, T) int64 index on the query axis.
        target: (K or 1, T) int64 index on the target axis (M) of that image.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        """Number of pairs T."""
        return len(self.image)

    def per_image(self, num_images: int, row: int = -1) -> list[tuple[Tensor, Tensor]]:
        """The pairs of one row as a list of (query indices, target indices), one entry an image; reads the device."""
        pairs = [self.image == i for i in range(num_images)]
        return [(self.query[row, mine], self.target[row, mine]) for mine in pairs]


@dataclass
class Pyramid:
    """Image features on their way into the encoder, one entry a level, high resolution first.

    Attributes:
        maps: (N, C, h, w) features.
        positions: (N, C, h, w) sine encodings of the cells.
        padding: (N, h, w) bool, True on cells that lie outside the image.
    """

    maps: list[Tensor]
    positions: list[Tensor]
    padding: list[Tensor]


@dataclass
class Memory:
    """What the decoder looks at: all cells of all levels in a row.

    Attributes:
        tokens: (N, S, C).
        positions: (N, S, C) encodings the tokens were given.
        padding: (N, S) bool, True outside the image.
        shapes: (h, w) of each level, Python integers.
        valid_ratios: (N, L, 2) part of each level's (width, height) that lies inside the image.
        axis_encoding: how the encoder turned the coordinates of cells into channels, where the queries must do the same with
            theirs (Anchor DETR): (...) in [0, 1] -> (..., C). None elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    padding: Tensor
    shapes: list[tuple[int, int]]
    valid_ratios: Tensor
    axis_encoding: Callable[[Tensor], Tensor] | None = None


@dataclass
class ObjectQueries:
    """Queries as they enter the decoder; denoising queries first, matching queries last.

    Attributes:
        content: (N, Q, C).
        boxes: (N, Q, 4) reference boxes, cxcywh in [0, 1]; 0.5 stands for "not known", its logit is 0.
        blocked: (Q, Q) or (N, Q, Q) bool self-attention mask [query, key], or None.
        position: (N, Q, C) embedding of each query's place that stays the same in all layers, or None where it follows from
            the reference box (DAB-DETR and its family).
        proposals: one set of predictions (K = 1) that the matching queries were chosen from and that has a loss of its
            own (two-stage systems), or None.
    """

    content: Tensor
    boxes: Tensor
    blocked: Tensor | None = None
    position: Tensor | None = None
    proposals: "Predictions | None" = None


@dataclass
class Predictions:
    """Outputs of all K decoder layers.

    Attributes:
        logits: (K, N, Q, P) class logits.
        boxes: (K, N, Q, 4) cxcywh in [0, 1] of the unpadded image, float32.
    """

    logits: Tensor
    boxes: Tensor

    def split(self, num_denoising: int) -> tuple["Predictions", "Predictions"]:
        """(denoising part, matching part) by position on the query axis."""
        d = num_denoising
        return (
            Predictions(self.logits[:, :, :d], self.boxes[:, :, :d]),
            Predictions(self.logits[:, :, d:], self.boxes[:, :, d:]),
        )


def join_queries(denoising: ObjectQueries, matching: ObjectQueries, blocked: Tensor) -> ObjectQueries:
    """Denoising queries first, matching queries last; ``blocked`` is the mask over both."""
    return ObjectQueries(
        torch.cat([denoising.content, matching.content], 1),
        torch.cat([denoising.boxes, matching.boxes], 1),
        blocked,
        torch.cat([denoising.position, matching.position], 1) if matching.position is not None else None,
        matching.proposals,
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``; from the host to a GPU without a wait.

    A copy out of ordinary host memory waits for the work that the GPU still has to do, ``non_blocking`` or not; one out of
    pinned memory does not. PyTorch keeps pinned memory until the copy is over, and then for the next tensor.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # one that is pinned is taken as it is
    return tensor.to(device)


def upload(array: np.ndarray, like: Tensor) -> Tensor:
    """A host array as an int64 tensor beside ``like``, by :func:`to_device`."""
    return to_device(torch.as_tensor(array, dtype=torch.int64), like.device)
