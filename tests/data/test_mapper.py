import copy
import logging
import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import DetrDatasetMapper
from dn_detr_d2.data.mapper import BoxChecker, raw_corners


@pytest.fixture
def record(tmp_path):
    """A 60x40 image whose right half is white, with one box on that half."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    box = {"id": 5, "bbox": [30, 0, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0}
    return {"file_name": str(tmp_path / "half.png"), "height": 40, "width": 60, "image_id": 1, "annotations": [box]}


def mapper(toy_cfg, *overrides, is_train=True):
    base = ["INPUT.MIN_SIZE_TRAIN", (40,), "INPUT.CROP.ENABLED", False, "INPUT.RANDOM_FLIP", "none"]
    return DetrDatasetMapper(toy_cfg("dn_detr", *base, *overrides), is_train)


def test_image_is_uint8_channels_first_and_rgb(toy_cfg, record):
    Image.new("RGB", (60, 40), (200, 100, 50)).save(record["file_name"])
    image = mapper(toy_cfg)(record)["image"]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 40, 60))
    assert image[:, 0, 0].tolist() == [200, 100, 50]


def test_boxes_become_corners_and_keep_their_label(toy_cfg, record):
    instances = mapper(toy_cfg)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[30, 0, 60, 40]]
    assert instances.gt_classes.tolist() == [2]


def test_boxes_follow_the_flip_and_the_resize(toy_cfg, record):
    flip = mapper(toy_cfg, "INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (80,))
    seen = set()
    for seed in range(20):
        np.random.seed(seed)
        out = flip(record)
        x0, y0, x1, y1 = (int(v) for v in out["instances"].gt_boxes.tensor[0])
        assert out["image"][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].float().mean() > 250
        seen.add((x0, x1))
    assert seen == {(0, 60), (60, 120)}


def test_flips_in_both_directions_are_independent(toy_cfg, record):
    flip = mapper(toy_cfg, "INPUT.RANDOM_FLIP", "both", "INPUT.MIN_SIZE_TRAIN", (40,))
    record["annotations"][0]["bbox"] = [30, 0, 30, 10]
    seen = Counter()
    for seed in range(200):
        np.random.seed(seed)
        seen[tuple(int(v) for v in flip(record)["instances"].gt_boxes.tensor[0])] += 1
    assert seen.keys() == {(30, 0, 60, 10), (0, 0, 30, 10), (30, 30, 60, 40), (0, 30, 30, 40)}
    assert min(seen.values()) > 30  # 50 expected, with a standard deviation of 6


def test_an_unknown_flip_is_refused(toy_cfg):
    with pytest.raises(ConfigError, match=naming("INPUT.RANDOM_FLIP", "'diagonal'", "both")):
        mapper(toy_cfg, "INPUT.RANDOM_FLIP", "diagonal")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1))
@example(4238)
def test_crops_keep_boxes_on_their_objects(seed):
    crop = DetrDatasetMapper(True, image_format="RGB", num_classes=0, flips=[], **_crop_augmentations())
    rng = np.random.RandomState(seed)
    x, y, w, h = rng.randint(10, 60), rng.randint(10, 40), rng.randint(20, 50), rng.randint(20, 50)
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    np.random.seed(seed)
    box = {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    with mock.patch("dn_detr_d2.data.mapper.read_image", return_value=pixels):
        out = crop({"file_name": "x", "annotations": [box]})
    white = out["image"][0] > 128
    boxes = out["instances"].gt_boxes.tensor
    if not len(boxes):
        assert white.float().mean() < 0.02
        return
    if not white.any():  # a crop through the object's last pixels: resizing blends the sliver with the ground
        assert (boxes[0, 2:] - boxes[0, :2]).min() < 2.5
        return
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    torch.testing.assert_close(boxes[0], seen, atol=2.5, rtol=0)


def _crop_augmentations():
    from detectron2.data import transforms as T

    return {
        "crops": [T.ResizeShortestEdge((100, 140), sample_style="choice"), T.RandomCrop("absolute_range", (60, 110))],
        "resizes": [T.ResizeShortestEdge((96, 128), 200, "choice")],
    }


def test_crowds_are_left_out(toy_cfg, record):
    record["annotations"][0]["iscrowd"] = 1
    assert len(mapper(toy_cfg)(record)["instances"]) == 0


def test_an_image_without_boxes_has_empty_instances(toy_cfg, record):
    record["annotations"] = []
    instances = mapper(toy_cfg)(record)["instances"]
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)


def test_evaluation_has_no_instances_and_resizes_once(toy_cfg, record):
    out = mapper(toy_cfg, "INPUT.MIN_SIZE_TEST", 80, is_train=False)(record)
    assert "instances" not in out
    assert tuple(out["image"].shape) == (3, 80, 120)
    assert (out["height"], out["width"]) == (40, 60)


def test_a_test_size_of_0_leaves_the_image_as_it_is(toy_cfg, record):
    whole = mapper(toy_cfg, "INPUT.MIN_SIZE_TEST", 0, "INPUT.MAX_SIZE_TEST", 5, is_train=False)(record)
    assert whole["image"].shape[1:] == (record["height"], record["width"])


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_out_of_range_names_file_id_and_number_of_classes(toy_cfg, record, label):
    record["annotations"][0]["category_id"] = label
    with pytest.raises(DatasetError, match=naming("half.png", "annotation 5", label, "NUM_CLASSES", 5)):
        mapper(toy_cfg)(record)


def test_an_unreadable_image_is_named(toy_cfg, record):
    with open(record["file_name"], "r+b") as file:
        file.truncate(60)
    with pytest.raises(DatasetError, match=naming("half.png")):
        mapper(toy_cfg)(record)


def test_a_missing_image_is_named(toy_cfg, record):
    record["file_name"] += ".gone"
    with pytest.raises(DatasetError, match=naming("gone")):
        mapper(toy_cfg)(record)


def test_a_wrong_size_is_named(toy_cfg, record):
    record["width"] = 61
    with pytest.raises(DatasetError, match=naming("half.png", "60x40", "61x40")):
        mapper(toy_cfg)(record)


@pytest.mark.parametrize("form", [None, "polygon", "bitmask"])
def test_the_record_stays_as_it_was(toy_cfg, record, form):
    record["annotations"][0]["segmentation"] = [[30, 0, 60, 0, 60, 40, 30, 40]]
    before = copy.deepcopy(record)
    changed = mapper(toy_cfg, "INPUT.MIN_SIZE_TRAIN", (80,))
    changed.masks = form
    found = changed(record)
    assert record == before
    assert found["instances"].has("gt_masks") == (form is not None)


@pytest.mark.parametrize(
    ("box", "kept", "reason"),
    [
        ((1, 2, 11, 12), (1, 2, 11, 12), None),
        ((-0.5, 0, 60.4, 40), (0, 0, 60, 40), None),
        ((-9, 5, 30, 50), (0, 5, 30, 40), "sticks out"),
        ((5, 5, 5, 9), None, "positive"),
        ((9, 5, 5, 9), None, "positive"),
        ((61, 5, 70, 9), None, "outside"),
        ((float("nan"), 0, 1, 1), None, "finite"),
        ((0, 0, float("inf"), 1), None, "finite"),
    ],
)
def test_boxes_are_kept_clipped_or_dropped_with_a_named_warning(caplog, box, kept, reason):
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        result = BoxChecker()(list(map(float, box)), (40, 60), "x.png, annotation 9")
    assert result == (kept and list(map(float, kept)))
    if reason is None:
        assert not caplog.records
    else:
        assert reason in caplog.text
        assert "x.png, annotation 9" in caplog.text
        assert naming(1).search(caplog.messages[0])


def test_repeated_faults_are_counted_not_repeated(caplog):
    check = BoxChecker()
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        for i in range(25):
            check([5.0, 5, 5, 9], (40, 60), f"annotation {i}")
        for _ in range(3):  # later epochs meet the same boxes
            check([5.0, 5, 5, 9], (40, 60), "annotation 7")
    assert sum(check.counts.values()) == 25
    assert len(caplog.records) == 2  # the first and the tenth


NUMBERS = st.one_of(st.integers(-5000, 5000), st.floats(-5000, 5000), st.just(math.nan))


@settings(max_examples=100, deadline=None)
@given(box=st.lists(NUMBERS, min_size=4, max_size=4), mode=st.sampled_from([BoxMode.XYWH_ABS, BoxMode.XYXY_ABS]))
def test_corners_of_a_box_are_detectron2s(box, mode):
    expected = [float(x) for x in BoxMode.convert(box, mode, BoxMode.XYXY_ABS)]
    assert np.array_equal(raw_corners({"bbox": box, "bbox_mode": mode}), expected, equal_nan=True)
