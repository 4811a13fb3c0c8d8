"""The checker finds what was planted, judges as the training does, and survives every mutation of a file."""

import copy
import json
import logging
import math
import random
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import valid_coco
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.data import load_coco_json, read_image
from dn_detr_d2.data.check import annotated_sizes, check_content, histogram
from dn_detr_d2.data.check_images import MODES, check_images, check_overlap
from dn_detr_d2.data.coco_custom import read_content
from dn_detr_d2.data.columns import VERDICTS, judge_boxes, objects_of
from dn_detr_d2.data.images import FORMATS, MAX_PIXELS, ImageFolder, image_facts
from dn_detr_d2.data.issues import Issue, Severity
from dn_detr_d2.data.mapper import BoxChecker
from dn_detr_d2.data.repair import repaired
from dn_detr_d2.data.report import SHOWN, Report

NUMBERS = st.sampled_from([0, 1, -1, 5, 29.5, 30, 31.5, 1e-9, 1e39, 1e400, float("nan"), 10**400]) | st.floats(-50, 80)


def checked(content, **limits):
    report = Report()
    check_content(content, report, annotated_sizes(objects_of(content, "images")), **limits)
    return report


def planted(kind, **changes):
    """A fault: (what must be counted once, changes of lists by index)."""
    return pytest.param(kind, changes, id=f"{kind} {changes}"[:90])


FAULTS = [
    planted(Issue.IMAGE_ID, images={0: {"id": None}}),
    planted(Issue.IMAGE_ID, images={0: {"id": 1.5}}),
    planted(Issue.IMAGE_ID, images={0: {"id": [1]}}),
    planted(Issue.SAME_IMAGE_ID, images={0: {"id": 2}}),
    planted(Issue.FILE_NAME, images={0: {"file_name": 5}}),
    planted(Issue.SAME_FILE_NAME, images={0: {"file_name": "b.png"}}),
    planted(Issue.BAD_SIZE, images={0: {"width": "30"}}),
    planted(Issue.BAD_SIZE, images={0: {"height": -20}}),
    planted(Issue.ANNOTATION_ID, annotations={1: {"id": True}}),
    planted(Issue.SAME_ANNOTATION_ID, annotations={1: {"id": 3}}),
    planted(Issue.UNKNOWN_IMAGE, annotations={1: {"image_id": 99}}),
    planted(Issue.UNKNOWN_IMAGE, annotations={1: {"image_id": {}}}),
    planted(Issue.UNKNOWN_CATEGORY, annotations={1: {"category_id": 0}}),
    planted(Issue.BAD_BOX, annotations={1: {"bbox": None}}),
    planted(Issue.BAD_BOX, annotations={1: {"bbox": [1, 2, 3]}}),
    planted(Issue.BAD_BOX, annotations={1: {"bbox": [1, 2, "3", 4]}}),
    planted(Issue.BAD_CROWD, annotations={1: {"iscrowd": "0"}}),
    planted(Issue.NOT_FINITE, annotations={1: {"bbox": [1, 2, float("nan"), 4]}}),
    planted(Issue.NOT_FINITE, annotations={1: {"bbox": [1, 2, 10**400, 4]}}),
    planted(Issue.NOT_POSITIVE, annotations={1: {"bbox": [1, 2, -3, 4]}}),
    planted(Issue.NOT_POSITIVE, annotations={1: {"bbox": [1, 2, 3, 0]}}),
    planted(Issue.BOX_OUTSIDE, annotations={1: {"bbox": [31, 2, 3, 4]}}),
    planted(Issue.STICKS_OUT, annotations={1: {"bbox": [-5, 2, 13, 4]}}),
    planted(Issue.CATEGORY_ID, categories={0: {"id": None}}),
    planted(Issue.SAME_CATEGORY_ID, categories={0: {"id": 2}}),
    planted(Issue.CATEGORY_NAME, categories={0: {"name": None}}),
    planted(Issue.SAME_NAME, categories={0: {"name": "dog"}}),
    planted(Issue.CROWD, annotations={1: {"iscrowd": 1}}),
    planted(Issue.NO_BOXES, annotations={0: {"image_id": 2}, 1: {"image_id": 2}}),
    planted(Issue.UNUSED, annotations={0: {"category_id": 2}, 1: {"category_id": 2}}),
    planted(Issue.GAPS, categories={0: {"id": 7}}),
]  # fmt: skip


