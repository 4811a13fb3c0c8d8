"""Panoptic quality, with the rules of COCO's own program."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..data.interruption import agree
from ..data.panoptic import read_panoptic_png
from ..errors import ConfigError, DatasetError
from ..utils.requirements import is_installed

if TYPE_CHECKING:
    from torchmetrics.detection import PanopticQuality

COUNTS = (
    "iou_sum",
    "true_positives",
    "false_positives",
    "false_negatives",
)  # of each class, as torchmetrics names them


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality (Kirillov et al., CVPR 2019, equation 1) by torchmetrics, with the rules of COCO's panopticapi.

    A predicted and a true segment of the same class match if their IoU is above one half; pixels that the ground truth
    leaves empty do not count. torchmetrics would leave out pixels that the *prediction* leaves empty, too, would make one
    segment of all of a stuff class, and knows no crowds. Here, as in panopticapi, pixels that are predicted to be empty
    count as not found; segments of stuff match one by one; a crowd is no segment to be found, and a segment without a match
    is no error if more than half of it lies on empty pixels and the crowd of its class, of several the last.

    Counting takes torchmetrics more than half a second of a CPU core for an image of 640 x 480; it is done on the device
    of the predicted map.

    Args:
        records: dicts with ``image_id``, ``pan_seg_file_name`` and ``segments_info`` (``id``, ``category_id`` in 0 .. P-1,
            ``iscrowd``).
        class_names: of the P classes of the data set.
        things: numbers of those that are things.
        distributed: whether to collect the counts of all processes.
        model_classes: names of the classes that the model predicts, where they are others or in another order than
            ``class_names``; segments of those that are not among them count as empty.
        name: of the data set, for messages.

    Raises:
        ConfigError: torchmetrics is not installed.
        DatasetError: a record has no panoptic segments.
    """

    def __init__(
        self,
        records: list[dict],
        class_names: Sequence[str],
        things: Collection[int],
        *,
        distributed: bool = True,
        model_classes: Sequence[str] | None = None,
        name: str = "the data set",
    ):
        if lacking := [r for r in records if "pan_seg_file_name" not in r or "segments_info" not in r]:
            raise DatasetError(
                f"{len(lacking)} of {len(records)} images of {name} have no panoptic segments, first "
                f"{lacking[0].get('file_name')}; take 'panoptic_seg' out of MODEL.DN_DETR.MASK.OUTPUTS, or evaluate on "
                "a panoptic data set"
            )
        self._records = {record["image_id"]: record for record in records}
        self._name, self._distributed = name, distributed
        # Behind the classes: what is no class of the data set, which nothing can match, and what is empty.
        self._other, self._void = len(class_names), len(class_names) + 1
        self._place = places(model_classes, class_names, self._other)
        self._things, self._stuff = (
            sorted(x for x in range(len(class_names)) if (x in things) == thing) for thing in (True, False)
        )
        self._metric = _new_metric(range(len(class_names)), [self._other])
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self._metric.reset()
        self._seen = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Counts the segments of a batch.

        Raises:
            DatasetError: the ground truth has another size than the prediction.
        """
        for image, output in zip(inputs, outputs, strict=True):
            record, (ids, segments) = self._records[image["image_id"]], output["panoptic_seg"]
            truth = torch.as_tensor(
                read_panoptic_png(record["pan_seg_file_name"]),
                device=ids.device,
            )
            require_same_size(record["pan_seg_file_name"], truth.shape, ids.shape)
            self._seen.append(image["image_id"])
            pair = self._coloured(ids, segments, truth, record["segments_info"])
            self._metric.to(ids.device).update(*(x[None] for x in pair))

    def evaluate(self) -> dict | None:
        """``PQ``, ``SQ`` and ``RQ`` in percent, of all classes that occur, of things (``_th``) and of stuff (``_st``).

        Raises:
            DatasetError: an image has been seen several times, or not at all.
        """
        agree()
        counts = [getattr(self._metric, name).cpu() for name in COUNTS]
        gathered = comm.gather((self._seen, counts)) if self._distributed else [(self._seen, counts)]
        if not gathered:
            return None
        seen = Counter(image for images, _ in gathered for image in images)
        if seen != Counter(self._records.keys()):
            raise DatasetError(
                f"an evaluation must see each of the {len(self._records)} images of {self._name} once, but it saw "
                f"{sum(seen.values())}, {len(seen)} of them different; look at the test loader"
            )
        for name, values in zip(COUNTS, zip(*(x for _, x in gathered), strict=True), strict=True):
            setattr(self._metric.cpu(), name, torch.stack(values).sum(0))
        quality = 100 * self._metric.compute().numpy()  # (classes and what is none, 3)
        occurs = sum(getattr(self._metric, name) for name in COUNTS[1:]).numpy() > 0
        parts = {"": slice(-1), "_th": self._things, "_st": self._stuff}
        found = {}
        for suffix, part in parts.items():
            rows = quality[part][occurs[part]]
            means = rows.mean(0) if len(rows) else np.full(3, np.nan)
            found |= {f"{name}{suffix}": float(x) for name, x in zip(("PQ", "SQ", "RQ"), means, strict=True)}
        return {"panoptic_seg": found}

    def _coloured(
        self, ids: Tensor, segments: list[dict], truth: Tensor, annotated: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(H * W, 2) class and segment of each pixel, predicted and true."""
        predicted, place = ids.unique(return_inverse=True)
        labels = {x["id"]: self._place[x["category_id"]] for x in segments}
        labels = predicted.new_tensor([labels.get(x, self._other) for x in predicted.tolist()])
        values, true_place = truth.unique(return_inverse=True)
        true_labels = {x["id"]: x["category_id"] for x in annotated if not x.get("iscrowd", 0)} | {0: self._void}
        true_labels = labels.new_tensor([true_labels.get(x, self._other) for x in values.tolist()])
        last = {x["category_id"]: x["id"] for x in annotated if x.get("iscrowd", 0)}
        crowds = {number: label for label, number in last.items()}
        if crowds:
            crowd_labels = labels.new_tensor([crowds.get(x, -1) for x in values.tolist()])
            pairs = (true_place * len(predicted) + place).flatten().bincount(minlength=len(values) * len(predicted))
            shared = pairs.view(len(values), len(predicted))
            labels = labels.masked_fill(_forgiven(shared, labels, true_labels, crowd_labels, self._void), self._other)
        return tuple(
            torch.stack([kinds.long()[where], where], -1).flatten(0, 1)
            for kinds, where in ((labels, place), (true_labels, true_place))
        )


