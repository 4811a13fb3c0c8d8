"""Boxes of another convention are named, files whose boxes are COCO's never are."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import load_coco_json
from dn_detr_d2.data.check import annotated_sizes, check_content
from dn_detr_d2.data.conventions import CHOICES, CONVENTIONS, NORMALISED, only_first_pixels, other_convention, to_xywh
from dn_detr_d2.data.issues import Issue
from dn_detr_d2.data.repair import converted, refuse_to_clip, repaired
from dn_detr_d2.data.report import Report

UNSEEN = [x for x in CHOICES if x.endswith(("-percent", "-thousandths"))]  # which cannot be told from pixels
SEEN = [x for x in CHOICES if x not in UNSEEN]


def scene(seed, count, height=480, width=640, reach=0.0):
    """(A, 4) boxes inside an image, or up to ``reach`` of its sides out of it, and (A, 2) its size."""
    dice = np.random.default_rng(seed)
    shape = np.array([width, height])
    lengths = np.maximum(shape * dice.uniform(0.02, 0.6, (count, 2)), 1)
    corner = (shape * (1 + 2 * reach) - lengths) * dice.random((count, 2)) - shape * reach
    return np.concatenate([corner, lengths], 1), np.tile([float(height), width], (count, 1))


def written_as(boxes, sizes, convention):
    """The inverse of to_xywh, box by box in plain arithmetic."""
    result = []
    for (x, y, w, h), (height, width) in zip(boxes, sizes, strict=True):
        if convention.endswith("-normalised"):
            x, y, w, h = x / width, y / height, w / width, h / height
        forms = {
            "xywh": [x, y, w, h],
            "xyxy": [x, y, x + w, y + h],
            "cxcywh": [x + w / 2, y + h / 2, w, h],
            "yxhw": [y, x, h, w],
            "yxyx": [y, x, y + h, x + w],
        }
        result.append(forms[convention.removesuffix("-normalised")])
    return np.array(result)


@pytest.mark.parametrize("convention", SEEN)
@pytest.mark.parametrize("count", [12, 400])
def test_every_convention_is_noticed_and_can_be_converted_back(convention, count):
    boxes, sizes = scene(0, count)
    written = written_as(boxes, sizes, convention)
    words = other_convention(written, sizes)
    if convention == "xywh":
        assert words is None
    elif "normalised" in convention:
        assert words == NORMALISED
    else:
        assert CONVENTIONS[convention] in words
    np.testing.assert_allclose(to_xywh(written, sizes, convention), boxes, atol=1e-9)


@settings(max_examples=300, deadline=None, derandomize=True)
@example(seed=0, count=4, height=1, width=1, reach=0.2, whole=False)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(0, 300), height=st.integers(1, 3000), width=st.integers(1, 3000),
    reach=st.sampled_from([0, 0, 0.02, 0.2]), whole=st.booleans(),
)  # fmt: skip
def test_a_file_in_cocos_convention_is_never_named(seed, count, height, width, reach, whole):
    """Also where boxes stick out on all sides by a fifth of the image, as rotated ones do; none is below a pixel."""
    boxes, sizes = scene(seed, count, height, width, reach)
    if whole:
        boxes = np.round(boxes)
    assert other_convention(boxes, sizes) is None
    assert not only_first_pixels(boxes, sizes)


# Boxes at random agree with any convention once in many thousand files, so the examples are always the same ones.
@settings(max_examples=300, deadline=None, derandomize=True)
@example(seed=1664564795, count=10, height=8, width=15, whole=True)  # read as centres
@example(seed=3106833893, count=11, height=40, width=40, whole=True)  # read as centres
@example(seed=1408040010, count=10, height=48, width=41, whole=True)  # read as swapped
@example(seed=384492123, count=30, height=8, width=8, whole=True)  # read as swapped
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(4, 30), height=st.integers(1, 60), width=st.integers(1, 60),
    whole=st.booleans(),
)  # fmt: skip
def test_a_few_boxes_in_small_images_are_never_named(seed, count, height, width, whole):
    boxes, sizes = scene(seed, count, height, width, 0.2)
    assert other_convention(np.round(boxes) if whole else boxes, sizes) is None


BAD = {
    "outside": [-5.0, 3, 20, 20],
    "degenerate corners": [50.0, 50, 50, 60],
    "no width": [50.0, 50, 0, 60],
    "not finite": [np.nan, 1, 2, 3],
    "infinite": [1.0, 1, np.inf, 3],
    "negative": [70.0, 60, 20, 10],
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("count", "spoilt"), [(30, 2), (1000, 6)])
def test_a_few_bad_boxes_do_not_hide_the_convention_of_the_others(bad, convention, count, spoilt):
    boxes, sizes = scene(5, count)
    written = np.concatenate([written_as(boxes, sizes, convention), [BAD[bad]] * spoilt])
    assert CONVENTIONS[convention] in other_convention(written, np.concatenate([sizes, sizes[:spoilt]]))


def test_degenerate_corners_and_padded_corners_are_corners():
    boxes, sizes = scene(6, 36, 80, 100)
    corners = written_as(boxes, sizes, "xyxy")
    assert CONVENTIONS["xyxy"] in other_convention(corners + np.array([-3, -3, 3, 3]), sizes)
    corners[:6, 2] = corners[:6, 0]
    assert CONVENTIONS["xyxy"] in other_convention(corners, sizes)


@pytest.mark.parametrize(("unit", "whole"), [("percent", 100), ("thousandths", 1000)])
@pytest.mark.parametrize("name", ["xywh", *CONVENTIONS])
def test_percentages_and_thousandths_can_be_converted(unit, whole, name):
    boxes, sizes = scene(2, 12)
    written = written_as(boxes, sizes, f"{name}-normalised") * whole
    np.testing.assert_allclose(to_xywh(written, sizes, f"{name}-{unit}"), boxes, atol=1e-9)


def test_the_question_about_percentages_names_a_way_out_that_works():
    boxes, sizes = scene(1, 300)
    content = a_file(
        written_as(boxes, sizes, "xywh-normalised") * 100, area=25.0, segmentation=[[10, 20, 50, 20, 50, 60]]
    )
    report, shapes = Report(), annotated_sizes(content["images"])
    check_content(content, report, shapes)
    assert "xywh-percent" in report.first[Issue.MAYBE_CONVENTION][0]
    fixed = converted(content, shapes, "xywh-percent")
    np.testing.assert_allclose([x["bbox"] for x in fixed["annotations"]], boxes, atol=1e-9)
    assert fixed["annotations"][0]["segmentation"] == [pytest.approx([64, 96, 320, 96, 320, 288])]
    assert fixed["annotations"][0]["area"] == pytest.approx(25 * 6.4 * 4.8)
    for answered in (fixed, converted(content, shapes, "xywh")):
        report = Report()
        check_content(answered, report, shapes)
        assert not report.counts[Issue.MAYBE_CONVENTION]


def a_file(boxes, height=480, width=640, **fields):
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "nut"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": list(map(float, box))} | fields
            for i, box in enumerate(boxes)
        ],
    }


def test_many_boxes_that_stick_out_are_clipped_only_if_told():
    boxes = [[600.0, 100, 100, 50], [-60, 100, 100, 50], [100, 100, 50, 50], [300, 400, 50, 60]] * 3
    content = a_file(boxes)
    sizes = annotated_sizes(content["images"])
    with pytest.raises(DatasetError, match=naming("6 of 12", "--boxes xywh")):
        refuse_to_clip(content, sizes)
    refuse_to_clip(converted(content, sizes, "xywh"), sizes)
    refuse_to_clip(a_file(boxes[:7]), sizes)  # few
    refuse_to_clip(a_file(boxes[:4] + [[100, 100, 50, 50]] * 4), sizes)  # a quarter
    refuse_to_clip(a_file([[630.0, 100, 20, 50]] * 12), sizes)  # by 10 pixels of 640


def test_the_verdict_about_one_tiny_box_is_the_same_before_and_after_the_repair():
    content = a_file([[0, 0, 1, 2.5e-232]], 20, 30)
    report, sizes = Report(), annotated_sizes(content["images"])
    once, changes = repaired(content, sizes)
    assert (once["annotations"], dict(changes)) == ([], {Issue.NOT_POSITIVE: 1})
    check_content(content, report, sizes)
    assert (report.counts[Issue.CONVENTION], report.counts[Issue.NOT_POSITIVE]) == (0, 1)


def test_boxes_are_judged_only_once_their_convention_is_known():
    content = a_file([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, np.nan, 0.4]])
    report, sizes = Report(), annotated_sizes(content["images"])
    check_content(content, report, sizes)
    assert (report.counts[Issue.CONVENTION], report.counts[Issue.NOT_FINITE]) == (1, 0)
    assert not repaired(content, sizes)[1]
    report = Report()
    check_content(converted(content, sizes, "xywh-normalised"), report, sizes)
    assert (report.counts[Issue.CONVENTION], report.counts[Issue.NOT_FINITE]) == (0, 1)


@pytest.mark.parametrize(
    ("fields", "area", "ring"),
    [
        ({"area": 0.5 * 0.25, "segmentation": []}, 320 * 120, None),
        ({"area": 7.0}, 320 * 120, None),  # of no mask
        ({"area": 0.5 * 0.25, "segmentation": [[0.25, 0.5, 0.75, 0.5, 0.5, 0.75]]}, 320 * 120,
         [160, 240, 480, 240, 320, 360]),
        ({"area": 0.0625, "segmentation": [[0.25, 0.5, 0.75, 0.5, 0.5, 0.75]]}, 19200, [160, 240, 480, 240, 320, 360]),
        ({"area": 19200.0, "segmentation": [[160, 240, 480, 240, 320, 360]]}, 19200, [160, 240, 480, 240, 320, 360]),
    ],
)  # fmt: skip
def test_areas_and_polygons_follow_their_normalised_boxes(fields, area, ring):
    content = a_file([[0.25, 0.5, 0.5, 0.25]], **fields)
    [entry] = converted(content, annotated_sizes(content["images"]), "xywh-normalised")["annotations"]
    assert entry["bbox"] == [160, 240, 320, 120]
    assert entry["area"] == pytest.approx(area)
    if ring:
        assert entry["segmentation"] == [ring]


@pytest.mark.parametrize(
    ("fields", "area"),
    [
        ({"area": 30 * 40.0}, 20 * 20),
        ({"area": 30 * 40.0, "segmentation": [[10, 20, 30, 20, 30, 40]]}, 20 * 20),
        ({"area": 200.0, "segmentation": [[10, 20, 30, 20, 30, 40]]}, 200),  # the mask's
    ],
)
def test_areas_follow_corners_unless_they_are_a_masks(fields, area):
    content = a_file([[10, 20, 30, 40]], **fields)
    [entry] = converted(content, annotated_sizes(content["images"]), "xyxy")["annotations"]
    assert (entry["bbox"], entry["area"]) == ([10, 20, 20, 20], area)
    assert entry.get("segmentation") == fields.get("segmentation")


def test_small_objects_and_single_boxes_are_no_other_convention():
    sizes = np.tile([480.0, 640.0], (5, 1))
    assert other_convention(np.array([[0, 0, 1, 1]] * 5, float), sizes) is None  # whole pixels
    assert other_convention(np.array([[300.2, 200.1, 0.4, 0.5]] * 5), sizes) is None
    assert other_convention(np.array([[400.0, 300, 600, 400]]), sizes[:1]) is None  # one box proves nothing
    assert other_convention(np.zeros((0, 4)), np.zeros((0, 2))) is None
    assert other_convention(np.full((3, 4), np.nan), sizes[:3]) is None


def test_normalised_boxes_are_noticed_without_sizes_and_among_a_few_others():
    boxes = np.array([[0.2, 0.3, 0.1, 0.25]] * 6 + [[30.0, 40, 20, 10]] * 2)
    assert other_convention(boxes, np.full((8, 2), np.inf)) == NORMALISED


def test_percentages_are_said_but_not_refused():
    boxes, sizes = scene(1, 300)
    percent = boxes / sizes[:, [1, 0, 1, 0]] * 100
    assert other_convention(percent, sizes) is None
    assert only_first_pixels(percent, sizes)


@pytest.mark.parametrize("convention", [x for x in SEEN if x != "xywh"])
def test_a_file_of_another_convention_is_refused_reported_never_clipped_and_has_ways_out(tmp_path, convention):
    boxes, sizes = scene(3, 20)
    written = written_as(boxes, sizes, convention).tolist()
    Image.new("L", (640, 480)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "nut"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(written)],
    }

    def read(changed):
        (tmp_path / "set.json").write_text(json.dumps(changed))
        return [x["bbox"] for x in load_coco_json(tmp_path / "set.json", tmp_path)[0]["annotations"]]

    with pytest.raises(DatasetError, match=naming("set.json", "--boxes")) as caught:
        read(content)
    assert caught.value.kind == Issue.CONVENTION
    report, shapes = Report(), annotated_sizes(content["images"])
    check_content(content, report, shapes)
    assert report.counts[Issue.CONVENTION] == 1
    fixed, changes = repaired(content, shapes)
    assert [x["bbox"] for x in fixed["annotations"]] == written
    assert not changes
    np.testing.assert_allclose(read(converted(content, shapes, convention)), boxes, atol=1e-6)
    assert read(converted(content, shapes, "xywh")) == written
    del content["images"][0]["width"]
    with pytest.raises(DatasetError, match=naming("set.json", "--boxes")):  # the image says how large it is
        read(content)
