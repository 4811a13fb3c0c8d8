"""A validation file that lists its classes in another order, or lacks some, is evaluated by their names."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from dn_detr_d2 import setup_cfg
from dn_detr_d2.coco import RAW_IDS, raw_names
from dn_detr_d2.data import records_of, register_coco_json
from dn_detr_d2.data.loader import in_model_order
from dn_detr_d2.evaluation import TolerantCOCOEvaluator
from dn_detr_d2.evaluation.coco_evaluator import RecordsEvaluator

MODEL = ["cat", "dog", "eel"]


@pytest.fixture(params=[MODEL, ["eel", "cat", "dog"], ["eel", "dog"], ["dog"]], ids=len)
def listed(request, tmp_path):
    """A registered set of three pictures with two objects each: (name, its classes, {image: [(class, xywh), ...]})."""
    names, name = request.param, f"orders_{tmp_path.name}"
    objects = {
        i: [(names[i % len(names)], [2 + i, 3, 10, 9]), (names[(i + 1) % len(names)], [20, 5 + i, 8, 12])]
        for i in range(3)
    }
    ids = {x: 7 * i + 3 for i, x in enumerate(names)}
    for i in range(3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    rows = [(i, label, box) for i, found in objects.items() for label, box in found]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)],
        "categories": [{"id": number, "name": x} for x, number in ids.items()],
        "annotations": [
            {"id": k, "image_id": i, "category_id": ids[label], "bbox": box} for k, (i, label, box) in enumerate(rows)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json(name, str(tmp_path / "a.json"), str(tmp_path))
    yield name, ids, objects
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_the_oracle_in_the_order_of_the_model_has_ap_100_in_each_class_of_the_file(listed, tmp_path):
    """Each object is predicted with its class as the model counts, and beside it a class that the file may not have."""
    name, ids, objects = listed
    evaluator = TolerantCOCOEvaluator(name, output_dir=str(tmp_path), model_classes=MODEL)
    evaluator.reset()
    for image, found in objects.items():
        boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in found] + [[0.0, 0, 5, 5]])
        labels = torch.tensor([MODEL.index(label) for label, _ in found] + [MODEL.index("cat")])
        predicted = Instances(
            (30, 40), pred_boxes=Boxes(boxes), scores=torch.tensor([1.0, 1.0, 0.1]), pred_classes=labels
        )
        evaluator.process([{"image_id": image, "height": 30, "width": 40}], [{"instances": predicted}])
    results = evaluator.evaluate()["bbox"]
    each = [f"AP-{x}" for x in ids] if len(ids) > 1 else ["AP"]  # Detectron2 gives none of its own to a single class
    assert {key: results[key] for key in each} == dict.fromkeys(each, pytest.approx(100.0))
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    known = [x for x in written if x["score"] == 1.0]
    assert [x["category_id"] for x in known] == [ids[label] for found in objects.values() for label, _ in found]
    assert {x["category_id"] for x in written} <= set(ids.values())


@pytest.mark.parametrize("names", [["person", "car"], ["car", "person"], ["toothbrush", "person", "bicycle"]])
def test_raw_ids_are_found_by_name_in_a_subset_of_coco(tmp_path, names):
    """A model of COCO's 91 raw ids: training gives the raw ids of the names, evaluation reads them as these names."""
    raw = raw_names()
    name = f"raw_{tmp_path.name}"
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    boxes = {x: [2 + 9 * i, 3, 8, 9] for i, x in enumerate(names)}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 30}],
        "categories": [{"id": i, "name": x} for i, x in enumerate(names)],
        "annotations": [{"id": i, "image_id": 1, "category_id": i, "bbox": boxes[x]} for i, x in enumerate(names)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_json(name, str(tmp_path / "a.json"), str(tmp_path))
    try:
        [record] = in_model_order(records_of(name), name, list(raw))
        trained = [raw[RAW_IDS[x["category_id"]]] for x in record["annotations"]]  # as the mapper translates
        assert trained == names
        evaluator = TolerantCOCOEvaluator(name, output_dir=str(tmp_path), raw_ids=True)
        evaluator.reset()
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes.values()]).float()
        labels = torch.tensor([raw.index(x) for x in names])
        predicted = Instances((30, 40), pred_boxes=Boxes(corners), scores=torch.ones(len(names)), pred_classes=labels)
        evaluator.process([{"image_id": 1, "height": 30, "width": 40}], [{"instances": predicted}])
        results = evaluator.evaluate()["bbox"]
        assert {x: results[f"AP-{x}"] for x in names} == dict.fromkeys(names, pytest.approx(100.0))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_set_of_detectron2s_register_function_has_its_names_before_it_is_read(tmp_path):
    name, other = f"theirs_{tmp_path.name}", f"swapped_{tmp_path.name}"
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    for one, names in ((name, ["bolt", "nut"]), (other, ["nut", "bolt"])):
        content = {
            "images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 30}],
            "categories": [{"id": i, "name": x} for i, x in enumerate(names)],
            "annotations": [{"id": 1, "image_id": 1, "category_id": names.index("nut"), "bbox": [2, 3, 8, 9]}],
        }
        (tmp_path / f"{one}.json").write_text(json.dumps(content))
        register_coco_instances(one, {}, str(tmp_path / f"{one}.json"), str(tmp_path))
    try:
        opts = ["DATASETS.TRAIN", (name, other), "DATASETS.TEST", (other,), "MODEL.DN_DETR.NUM_CLASSES", "auto"]
        cfg = setup_cfg("", opts)
        assert list(cfg.MODEL.DN_DETR.CLASS_NAMES) == ["bolt", "nut"]
        for one in (name, other):
            [record] = in_model_order(records_of(one), one, ["bolt", "nut"])
            assert record["annotations"][0]["category_id"] == 1
    finally:
        for one in (name, other):
            DatasetCatalog.remove(one)
            MetadataCatalog.remove(one)


def test_records_of_a_function_may_have_numpys_ids_and_unusable_masks(tmp_path):
    masks = [[[1, 2]], [[1, 2, 3, 4, 5]], [None], [1.0, 2, 3, 4, 5, 6], {"size": [30, 40]}, "mask"]
    records = [
        {"image_id": np.int64(i), "height": 30, "width": 40, "annotations": [
            {"bbox": [2, 3, 8, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": mask}]}
        for i, mask in enumerate(masks)
    ]  # fmt: skip
    evaluator = RecordsEvaluator(records, ["thing"], output_dir=str(tmp_path))
    evaluator.reset()
    for record in records:
        box = Boxes(torch.tensor([[2.0, 3, 10, 12]]))
        found = Instances(
            (30, 40), pred_boxes=box, scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.int64)
        )
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    assert (results["AP"], results["APs"]) == (
        pytest.approx(100.0),
        pytest.approx(100.0),
    )  # areas are those of the boxes
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [x["image_id"] for x in written] == list(range(len(masks)))
