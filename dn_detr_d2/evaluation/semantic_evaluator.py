"""The mean IoU of classes, with ground truth from semantic or from panoptic maps."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.evaluation import SemSegEvaluator
from torch import Tensor

from ..data.interruption import agree
from ..data.panoptic import read_panoptic_png
from ..data.semantic import read_semantic_map
from ..errors import DatasetError
from ..utils.requirements import is_installed
from .panoptic_evaluator import places, require_same_size


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's mean IoU and accuracies.

    Args:
        records: dicts with ``file_name`` and ``sem_seg_file_name``, or ``pan_seg_file_name`` and ``segments_info``, of which
            crowds are a part of their class, as in Mask2Former's data.
        class_names: of the P classes of the data set.
        ignore_label: of pixels of semantic maps that do not count.
        distributed: whether to collect the counts of all processes.
        output_dir: of ``sem_seg_predictions.json`` and ``sem_seg_evaluation.pth``; None = not written.
        model_classes: names of the classes that the model predicts, where they are others or in another order than
            ``class_names``; those that are not among them are left out.
        category_ids: of each class number the id that ``sem_seg_predictions.json`` writes; None = the number.
        name: of the data set, for messages.

    Raises:
        DatasetError: a record has neither map.
    """

    def __init__(
        self,
        records: list[dict],
        class_names: Sequence[str],
        *,
        ignore_label: int = 255,
        distributed: bool = True,
        output_dir: str | None = None,
        model_classes: Sequence[str] | None = None,
        category_ids: dict[int, int] | None = None,
        name: str = "the data set",
    ):
        if lacking := [r for r in records if not {"sem_seg_file_name", "pan_seg_file_name"} & r.keys()]:
            raise DatasetError(
                f"{len(lacking)} of {len(records)} images of {name} have no semantic map, first "
                f"{lacking[0].get('file_name')}; take 'sem_seg' out of MODEL.DN_DETR.MASK.OUTPUTS, or evaluate on a "
                "semantic or panoptic data set"
            )
        self._logger, self._cpu_device = logging.getLogger(__name__), torch.device("cpu")
        self._dataset_name, self._distributed, self._output_dir = name, distributed, output_dir
        self._records = {record["file_name"]: record for record in records}
        self._class_names, self._num_classes, self._ignore_label = class_names, len(class_names), ignore_label
        self._contiguous_id_to_dataset_id = category_ids
        self._compute_boundary_iou = is_installed("cv2") and self._num_classes < 255  # as Detectron2
        place = places(model_classes, class_names, -1)
        self._channels = None if place == [*range(self._num_classes)] else place
        self.sem_seg_loading_fn = lambda truth, dtype: truth

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Counts the pixels of a batch; raises DatasetError if a map has another size, or what is no class."""
        for image, output in zip(inputs, outputs, strict=True):
            record, seen = self._records[image["file_name"]], self._in_order(output["sem_seg"])
            truth = self._truth(record)
            require_same_size(
                record.get("sem_seg_file_name", record.get("pan_seg_file_name")), truth.shape, seen.shape[1:]
            )
            self.input_file_to_gt_file = {image["file_name"]: truth}
            super().process([image], [{"sem_seg": seen}])

    def evaluate(self) -> dict | None:
        """As Detectron2's; raises Interrupted on all ranks if the training is to stop."""
        agree()
        return super().evaluate()

    def _in_order(self, probability: Tensor) -> Tensor:
        """(P, H, W) in the order of the data set."""
        if self._channels is None:
            return probability
        ordered = probability.new_full((self._num_classes + 1, *probability.shape[1:]), -1)
        ordered[self._channels] = probability  # what has no place comes last
        return ordered[:-1]

    def _truth(self, record: dict) -> np.ndarray:
        """(H, W) classes; P where nothing is annotated."""
        path = record.get("sem_seg_file_name")
        if path is None:
            found, place = np.unique(
                read_panoptic_png(record["pan_seg_file_name"]),
                return_inverse=True,
            )
            labels = {x["id"]: x["category_id"] for x in record["segments_info"]}
            return np.array([labels.get(x, self._num_classes) for x in found.tolist()])[place]
        truth = read_semantic_map(path).astype(int)
        nothing = truth == self._ignore_label
        if (highest := truth[~nothing].max(initial=0)) >= self._num_classes:
            raise DatasetError(
                f"semantic map {path} has class {highest}, but {self._dataset_name} has {self._num_classes} classes and "
                f"{self._ignore_label} for what is not annotated"
            )
        truth[nothing] = self._num_classes
        return truth
