"""INPUT.AUGMENTATION: images, masks and boxes move together, and depend on nothing but seed and position."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError
from dn_detr_d2.data import DetrDatasetMapper, build_train_loader
from dn_detr_d2.data.augmentations import PlanarResize, training_augmentations

MASKS = ["MODEL.DN_DETR.MASK.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask"]
LSJ = ["INPUT.AUGMENTATION", "lsj", "INPUT.IMAGE_SIZE", 64]


@pytest.fixture
def record(tmp_path):
    """A black 60x40 image with a white rectangle from (10, 8) to (44, 30), as a polygon, and a crowd around everything."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[8:30, 10:44] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ring = [10, 8, 44, 8, 44, 30, 10, 30]
    thing = {"bbox": [10, 8, 34, 22], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    crowd = thing | {"bbox": [0, 0, 60, 40], "iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [0, 2400]}}
    annotations = [crowd | {"id": 1}, thing | {"id": 2, "segmentation": [ring]}]
    return {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 60, "image_id": 1, "annotations": annotations}


def test_a_worked_image_smaller_than_the_square(toy_cfg, record):
    """Scale 0.5 of a square of 60 makes 30x20 of 60x40; grey 128 fills the rest."""
    cfg = toy_cfg("dn_detr", *MASKS, "INPUT.AUGMENTATION", "lsj", "INPUT.IMAGE_SIZE", 60)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 0.5
    cfg.INPUT.RANDOM_FLIP = "none"
    out = DetrDatasetMapper(cfg)(record)
    image, objects = out["image"], out["instances"]
    assert image.shape == (3, 60, 60)
    assert (image[:, 20:] == 128).all()
    assert (image[:, :, 30:] == 128).all()
    assert image[0, 10, 12] == 255
    assert objects.image_size == (60, 60)
    assert objects.gt_boxes.tensor.tolist() == [[5, 4, 22, 15]]
    assert objects.gt_masks.tensor[0].nonzero().amin(0).tolist() == [4, 5]
    assert objects.gt_masks.tensor.sum() == 17 * 11
    assert (objects.gt_classes.tolist(), objects.gt_index.tolist()) == ([1], [1])


def test_a_worked_image_larger_than_the_square(toy_cfg, record, monkeypatch):
    """Scale 2 of a square of 30 keeps the size; the window begins in the middle of what there is room for."""
    cfg = toy_cfg("dn_detr", *MASKS, "INPUT.AUGMENTATION", "lsj", "INPUT.IMAGE_SIZE", 30)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 2.0
    cfg.INPUT.RANDOM_FLIP = "none"
    monkeypatch.setattr(np.random, "uniform", lambda low, high: (low + high) / 2)
    out = DetrDatasetMapper(cfg)(record)  # columns 15 to 45, rows 5 to 35
    assert out["instances"].gt_boxes.tensor.tolist() == [[0, 3, 29, 25]]
    white = out["image"][0] > 127
    assert torch.equal(out["instances"].gt_masks.tensor[0], white)


def test_large_scale_jittering_keeps_masks_on_their_objects(toy_cfg, record):
    mapper, kept, padded = DetrDatasetMapper(toy_cfg("dn_detr", *MASKS, *LSJ)), 0, 0
    for seed in range(60):
        np.random.seed(seed)
        out = mapper(record)
        objects, white = out["instances"], out["image"][0] > 200
        assert white.shape == (64, 64)
        padded += bool((out["image"] == 128).any())
        if len(objects):
            assert (objects.gt_masks.tensor[0] != white).float().mean() < 0.04
            assert torch.equal(objects.gt_boxes.tensor, objects.gt_masks.get_bounding_boxes().tensor)
        else:
            assert white.float().mean() < 0.02
        kept += len(objects)
    assert 50 < kept <= 60
    assert 10 < padded < 60


def test_boxes_alone_can_be_jittered_too(toy_cfg, record):
    mapper, with_masks = (
        DetrDatasetMapper(toy_cfg("dn_detr", *LSJ)),
        DetrDatasetMapper(toy_cfg("dn_detr", *MASKS, *LSJ)),
    )
    for seed in range(20):
        found = []
        for one in (mapper, with_masks):
            np.random.seed(seed)
            found.append(one(record)["instances"])
        assert not found[0].has("gt_masks")
        if len(found[1]):
            assert (found[0].gt_boxes.tensor - found[1].gt_boxes.tensor).abs().max() < 2


def test_an_image_that_lost_its_objects_is_kept(toy_cfg, record):
    record["annotations"] = record["annotations"][:1]  # the crowd
    objects = DetrDatasetMapper(toy_cfg("dn_detr", *MASKS, *LSJ))(record)["instances"]
    assert objects.gt_masks.tensor.shape == (0, 64, 64)
    assert objects.gt_boxes.tensor.shape == (0, 4)


def test_the_thinnest_image_keeps_a_pixel(toy_cfg, tmp_path):
    Image.new("RGB", (900, 1)).save(tmp_path / "thin.png")
    out = DetrDatasetMapper(toy_cfg("dn_detr", *LSJ))({"file_name": str(tmp_path / "thin.png"), "annotations": []})
    assert out["image"].shape == (3, 64, 64)


def test_colours_change_and_nothing_moves(toy_cfg, record):
    """The semantic augmentation without resize, crop and flip changes colours only."""
    options = [*MASKS, "INPUT.AUGMENTATION", "semantic", "INPUT.IMAGE_SIZE", 60, "INPUT.MIN_SIZE_TRAIN", (40,)]
    cfg = toy_cfg("dn_detr", *options, "INPUT.COLOR_AUG_SSD", True, "INPUT.RANDOM_FLIP", "none")
    mapper, seen = DetrDatasetMapper(cfg), set()
    for seed in range(12):
        random.seed(seed)
        out = mapper(record)
        assert (out["image"][:, 40:] == 128).all()
        assert out["instances"].gt_boxes.tensor.tolist() == [[10, 8, 44, 30]]
        seen.add(out["image"][:, 5, 5].float().mean().item())
    assert len(seen) > 3


@pytest.mark.parametrize("name", ["detr", "lsj", "semantic"])
@pytest.mark.parametrize("data", ["shapes_val", "shapes_panoptic_val", "shapes_sem_seg_val"])
def test_an_image_depends_on_seed_and_position_alone(toy_cfg, name, data):
    options = ["INPUT.AUGMENTATION", name, "INPUT.IMAGE_SIZE", 96, "INPUT.COLOR_AUG_SSD", name == "semantic", "SEED", 5]
    options += ["MODEL.DN_DETR.NUM_CLASSES", "auto", "DATASETS.TRAIN", (data,), "DATASETS.TEST", ()]
    cfg = toy_cfg("dn_detr", *MASKS, *options, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1)
    stream = build_train_loader(cfg).dataset
    for position in (3, 4, 5, 6):
        found = []
        for seed in (1, 2):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            found.append(stream[position])
        first, second = found
        assert torch.equal(first["image"], second["image"])
        for key in ("gt_boxes", "gt_masks"):
            assert torch.equal(first["instances"].get(key).tensor, second["instances"].get(key).tensor)
        assert len(first["instances"].gt_masks) == len(first["instances"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["INPUT.AUGMENTATION", "jitter"], ("INPUT.AUGMENTATION", "jitter", "lsj")),
        (["INPUT.IMAGE_SIZE", 0], ("INPUT.IMAGE_SIZE", 0)),
        (["INPUT.MIN_SCALE", 3.0], ("INPUT.MAX_SCALE", "INPUT.MIN_SCALE", 3.0)),
        (["INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.5], ("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.5)),
        (["INPUT.MASK_FORMAT", "rle"], ("INPUT.MASK_FORMAT", "rle")),
    ],
)
def test_values_that_cannot_work_are_refused(toy_cfg, options, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_cfg("dn_detr", *options)


def test_changes_of_colours_without_opencv_are_refused(toy_cfg, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "detectron2.projects.point_rend", None)
    cfg = toy_cfg("dn_detr", "INPUT.AUGMENTATION", "semantic", "INPUT.COLOR_AUG_SSD", True)
    with pytest.raises(ConfigError, match=naming("INPUT.COLOR_AUG_SSD")):
        training_augmentations(cfg)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    new=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    view=st.sampled_from(["plain", "horizontal", "vertical", "both", "bgr", "crop"]),
    channels=st.sampled_from([(3,), (1,), ()]),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_a_planar_resize_gives_the_pixels_of_detectron2s(size, new, view, channels, dtype):
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, *channels)).astype(dtype)
    views = {"horizontal": np.s_[:, ::-1], "vertical": np.s_[::-1], "both": np.s_[::-1, ::-1], "bgr": np.s_[..., ::-1]}
    image = image[views[view]] if view in views else image[: size[0] // 2 + 1] if view == "crop" else image
    arguments = (*image.shape[:2], *new, Image.BILINEAR)
    if dtype != np.uint8 and 1 in image.shape:  # Detectron2 fails with such an axis that is turned backwards
        image = image.copy()
    expected = T.ResizeTransform(*arguments).apply_image(image)
    found = PlanarResize(*arguments).apply_image(image)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_a_resized_image_is_in_the_order_that_a_model_takes():
    image = np.zeros((4, 5, 3), np.uint8)
    assert PlanarResize(4, 5, 7, 8, Image.BILINEAR).apply_image(image).transpose(2, 0, 1).flags.c_contiguous
