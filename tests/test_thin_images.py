"""Images whose one side is a pixel or two: every program path keeps at least one pixel, and boxes keep their place."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from dn_detr_d2.data import DetrDatasetMapper, ResizeShortestEdge, register_coco_json
from dn_detr_d2.engine import evaluate
from dn_detr_d2.predictor import Predictor

SIZES = [(3000, 2), (2, 3000), (1, 700), (700, 1), (1, 1), (5000, 1)]  # width, height
CROP = ["INPUT.CROP.ENABLED", True, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128]


def make_record(folder, size, number=1):
    """An image of the size, and a record of it with one box on its first half in both directions."""
    width, height = size
    path = folder / f"{width}x{height}.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)).save(path)
    box = [0, 0, max(width / 2, 0.5), max(height / 2, 0.5)]
    annotation = {"id": 1, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    return {
        "file_name": str(path),
        "width": width,
        "height": height,
        "image_id": number,
        "annotations": [annotation],
    }


@pytest.mark.parametrize("size", SIZES)
def test_a_resize_leaves_a_pixel_and_the_boxes_in_their_place(toy_cfg, tmp_path, size):
    cfg = toy_cfg("dn_detr", "INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none", "INPUT.MAX_SIZE_TRAIN", 200)
    record = make_record(tmp_path, size)
    found = DetrDatasetMapper(cfg)(record)
    height, width = found["image"].shape[1:]
    assert min(height, width) >= 1
    assert max(height, width) <= max(200, max(cfg.INPUT.MIN_SIZE_TRAIN) if size == (1, 1) else 200)
    assert tuple(found["instances"].image_size) == (height, width)
    x, y, w, h = record["annotations"][0]["bbox"]
    expected = [x * width / size[0], y * height / size[1], (x + w) * width / size[0], (y + h) * height / size[1]]
    assert found["instances"].gt_boxes.tensor.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("crop", [(384, 600), (1, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_a_crop_of_a_thin_image_has_pixels_and_is_not_blown_up(toy_cfg, tmp_path, monkeypatch, size, crop):
    cfg = toy_cfg("dn_detr", *CROP, "INPUT.CROP.SIZE", crop)
    mapper, record = DetrDatasetMapper(cfg), make_record(tmp_path, size)
    made, real = [], ResizeShortestEdge.get_transform

    def keep(self, image):
        made.append(real(self, image))
        return made[-1]

    monkeypatch.setattr(ResizeShortestEdge, "get_transform", keep)
    for seed in range(6):
        np.random.seed(seed)
        found = mapper(record)
        assert min(found["image"].shape) >= 1
        assert tuple(found["instances"].image_size) == tuple(found["image"].shape[1:])
    assert made
    assert max(max(x.new_h, x.new_w) for x in made) <= 16 * max(cfg.INPUT.CROP.RESIZE)


def test_an_image_of_usual_shape_is_resized_before_the_crop_as_by_detectron2(toy_cfg):
    from detectron2.data import transforms as T

    ours = DetrDatasetMapper(toy_cfg("dn_detr", *CROP)).cropping.augs[0]
    theirs = T.ResizeShortestEdge(ours.short_edge_length, sample_style="choice")
    for shape in ((480, 640, 3), (100, 1500, 3), (1333, 90, 3)):
        image, sizes = np.zeros(shape, np.uint8), []
        for resize in (ours, theirs):
            np.random.seed(0)
            made = resize.get_transform(image)
            sizes.append((made.new_h, made.new_w))
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "anchor_detr"])
def test_a_training_step_on_thin_images_is_finite(toy_cfg, toy_model, tmp_path, system):
    cfg = toy_cfg(system, "INPUT.CROP.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 128)
    mapper = DetrDatasetMapper(cfg)
    batch = [mapper(make_record(tmp_path, size)) for size in SIZES]
    model = toy_model(system).train()
    loss = sum(model(batch).values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture
def finished(toy_cfg, toy_model, tmp_path):
    """A config of a toy model with its weights."""
    torch.save({"model": toy_model("dn_deformable_detr").state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128]
    return toy_cfg("dn_deformable_detr", *options)


@pytest.mark.parametrize("size", SIZES)
def test_the_predictor_takes_a_thin_image(finished, size):
    found = Predictor(finished)(np.zeros((size[1], size[0], 3), np.uint8))["instances"]
    assert found.image_size == (size[1], size[0])
    assert found.pred_boxes.tensor.isfinite().all()


def test_thin_images_are_evaluated(finished, tmp_path):
    records = [make_record(tmp_path, size, i) for i, size in enumerate(SIZES, 1)]
    images = [
        {"id": i, "file_name": f"{width}x{height}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(SIZES, 1)
    ]
    boxes = [{"id": r["image_id"], "image_id": r["image_id"], "category_id": 2, "bbox": r["annotations"][0]["bbox"]}
             for r in records]  # fmt: skip
    classes = [{"id": i, "name": f"c{i}"} for i in range(1, 6)]
    content = {"images": images, "annotations": boxes, "categories": classes}
    (tmp_path / "thin.json").write_text(json.dumps(content))
    register_coco_json("test_thin", str(tmp_path / "thin.json"), str(tmp_path))
    try:
        finished.merge_from_list(["DATASETS.TEST", ("test_thin",), "DATALOADER.NUM_WORKERS", 0])
        finished.OUTPUT_DIR = str(tmp_path / "out")
        assert "AP" in evaluate(finished)["bbox"]
    finally:
        DatasetCatalog.remove("test_thin")
        MetadataCatalog.remove("test_thin")
