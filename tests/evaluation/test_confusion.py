"""The confusion matrix against worked examples and a slow count."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_d2.evaluation import RecordsEvaluator
from dn_detr_d2.evaluation.confusion import count_confusions


def entry(image, category, box, score=None, crowd=0):
    given = {"image_id": image, "category_id": category, "bbox": box}
    return given | ({"iscrowd": crowd} if score is None else {"score": score})


def test_a_worked_example():
    """Two images; rows are true classes. IoU of boxes shifted by a third of their width: 0.5."""
    objects = [
        entry(1, 1, [0, 0, 30, 30]),
        entry(1, 2, [100, 0, 30, 30]),
        entry(1, 2, [200, 0, 30, 30]),
        entry(1, 3, [300, 0, 30, 30], crowd=1),
        entry(2, 3, [0, 0, 30, 30]),
        entry(2, 1, [0, 50, 30, 30]),
    ]
    detections = [
        entry(1, 1, [0, 0, 30, 30], 0.3),  # comes second: the object is found already
        entry(1, 2, [10, 0, 30, 30], 0.9),  # IoU 0.5: takes class 1 for class 2
        entry(1, 2, [101, 0, 30, 30], 0.1),  # right
        entry(1, 3, [215, 0, 30, 30], 0.8),  # IoU 1/3: finds nothing
        entry(1, 3, [300, 0, 30, 30], 0.8),  # a crowd
        entry(2, 1, [0, 0, 30, 30], 0.5),  # takes class 3 for class 1
        entry(2, 3, [0, 0, 30, 30], 0.5),  # as good, but behind
        entry(3, 1, [0, 0, 30, 30], 0.5),  # an image without objects
    ]
    assert count_confusions(objects, detections, 3).tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_a_detection_takes_the_object_that_it_overlaps_most_and_leaves_the_other():
    objects = [entry(1, 1, [0, 0, 30, 30]), entry(1, 2, [5, 0, 30, 30])]
    near_second = entry(1, 2, [4, 0, 30, 30], 0.9)
    assert count_confusions(objects, [near_second], 2).tolist() == [[0, 0], [0, 1]]
    both = [near_second, entry(1, 2, [4, 0, 30, 30], 0.8)]
    assert count_confusions(objects, both, 2).tolist() == [[0, 1], [0, 1]]


def slow_count(objects, detections, classes):
    matrix, taken = [[0] * classes for _ in range(classes)], set()

    def iou(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        common = max(width, 0) * max(height, 0)
        return common / (a[2] * a[3] + b[2] * b[3] - common)

    for detection in sorted(detections, key=lambda x: x["score"], reverse=True):
        best, most = None, 0.5
        for k, x in enumerate(objects):
            free = k not in taken and not x["iscrowd"] and x["image_id"] == detection["image_id"]
            overlap = iou(x["bbox"], detection["bbox"])
            if free and (overlap > most or (overlap == most and best is None)):
                best, most = k, overlap
        if best is not None:
            taken.add(best)
            matrix[objects[best]["category_id"] - 1][detection["category_id"] - 1] += 1
    return matrix


PLACES = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(4, 7), st.integers(4, 7)).map(list)
IMAGES, CLASSES = st.integers(1, 2), st.integers(1, 3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.builds(entry, IMAGES, CLASSES, PLACES, st.none(), st.sampled_from([0, 0, 1])), max_size=6),
    st.lists(st.builds(entry, IMAGES, CLASSES, PLACES, st.integers(1, 9).map(lambda x: x / 10)), max_size=9),
)
def test_it_is_the_slow_count(objects, detections):
    matrix = count_confusions(objects, detections, 3)
    assert matrix.tolist() == slow_count(objects, detections, 3)
    assert matrix.sum() <= min(len(detections), len(objects))


def evaluated(folder, class_names, model_classes=None, annotated=True):
    """The file that an evaluation of two images writes, whose model takes class 0 for class 1 in the second."""
    box = {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    other = box | {"bbox": [60, 10, 20, 20], "category_id": 1}
    records = [{"image_id": i, "height": 100, "width": 100} for i in (5, 9)]
    if annotated:
        records = [record | {"annotations": [box, other]} for record in records]
    evaluator = RecordsEvaluator(
        records, class_names, distributed=False, output_dir=str(folder), model_classes=model_classes
    )
    evaluator.reset()
    for record, labels in zip(records, ([0, 1], [1, 1]), strict=True):
        found = Instances((100, 100))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30], [60, 10, 80, 30]]))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor(labels)
        evaluator.process([record], [{"instances": found}])
    evaluator.evaluate()
    path = folder / "confusion_matrix.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_an_evaluation_writes_it_beside_its_results(tmp_path):
    found = evaluated(tmp_path, ["cat", "dog", "cow"])
    assert found == {
        "iou_threshold": 0.5,
        "classes": ["cat", "dog", "cow"],
        "matrix": [[1, 1, 0], [0, 2, 0], [0, 0, 0]],
    }
    assert (tmp_path / "coco_instances_results.json").exists()


def test_its_classes_are_those_of_the_data_set_whatever_the_order_of_the_model(tmp_path):
    found = evaluated(tmp_path, ["cat", "dog"], ["dog", "cat"])
    assert found["classes"] == ["cat", "dog"]
    assert found["matrix"] == [[1, 1], [2, 0]]  # class 0 of the model is dog


def test_without_annotations_there_is_none(tmp_path):
    assert evaluated(tmp_path, ["cat", "dog"], annotated=False) is None


def test_without_detections_it_is_empty(tmp_path):
    assert count_confusions([entry(1, 1, [0, 0, 3, 3])], [], 2).tolist() == np.zeros((2, 2)).tolist()


@pytest.mark.parametrize("size", [0, 3])
def test_objects_without_size_are_never_found(size):
    assert count_confusions([entry(1, 1, [0, 0, 0, 0])], [entry(1, 1, [0, 0, size, size], 1.0)], 1).sum() == 0