# What a fault's line begins with: the record by its place in the file or by its id; of doubles it is the second.
PLACES = {
    **dict.fromkeys((Issue.IMAGE_ID, Issue.FILE_NAME, Issue.BAD_SIZE), "images[0] "),
    **dict.fromkeys((Issue.SAME_IMAGE_ID, Issue.SAME_FILE_NAME), "images[1] "),
    **dict.fromkeys((Issue.ANNOTATION_ID, Issue.SAME_ANNOTATION_ID), "annotations[1] "),
    **dict.fromkeys((Issue.UNKNOWN_IMAGE, Issue.UNKNOWN_CATEGORY, Issue.BAD_BOX, Issue.BAD_CROWD), "annotation 4, "),
    **dict.fromkeys((Issue.NOT_FINITE, Issue.NOT_POSITIVE, Issue.BOX_OUTSIDE, Issue.STICKS_OUT), "annotation 4, "),
    **dict.fromkeys((Issue.CATEGORY_ID, Issue.CATEGORY_NAME), "categories[0] "),
    **dict.fromkeys((Issue.SAME_CATEGORY_ID, Issue.SAME_NAME), "categories[1] "),
    **{
        Issue.CROWD: "annotation 4, ",
        Issue.NO_BOXES: "image 1 ",
        Issue.UNUSED: "'cat'",
        Issue.GAPS: "2 ids from 2 to 7",
    },
}


@pytest.mark.parametrize(("kind", "changes"), FAULTS)
def test_a_planted_fault_is_counted_once_and_names_its_record(kind, changes):
    content = valid_coco()
    for name, entries in changes.items():
        for i, change in entries.items():
            content[name][i] |= change
    report = checked(content)
    assert report.counts[kind] == 1
    assert report.first[kind][0].startswith(PLACES[kind])
    # follow from some faults
    changed_references = {Issue.UNKNOWN_IMAGE, Issue.UNKNOWN_CATEGORY, Issue.SAME_NAME, Issue.SAME_FILE_NAME}
    assert set(report.problems()) - changed_references <= {kind}


def test_a_valid_file_has_no_problem_and_the_right_numbers():
    report = checked(valid_coco(), num_queries=2)
    assert report.problems() == {}
    assert (report.num_images, report.num_annotations, report.fullest) == (2, 3, (2, "image 1 'a.png'"))
    assert report.objects == {"1": 1, "2-3": 1}
    assert report.classes == {"cat": 1, "dog": 2}


def test_all_problems_are_listed_not_only_the_first():
    content = valid_coco()
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, -1, 1]} for _ in range(12)]
    report = checked(content)
    assert report.problems() == {Issue.SAME_ANNOTATION_ID: 11, Issue.NOT_POSITIVE: 12, Issue.NOTHING: 1}
    assert len(report.first[Issue.NOT_POSITIVE]) == SHOWN
    assert any(naming(f"12 x {Issue.NOT_POSITIVE}", 7).search(line) for line in report.lines())


def test_crowded_images_are_compared_with_the_queries():
    assert checked(valid_coco(), num_queries=1, budget=1).counts[Issue.CROWDED] == 1
    assert checked(valid_coco(), num_queries=1, budget=1).counts[Issue.OVER_BUDGET] == 1


@pytest.mark.parametrize("content", [{}, {"images": 3}, {"images": [4], "annotations": {}, "categories": [[]]}])
def test_lists_that_are_none_are_reported(content):
    assert checked(content).problems()


def test_the_histogram_has_every_image_once():
    counts = np.array([0, 0, 1, 3, 700, 5000])
    assert histogram(counts) == {"0": 2, "1": 1, "2-3": 1, "512-1023": 1, "1024+": 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(NUMBERS, min_size=4, max_size=4))
def test_boxes_are_judged_as_the_mapper_judges_them(box):
    with without_warnings():
        compare_with_the_mapper(box)


