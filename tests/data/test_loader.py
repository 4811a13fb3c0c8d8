import logging

import pytest
from detectron2.data import DatasetCatalog

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import build_test_loader, build_train_loader

SHAPES = [
    "MODEL.DN_DETR.NUM_CLASSES",
    "auto",
    "DATASETS.TRAIN",
    ("shapes_train",),
    "DATASETS.TEST",
    ("shapes_val",),
    "DATALOADER.NUM_WORKERS",
    0,
]
SHAPES += ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.CROP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 4]


@pytest.mark.parametrize(("filtered", "word"), [(True, "left out"), (False, "trained on")])
def test_images_without_boxes_are_counted_in_the_log(toy_cfg, caplog, filtered, word):
    cfg = toy_cfg("dn_detr", *SHAPES, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
    empty = sum(not r["annotations"] for r in DatasetCatalog.get("shapes_train"))
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        loader = build_train_loader(cfg)
    assert f"= {filtered}: {empty} of 1200 training images have no boxes and are {word}" in caplog.text
    assert len(next(iter(loader))) == 4


@pytest.mark.parametrize("filtered", [True, False])
def test_a_set_without_any_box_is_refused(toy_cfg, filtered):
    name = f"test_blank_{filtered}"
    DatasetCatalog.register(name, lambda: [{"file_name": "x", "image_id": 1, "annotations": []}])
    cfg = toy_cfg("dn_detr", *SHAPES, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(DatasetError, match="has a box; there is nothing to learn"):
        build_train_loader(cfg)


def test_evaluation_sees_every_image_once(toy_cfg):
    loader = build_test_loader(toy_cfg("dn_detr", *SHAPES), "shapes_val")
    ids = [x["image_id"] for batch in loader for x in batch]
    assert sorted(ids) == [r["image_id"] for r in DatasetCatalog.get("shapes_val")]
