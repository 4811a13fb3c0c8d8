"""COCO's 91 raw ids, from the annotation to the AP."""

import json

import pytest
import torch
from conftest import ROOT
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.coco import NUM_RAW_CLASSES, RAW_IDS, coco_names, raw_names
from dn_detr_d2.data import build_test_loader, build_train_loader
from dn_detr_d2.engine import Trainer

PRESENT = [1, 13, 90]  # person, stop sign, toothbrush


@pytest.fixture
def config(tmp_path):
    """A config on one image with three of COCO's classes, all 80 of them listed."""
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    boxes = [[5, 5, 20, 20], [30, 5, 20, 20], [30, 30, 25, 25]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": i, "name": name} for i, name in zip(RAW_IDS, coco_names(), strict=True)],
        "annotations": [{"id": i + 1, "image_id": 1, "category_id": c, "bbox": box, "area": 400, "iscrowd": 0}
                        for i, (c, box) in enumerate(zip(PRESENT, boxes, strict=True))],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"raw_{tmp_path.name}"

    def make(num_classes):
        entry = [name, str(tmp_path / "a.json"), str(tmp_path)]
        opts = ["DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
        opts += [
            "MODEL.DEVICE",
            "cpu",
            "DATALOADER.NUM_WORKERS",
            0,
            "SOLVER.IMS_PER_BATCH",
            1,
            "OUTPUT_DIR",
            str(tmp_path),
        ]
        opts += ["INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none", "MODEL.DN_DETR.NUM_CLASSES", num_classes]
        return setup_cfg(str(ROOT / "configs" / "dn_detr_R50_12ep.yaml"), opts)

    return make


@pytest.mark.parametrize(("num_classes", "expected"), [(91, PRESENT), (80, [0, 11, 79]), ("auto", [0, 11, 79])])
def test_labels_are_raw_ids_with_91_classes_and_contiguous_with_80(config, num_classes, expected):
    batch = next(iter(build_train_loader(config(num_classes))))
    assert batch[0]["instances"].gt_classes.tolist() == expected


@pytest.mark.parametrize("num_classes", [91, 80])
def test_perfect_detections_have_full_ap_either_way(config, num_classes):
    cfg = config(num_classes)
    name = cfg.DATASETS.TEST[0]
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.reset()
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 5, 50, 25], [30, 30, 55, 55], [0, 0, 60, 60]])
    labels = [*PRESENT, 12] if num_classes == NUM_RAW_CLASSES else [0, 11, 79, 3]  # the last is no object
    scores = torch.tensor([0.9, 0.9, 0.9, 0.8])
    found = Instances((60, 80), pred_boxes=Boxes(boxes), scores=scores, pred_classes=torch.tensor(labels))
    evaluator.process(next(iter(build_test_loader(cfg, name))), [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_names_of_raw_ids():
    assert len(raw_names()) == NUM_RAW_CLASSES
    assert [raw_names()[i] for i in (1, 12, 90)] == ["person", "unused 12", "toothbrush"]


def test_another_number_is_still_refused(config):
    with pytest.raises(ConfigError, match=naming("NUM_CLASSES", 90, 80)):
        config(90)