def _new_metric(things: list[int], stuff: list[int]) -> "PanopticQuality":
    if not is_installed("torchmetrics"):
        raise ConfigError(
            "MODEL.DN_DETR.MASK.OUTPUTS holds 'panoptic_seg', whose quality torchmetrics computes; run: pip install "
            "torchmetrics"
        )
    from torchmetrics.detection import PanopticQuality

    return PanopticQuality(things, stuff, return_sq_and_rq=True, return_per_class=True, sync_on_compute=False)


def _forgiven(shared: Tensor, labels: Tensor, true_labels: Tensor, crowd_labels: Tensor, void: int) -> Tensor:
    """Which predicted segments are no error because of crowds.

    Args:
        shared: (T, S) pixels of true and predicted segments in common.
        labels, true_labels, crowd_labels: (S,), (T,), (T,) classes; -1 where a true segment is no crowd.
        void: the class of what is empty.

    Returns:
        Tensor: (S,) bool: without a match, and more than half on empty pixels and crowds of their class.
    """
    area, empty = shared.sum(0), shared[true_labels == void].sum(0)
    iou = shared / (area + shared.sum(1, keepdim=True) - shared - empty)
    matched = ((iou > 0.5) & (true_labels[:, None] == labels)).any(0)
    ignored = empty + (shared * (crowd_labels[:, None] == labels)).sum(0)
    return (ignored / area > 0.5) & ~matched


def places(model_classes: Sequence[str] | None, class_names: Sequence[str], other: int) -> list[int]:
    """The number in ``class_names`` of each class of a model; ``other`` where it is not among them."""
    numbers = {name: i for i, name in enumerate(class_names)}
    return [numbers.get(name, other) for name in model_classes or class_names]


def require_same_size(path: str, truth: tuple, predicted: tuple) -> None:
    """Raises DatasetError if the (height, width) of a ground truth is not that of the prediction."""
    if tuple(truth) != tuple(predicted):
        raise DatasetError(
            f"{path} has {tuple(truth)} pixels (height, width), but its image has {tuple(predicted)}; make it of the "
            "image's size"
        )