@contextmanager
def without_warnings():
    """Of hundreds of boxes."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def compare_with_the_mapper(box):
    content = valid_coco(annotations=[{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}])
    counts = checked(content).counts
    floats = [math.inf if abs(x) > 1e308 else float(x) for x in box]
    mapper = BoxChecker()
    corners = BoxMode.convert(floats, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    mapper([float(x) for x in corners], (20, 30), "x")
    found = [kind for kind in VERDICTS[1:] if counts[kind]]
    assert [kind.removeprefix("box ").split(" its ")[0] for kind in found] == [
        kind.split("because it ")[1] for kind in mapper.counts
    ]


def test_no_boxes_are_judged_too():
    assert judge_boxes(np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32)).shape == (0,)


@st.composite
def contents(draw):
    ids = st.sampled_from([1, 2, 3, 3.5, None, "x", True])
    boxes = st.lists(NUMBERS, min_size=4, max_size=4) | st.sampled_from([None, [1, 2], "x"])
    entry = st.fixed_dictionaries({"id": ids, "bbox": boxes, "image_id": st.sampled_from([1, 2, 9]),
                                   "category_id": st.sampled_from([1, 2, 9]), "area": st.just(1)})  # fmt: skip
    return valid_coco(annotations=draw(st.lists(entry | st.just(4), max_size=6)))


@settings(max_examples=60, deadline=None)
@given(contents())
def test_a_repaired_file_has_nothing_to_repair_and_repairing_twice_changes_nothing(content):
    before, sizes = copy.deepcopy(content), annotated_sizes(content["images"])
    once, changes = repaired(content, sizes)
    assert repr(content) == repr(before)
    assert not {kind for kind in checked(once).counts if kind.repairable}
    twice, no_changes = repaired(once, sizes)
    assert repr(twice) == repr(once)
    assert not no_changes
    found = checked(content).counts
    assert all(changes[kind] == found[kind] for kind in VERDICTS[1:])


SCRAPS = [None, True, -1, 0, 1.5, 1e999, float("nan"), 10**400, "", "x", "\0", "\ud800", "../a.png", "/", "x" * 5000,
          [], {}, [[]], {"id": 1}]  # fmt: skip


def mutate(value, dice):
    """``value`` with one thing inside it replaced, removed or doubled."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.1:
        return dice.choice(SCRAPS)
    key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
    changed, action = copy.copy(value), dice.random()
    if action < 0.1:
        del changed[key]
    elif action < 0.2 and isinstance(value, list):
        changed.append(value[key])
    else:
        changed[key] = mutate(value[key], dice)
    return changed


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_file_ends_in_a_report_or_an_error_with_its_name(tmp_path, seed):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    dice, path, named, unseen = random.Random(seed), tmp_path / "set.json", [], []
    for _ in range(100):
        path.write_text(json.dumps(mutate(valid_coco(), dice)))
        try:
            content, report = read_content(path), Report()
            sizes = check_images(objects_of(content, "images"), tmp_path, report)
            check_content(content, report, sizes)
            "\n".join(report.lines()).encode()
            repaired(content, sizes)
        except DatasetError as error:
            named.append(str(error))
            continue
        try:
            load_coco_json(path, tmp_path)
        except DatasetError as error:
            named.append(str(error))
            unseen += [str(error)] * (not report.problems())
    assert len(named) > 10
    assert all("set.json" in sentence for sentence in named)
    assert unseen == []  # what the training refuses and the checker praises


def save(path, mode="RGB", size=(30, 20), **options):
    Image.new(mode, size).save(path, **options)


