"""Masks of annotations and what the mapper makes of them."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image
from pycocotools import mask as mask_util
from toy_training import MASKS as RCNN_MASKS
from toy_training import make_rcnn_cfg

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import DetrDatasetMapper, build_probe_loader, build_train_loader
from dn_detr_d2.data.mapper import AnnotatedDatasetMapper
from dn_detr_d2.data.masks import boxes_of, decoded, draw_mask, draw_polygons, has_mask, polygons, run_lengths

MASKS = ["MODEL.DN_DETR.MASK.ENABLED", True]


def compressed(bits):
    found = mask_util.encode(np.asfortranarray(bits, np.uint8))
    return {"size": list(bits.shape), "counts": found["counts"].decode()}


def counted(bits):
    """Uncompressed run lengths, slowly."""
    counts, value = [0], 0
    for bit in bits.T.reshape(-1).tolist():
        if bit != value:
            counts.append(0)
            value = bit
        counts[-1] += 1
    return {"size": list(bits.shape), "counts": counts}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
def test_run_lengths_give_back_the_mask(height, width, seed, filled):
    bits = np.random.RandomState(seed).rand(height, width) < filled
    for segmentation in (compressed(bits), counted(bits)):
        assert np.array_equal(decoded(segmentation, (height, width)), bits)
    assert run_lengths(compressed(bits), (height, width)).tolist() == counted(bits)["counts"]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.text(max_size=20), st.binary(max_size=20), st.lists(st.integers(-5, 40), max_size=9), st.integers())
)
def test_run_lengths_fill_their_image_or_are_refused(counts):
    try:
        runs = run_lengths({"size": [4, 5], "counts": counts}, (4, 5))
    except ValueError:
        return
    assert runs.sum() == 20
    assert runs.min() >= 0


def test_large_run_lengths_decode():
    bits = np.zeros((3000, 3000), bool)
    bits[-1, -1] = bits[0, 0] = True
    assert np.array_equal(decoded(compressed(bits), bits.shape), bits)


def test_run_lengths_of_another_image_are_named():
    with pytest.raises(ValueError, match=naming("5x4", "4x5")):
        run_lengths(counted(np.zeros((4, 5), bool)), (5, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, None]],
        [["1"] * 6],
        [3],
        "x",
        7,
        [[0.0] * 5 + [np.nan]],
    ],
)
def test_what_is_no_polygon_is_refused(wrong):
    with pytest.raises(ValueError, match=r"polygon|neither"):
        polygons(wrong)


def test_a_polygon_is_drawn_where_it_lies_in_the_image():
    square = np.array([[2.0, 1], [1e12, 1], [1e12, 4], [2, 4]])  # what reaches far out needs no memory
    expected = np.zeros((6, 8))
    expected[1:4, 2:] = 1
    assert np.array_equal(draw_polygons([square], (6, 8)), expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 2, 6]))
def test_polygons_are_drawn_as_pycocotools_draws_them(seed, decimals):
    rng = np.random.RandomState(seed)
    height, width = rng.randint(1, 60, 2)
    centres = rng.uniform(-0.3, 1.3, (rng.randint(1, 4), 1, 2)) * (width, height)
    rings = [np.round(c + rng.uniform(-15, 15, (rng.randint(3, 9), 2)), decimals) for c in centres]
    runs = mask_util.frPyObjects([ring.ravel().tolist() for ring in rings], height, width)
    assert np.array_equal(draw_polygons(rings, (height, width)), mask_util.decode(mask_util.merge(runs)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.02, 0.5]))
def test_boxes_of_masks_are_those_of_detectron2(seed, filled):
    rng = np.random.RandomState(seed)
    masks = rng.rand(rng.randint(0, 5), *rng.randint(1, 20, 2)) < filled
    boxes, kept = boxes_of(masks)
    theirs = BitMasks(torch.from_numpy(masks))
    assert np.array_equal(kept, theirs.nonempty())
    assert np.array_equal(boxes[kept], theirs.get_bounding_boxes().tensor[torch.from_numpy(kept)])


@pytest.mark.parametrize(
    ("segmentation", "found"), [([], False), ("", False), (None, False), ([[1, 2]], True), ({"size": []}, True)]
)
def test_an_empty_segmentation_is_no_mask(segmentation, found):
    assert has_mask({"segmentation": segmentation}) is found


@pytest.mark.parametrize("form", ["polygon", "compressed", "counted", "array"])
def test_masks_move_as_the_image_does(form):
    """The object of a picture is what is white in it, before and after."""
    bits = np.zeros((40, 60), bool)
    bits[8:30, 10:44] = True
    ring = [10, 8, 44, 8, 44, 30, 10, 30]
    segmentation = {"polygon": [ring], "compressed": compressed(bits), "counted": counted(bits), "array": bits}[form]
    augmented = T.AugInput(np.repeat(bits[..., None] * np.uint8(255), 3, 2))
    steps = [T.RandomFlip(1.0), T.CropTransform(20, 4, 36, 30), T.ResizeTransform(30, 36, 60, 72)]
    transforms = T.AugmentationList(steps)(augmented)
    mask = np.zeros((60, 72), bool)
    draw_mask(mask, segmentation, transforms, (40, 60))
    white = augmented.image[..., 0] > 127
    assert 0 < white.mean() < 1
    assert (mask != white).mean() < 0.04  # a row or a column at the edge


@pytest.fixture
def record(tmp_path):
    """A 60x40 image with a white triangle, its box and its polygon."""
    ring = [10, 5, 50, 5, 10, 35]
    pixels = np.repeat(draw_polygons(polygons([ring]), (40, 60))[..., None] * np.uint8(255), 3, 2)
    Image.fromarray(pixels).save(tmp_path / "triangle.png")
    box = {"bbox": [10, 5, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0}
    box |= {"id": 5, "segmentation": [ring]}
    return {"file_name": str(tmp_path / "triangle.png"), "height": 40, "width": 60, "image_id": 1, "annotations": [box]}


CROPS = ["INPUT.CROP.RESIZE", [60, 80], "INPUT.CROP.SIZE", [14, 24], "INPUT.MIN_SIZE_TRAIN", (40, 56, 72)]


def test_boxes_after_a_crop_are_those_of_the_masks(toy_cfg, record):
    mapper, seen = DetrDatasetMapper(toy_cfg("dn_detr", *MASKS, *CROPS)), 0
    for seed in range(60):
        np.random.seed(seed)
        out = mapper(record)
        objects, white = out["instances"], out["image"][0] > 127
        assert isinstance(objects.gt_masks, BitMasks)
        assert objects.gt_masks.tensor.shape[1:] == objects.image_size == tuple(white.shape)
        if len(objects):
            assert (objects.gt_masks.tensor[0] != white).float().mean() < 0.08
            close = (objects.gt_boxes.tensor - objects.gt_masks.get_bounding_boxes().tensor).abs().max()
            assert close < 3
        else:
            assert white.float().mean() < 0.02
        seen += len(objects)
    assert 30 < seen < 60  # in some crops there is nothing of it, though of its box


def test_an_image_without_objects_has_no_masks_of_its_size(toy_cfg, record):
    record["annotations"] = []
    out = AnnotatedDatasetMapper(toy_cfg("dn_detr", *MASKS))(record)
    assert out["instances"].gt_masks.tensor.shape == (0, *out["image"].shape[1:])


def test_polygons_stay_polygons_where_detectron2s_detectors_ask_for_them(record):
    cfg = make_rcnn_cfg("unused", *RCNN_MASKS, "INPUT.MASK_FORMAT", "polygon", "INPUT.CROP.ENABLED", False)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (40,)
    masks = DetrDatasetMapper(cfg)(record)["instances"].gt_masks
    assert masks.polygons[0][0].tolist() == record["annotations"][0]["segmentation"][0]


def test_polygons_that_no_package_can_crop_are_refused_beforehand(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg = make_rcnn_cfg("unused", *RCNN_MASKS, "INPUT.MASK_FORMAT", "polygon", "INPUT.CROP.ENABLED", True)
    with pytest.raises(ConfigError, match=naming("INPUT.MASK_FORMAT", "bitmask")):
        DetrDatasetMapper(cfg)


@pytest.mark.parametrize(
    ("segmentation", "named"),
    [
        ({"size": [60, 40], "counts": [2400]}, ("40x60", "60x40")),
        ({"size": [40, 60], "counts": [1]}, (1, 2400)),
        ({"size": [40, 60], "counts": "~~"}, ("counts",)),
        ([[1, 2, 3]], (3, "coordinates")),
        ("polygon", ("polygon",)),
        ([], ("MODEL.DN_DETR.MASK.ENABLED",)),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(toy_cfg, record, segmentation, named):
    record["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(DatasetError, match=naming("triangle.png", "annotation 5", *named)):
        AnnotatedDatasetMapper(toy_cfg("dn_detr", *MASKS))(record)
    plain = AnnotatedDatasetMapper(toy_cfg("dn_detr"))(record)  # where boxes are trained, it costs nothing
    assert len(plain["instances"]) == 1


def test_shapes_train_and_are_probed_with_masks(toy_cfg):
    cfg = toy_cfg("dn_detr", *MASKS, "DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", "auto")
    cfg.DATALOADER.NUM_WORKERS = 0
    batch = [*next(iter(build_train_loader(cfg))), *next(iter(build_probe_loader(cfg, "shapes_val", 3)))]
    assert sum(len(record["instances"]) for record in batch)
    for record in batch:
        objects = record["instances"]
        assert objects.gt_masks.tensor.shape == (len(objects), *record["image"].shape[1:])
        assert objects.gt_masks.tensor.flatten(1).any(1).all()
        assert torch.allclose(objects.gt_boxes.tensor, objects.gt_masks.get_bounding_boxes().tensor, atol=3)


def test_objects_without_masks_are_counted_before_a_training(toy_cfg, record, tmp_path):
    plain = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 40, 30]}
    polygon = {"segmentation": record["annotations"][0]["segmentation"]}
    annotations = [plain | polygon, plain | {"id": 2}, plain | {"id": 3, "iscrowd": 1}]
    images = [{"id": 1, "file_name": "triangle.png", "width": 60, "height": 40}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "triangle"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    own = ["DATASETS.COCO_JSON", [["test_masks", str(tmp_path / "set.json"), str(tmp_path)]]]
    own += ["DATASETS.TRAIN", ("test_masks",), "DATASETS.TEST", (), "MODEL.DN_DETR.NUM_CLASSES", 1]
    cfg = toy_cfg("dn_detr", *MASKS, *own)
    for load in (build_train_loader, lambda cfg: build_probe_loader(cfg, "test_masks")):
        with pytest.raises(DatasetError, match=naming("test_masks", 1, "of 2", 2, "MODEL.DN_DETR.MASK.ENABLED")):
            load(cfg)
