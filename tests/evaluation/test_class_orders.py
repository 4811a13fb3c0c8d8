"""A validation file that lists its classes in another order, or lacks some, is evaluated by their names."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from dn_detr_d2.data import register_coco_json
from dn_detr_d2.evaluation import TolerantCOCOEvaluator

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