def make_file(path, fault):
    """Writes an image file with a fault; the kind that both the checker and the training must find."""
    if fault == Issue.DAMAGED:
        Image.effect_noise((30, 20), 90).convert("RGB").save(path, "PNG")
        path.write_bytes(path.read_bytes()[:-300])
    elif fault == Issue.NOT_AN_IMAGE:  # Pillow would start Ghostscript for it
        save(path, format="EPS")
    elif fault == Issue.TOO_LARGE:
        save(path, "1", (16384, MAX_PIXELS // 16384 + 1), format="PNG")
    elif fault == Issue.DEEP:
        save(path, "I;16", format="PNG")


@pytest.mark.parametrize("fault", [Issue.MISSING, Issue.DAMAGED, Issue.NOT_AN_IMAGE, Issue.TOO_LARGE, Issue.DEEP])
def test_an_image_that_the_training_refuses_is_reported_as_that(tmp_path, fault):
    path = tmp_path / "a.jpg"
    make_file(path, fault)
    with pytest.raises(DatasetError, match=naming("a.jpg")) as caught:
        read_image(str(path), "RGB")
    assert caught.value.kind == fault
    report = Report()
    check_images([{"id": 1, "file_name": "a.jpg"}], tmp_path, report)
    assert dict(report.counts) == {fault: 1}


MADE = {
    "L": Issue.GREY,
    "1": Issue.GREY,
    "P": Issue.PALETTE,
    "RGBA": Issue.ALPHA,
    "LA": Issue.ALPHA,
    "CMYK": Issue.CMYK,
    "RGB": None,
}


@pytest.mark.parametrize("mode", MADE)
def test_other_colour_modes_are_read_as_colours_and_said(tmp_path, mode):
    Image.new(mode, (30, 20), None if mode == "P" else 0).save(tmp_path / "a.tif")
    assert read_image(str(tmp_path / "a.tif"), "RGB").shape == (20, 30, 3)
    report = Report()
    check_images([{"id": 1, "file_name": "a.tif", "width": 30, "height": 20}], tmp_path, report)
    assert list(report.counts) == ([MADE[mode]] if MADE[mode] else [])
    assert report.problems() == {}


def test_pixels_of_a_transparent_image_are_its_colours_and_cmyk_is_converted(tmp_path):
    Image.new("RGBA", (3, 2), (200, 100, 50, 7)).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png"), "RGB")[0, 0].tolist() == [200, 100, 50]
    Image.new("CMYK", (3, 2), (255, 0, 0, 0)).save(tmp_path / "b.tif")
    assert read_image(str(tmp_path / "b.tif"), "BGR")[0, 0].tolist() == [255, 255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_decides_the_size(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.jpg", exif=exif)
    expected = (20, 30) if orientation < 5 else (30, 20)
    assert read_image(str(tmp_path / "a.jpg"), "RGB").shape[:2] == expected
    report = Report()
    sizes = check_images([{"id": 1, "file_name": "a.jpg", "width": 30, "height": 20}], tmp_path, report)
    assert sizes.tolist() == [list(expected)]
    assert report.counts[Issue.TURNED] == (orientation > 1)
    assert report.counts[Issue.SIZE] == (orientation > 4)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_allowed_format_is_read_whatever_its_name(tmp_path, image_format):
    save(tmp_path / "a.dat", format=image_format)
    assert image_facts(str(tmp_path / "a.dat")).size == (20, 30)


def test_names_that_leave_the_folder_are_refused(tmp_path):
    inside, outside = tmp_path / "images", tmp_path / "secret.png"
    (inside / "sub").mkdir(parents=True)
    save(outside)
    save(inside / "sub" / "a.png")
    (inside / "file_link.png").symlink_to(outside)
    (inside / "folder_link").symlink_to(tmp_path)
    (inside / "good_link.png").symlink_to(inside / "sub" / "a.png")
    (tmp_path / "whole").symlink_to(inside)
    names = ("../secret.png", str(outside), "sub/../../secret.png", "file_link.png", "folder_link/secret.png")
    for name in names:
        with pytest.raises(DatasetError, match=r"(secret|link)\.png") as caught:
            ImageFolder(inside).find(name)
        assert caught.value.kind == Issue.OUTSIDE
        (tmp_path / "s.json").write_text(json.dumps(valid_coco(images=[{"id": 1, "file_name": name}])))
        with pytest.raises(DatasetError, match=naming("s.json", "image 1", repr(name))):
            load_coco_json(tmp_path / "s.json", inside)
    for name in ("sub/a.png", "good_link.png"):
        assert ImageFolder(tmp_path / "whole").find(name) == str(tmp_path / "whole" / name)


def test_images_of_two_sets_are_compared_by_file_and_by_bytes(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "namesake.png", size=(30, 20 if folder == "val" else 21))
    save(tmp_path / "train" / "a.png", "L")
    save(tmp_path / "val" / "b.png", "L")
    first = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "namesake.png"}]
    second = [{"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "namesake.png"}]
    counts = {}
    for read in (True, False):
        report = Report()
        check_overlap(first, tmp_path / "train", second, tmp_path / "val", report, read)
        counts[read] = dict(report.counts)
    assert counts == {True: {Issue.SAME_BYTES: 1, Issue.NAMESAKE: 1}, False: {Issue.NOT_COMPARED: 1}}
    report = Report()
    check_overlap(first, tmp_path / "train", first[1:], tmp_path / "train", report, False)
    assert dict(report.counts) == {Issue.SAME_FILE: 1}


def test_issues_have_descriptions_of_their_own_and_repairs_concern_problems():
    assert len({str(issue) for issue in Issue}) == len(Issue.__members__)
    assert all(issue.severity is not Severity.FINE for issue in Issue if issue.repairable)
    assert {f"{issue}" for issue in Issue} == {issue.value for issue in Issue}
    assert all(isinstance(mode, Issue) for mode in MODES.values() if mode)


def test_names_that_end_inside_the_folder_are_found_however_they_are_written(tmp_path):
    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    save(inside / "a.png")
    (tmp_path / "link").symlink_to(inside)
    for folder in (inside, tmp_path / "link"):
        finder = ImageFolder(folder)
        for name in (str(inside / "a.png"), str(tmp_path / "link" / "a.png"), "sub/../a.png", "../images/a.png"):
            assert Image.open(finder.find(name)).size == (30, 20)
        assert finder.relative(str(inside / "a.png")) == finder.relative(str(tmp_path / "link" / "a.png")) == "a.png"
        for name in ("..", "../..", "/", "sub/../../images/../x.png", f"{tmp_path}/images2/a.png"):
            with pytest.raises(DatasetError) as caught:
                finder.find(name)
            assert caught.value.kind == Issue.OUTSIDE
        for name in (".", "sub", "sub/", str(inside / "b.png"), "no/../such.png", "\0"):
            with pytest.raises(DatasetError) as caught:
                finder.find(name)
            assert caught.value.kind == Issue.MISSING


def test_back_slashes_are_named_with_the_way_out(tmp_path):
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "a.png")
    (tmp_path / "s.json").write_text(json.dumps(valid_coco(images=[{"id": 1, "file_name": "sub\\a.png"}])))
    with pytest.raises(DatasetError, match=naming("s.json", "sub\\a.png", "--fix")):
        load_coco_json(tmp_path / "s.json", tmp_path)
    save(tmp_path / "sub\\a.png")  # a name that a file may have
    assert ImageFolder(tmp_path).with_slashes("sub\\a.png") is None
    assert ImageFolder(tmp_path).find("sub\\a.png").endswith("sub\\a.png")


@pytest.mark.parametrize(
    ("change", "kind", "left"),
    [({"image_id": 99}, Issue.UNKNOWN_IMAGE, 2), ({"image_id": None}, Issue.UNKNOWN_IMAGE, 2), ({}, None, 3)],
)
def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(tmp_path, caplog, change, kind, left):
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    content = valid_coco()
    content["annotations"][0] |= change
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert sum(len(x["annotations"]) for x in load_coco_json(tmp_path / "s.json", tmp_path)) == left
    assert [kind in message for message in caplog.messages if "left out" in message or "not listed" in message] == [
        True for _ in range(kind is not None)
    ]
    assert checked(content).counts[Issue.UNKNOWN_IMAGE] == 3 - left


def test_of_two_categories_with_one_name_the_unused_one_is_left_out(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    content = valid_coco()
    content["categories"].insert(0, {"id": 0, "name": "dog"})
    (tmp_path / "s.json").write_text(json.dumps(content))
    first, _ = load_coco_json(tmp_path / "s.json", tmp_path)
    assert [x["category_id"] for x in first["annotations"]] == [0, 1]
    assert checked(content).counts[Issue.TWIN] == 1
    content["annotations"][0]["category_id"] = 0
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=naming("names", "dog")):
        load_coco_json(tmp_path / "s.json", tmp_path)
    assert checked(content).counts[Issue.SAME_NAME] == 1


def test_a_key_that_stands_twice_with_one_value_is_read(tmp_path):
    (tmp_path / "s.json").write_text('{"a": [1, NaN], "a": [1, NaN], "b": 0, "b": false}')
    assert list(read_content(tmp_path / "s.json")) == ["a", "b"]
    (tmp_path / "s.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(DatasetError, match=naming("'a'")):
        read_content(tmp_path / "s.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "s.json").write_text(json.dumps(valid_coco()), encoding=encoding)
    assert read_content(tmp_path / "s.json") == valid_coco()
