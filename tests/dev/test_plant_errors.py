"""dev/plant_errors.py: what it plants, and what it makes of a ranking; numbers worked by hand."""

import csv
import json
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from torchvision.ops import box_iou

from dev import plant_errors
from dev.plant_errors import PLANTED, cleanlab_rankings, corners, hits_of, measures, plant
from dn_detr_d2 import DatasetError
from dn_detr_d2.diagnostics.annotation_errors import KINDS

CATEGORIES = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 9, "name": "c"}]


def content_of(images=5, objects=8):
    """COCO-format dict: images of 200 x 100 with a row of boxes of 10 x 20."""
    annotations = [
        {"id": 10 * i + j, "image_id": i, "category_id": 3, "bbox": [24.0 * j, 40.0, 10.0, 20.0], "iscrowd": 0}
        for i in range(images)
        for j in range(objects)
    ]
    sizes = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in range(images)]
    return {"images": sizes, "annotations": annotations, "categories": CATEGORIES}


def iou(a, b):
    return box_iou(*(torch.tensor([corners(x)], dtype=torch.float64) for x in (a, b))).item()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.sampled_from([0.05, 0.1, 0.25]))
def test_each_kind_of_error_is_what_it_is_called(seed, rate):
    original = content_of()
    before = json.dumps(original)
    result = plant(original, rate, seed)
    assert json.dumps(original) == before
    was = {x["id"]: x for x in original["annotations"]}
    now = {x["id"]: x for x in result["annotations"]}
    errors = {kind: [x for x in result[PLANTED] if x["kind"] == kind] for kind in KINDS}
    assert {kind: len(found) for kind, found in errors.items()} == dict.fromkeys(KINDS, int(rate * len(was)))
    for error in errors["class"]:
        assert now[error["id"]]["category_id"] in (7, 9)
        assert now[error["id"]]["bbox"] == was[error["id"]]["bbox"]
    for error in errors["box"]:
        x, y, w, h = now[error["id"]]["bbox"]
        u, v, *size = was[error["id"]]["bbox"]
        assert [w, h] == size
        assert 0.3 * w - 1e-9 <= abs(x - u) <= 0.5 * w + 1e-9
        assert 0.3 * h - 1e-9 <= abs(y - v) <= 0.5 * h + 1e-9
        assert min(x, y, 200 - x - w, 100 - y - h) >= 0
    for error in errors["missing"]:
        assert error["id"] not in now
        assert error["bbox"] == was[error["id"]]["bbox"]
    for error in errors["spurious"]:
        assert error["id"] not in was
        box = now[error["id"]]["bbox"]
        others = [x["bbox"] for x in original["annotations"] if x["image_id"] == error["image_id"]]
        assert all(iou(box, other) <= 0.1 for other in others)
    touched = [x["id"] for x in result[PLANTED]]
    assert len(touched) == len(set(touched))
    assert all(now[i] == was[i] for i in was if i not in touched)


def test_crowds_stay():
    original = content_of()
    for annotation in original["annotations"][::2]:
        annotation["iscrowd"] = 1
    result = plant(original, 0.25, 0)
    kept = [x for x in result["annotations"] if x["iscrowd"]]
    assert kept == original["annotations"][::2]


def test_a_ranking_is_measured_without_rows_of_other_errors():
    planted = [{"kind": "class", "id": 1, "image_id": 0}, {"kind": "class", "id": 2, "image_id": 0}]
    planted.append({"kind": "box", "id": 3, "image_id": 0})
    ranking = [{"annotation": str(i)} for i in (1, 3, 4, 2, 5)]
    hits = hits_of("class", ranking, planted)
    assert hits == [True, False, True, False]
    # Of the 4 pairs of an error and a right annotation 3 are in order.
    assert measures(hits, 2) == ["0.750", "1.000", "1.000", "0.500", "0.500"]


@settings(max_examples=50, deadline=None)
@given(hits=st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda x: 0 < sum(x) < len(x)))
def test_auc_is_the_share_of_ordered_pairs(hits):
    pairs = [(a, b) for a, b in combinations(hits, 2) if a != b]
    assert float(measures(hits, sum(hits))[0]) == pytest.approx(sum(a for a, _ in pairs) / len(pairs), abs=6e-4)


def row(image_id, x, y, w, h):
    box = zip(("x0", "y0", "x1", "y1"), corners([x, y, w, h]), strict=True)
    return {"image_id": str(image_id), "annotation": "", **{f"suggested_{key}": str(value) for key, value in box}}


def test_a_missing_box_is_found_once_and_by_overlap():
    planted = [{"kind": "missing", "id": 1, "image_id": 0, "bbox": [0, 0, 10, 10]}]
    planted.append({"kind": "box", "id": 2, "image_id": 0, "bbox": [50, 0, 10, 10]})
    rows = [row(0, 0, 0, 10, 6), row(0, 0, 0, 10, 10), row(0, 0, 0, 10, 4), row(1, 0, 0, 10, 10), row(0, 50, 0, 10, 10)]
    # The second repeats the first; the last is where a box was moved from.
    assert hits_of("missing", rows, planted) == [True, False, False]


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_from_the_command_line(tmp_path, capsys):
    original, target = write(tmp_path / "a.json", content_of()), tmp_path / "b.json"
    assert plant_errors.main([original, "--output", str(target), "--rate", "0.1", "--seed", "3"]) == 0
    content = json.loads(target.read_text())
    assert content == plant(content_of(), 0.1, 3)
    # A perfect ranking of all kinds.
    bad = {x["id"]: x["kind"] for x in content[PLANTED]}
    with (tmp_path / "found.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file,
            ["kind", "image_id", "annotation", *row(0, 0, 0, 1, 1)][:3]
            + [f"suggested_{x}" for x in ("x0", "y0", "x1", "y1")],
        )
        writer.writeheader()
        for kind in ("class", "box", "spurious"):
            for annotation in sorted(content["annotations"], key=lambda x: bad.get(x["id"]) != kind):
                writer.writerow({"kind": kind, "image_id": annotation["image_id"], "annotation": annotation["id"]})
        for error in content[PLANTED]:
            if error["kind"] == "missing":
                writer.writerow({"kind": "missing", **row(error["image_id"], *error["bbox"])})
        writer.writerow({"kind": "missing", **row(0, 150, 80, 5, 5)})
    assert plant_errors.main([str(target), "--found", str(tmp_path / "found.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == list(KINDS)
    assert all([x.strip() for x in line.split("|")[4:9]] == ["1.000"] * 5 for line in lines)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--output", "out.json", "--rate", "0.3"], ["--rate", 0.3, 0.25]),
        (["--found", "nowhere.csv"], [PLANTED]),
        ([], ["--output", "--found", "--predictions"]),
        (["--output", "out.json", "--found", "nowhere.csv"], ["--output", "--found"]),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, given, named):
    assert plant_errors.main([write(tmp_path / "a.json", content_of()), *given]) == 2
    assert naming(*named).search(capsys.readouterr().err)


@pytest.mark.parametrize("content", [[], {"annotations": 3}, {"annotations": [], "images": []}])
def test_what_is_no_annotation_file_is_named(tmp_path, capsys, content):
    assert plant_errors.main([write(tmp_path / "a.json", content), "--output", str(tmp_path / "b.json")]) == 2
    assert naming("a.json", "COCO").search(capsys.readouterr().err)


def test_the_annotations_are_not_overwritten(tmp_path, capsys):
    original = write(tmp_path / "a.json", content_of())
    before = (tmp_path / "a.json").read_bytes()
    assert plant_errors.main([original, "--output", original]) == 2
    assert naming("--output", original).search(capsys.readouterr().err)
    assert (tmp_path / "a.json").read_bytes() == before


def test_one_category_has_no_wrong_class(tmp_path, capsys):
    content = content_of() | {"categories": CATEGORIES[:1]}
    target = str(tmp_path / "b.json")
    assert plant_errors.main([write(tmp_path / "a.json", content), "--output", target]) == 2
    assert naming(1, 2).search(capsys.readouterr().err)
    assert (
        plant_errors.main([write(tmp_path / "a.json", content), "--output", target, "--kinds", "box", "missing"]) == 0
    )


@pytest.mark.parametrize(("score", "thresholds", "found"), [
    (0.99, [], True),
    (0.6, [], False),
    (0.6, [0.4, 0.5], True),
])  # fmt: skip
def test_cleanlab_ranks_what_a_perfect_detector_contradicts(score, thresholds, found):
    """A detector whose scores are low is not listened to, unless the thresholds are its own."""
    pytest.importorskip("cleanlab")
    original = content_of()
    for i, annotation in enumerate(original["annotations"]):
        annotation["category_id"] = (3, 7, 9)[i % 3]
    content = plant(original, 0.1, 1, ["class", "box", "missing"])
    keys = ("image_id", "category_id", "bbox")
    detections = [{key: x[key] for key in keys} | {"score": score} for x in original["annotations"]]
    rankings = cleanlab_rankings(content, detections, *thresholds)
    for kind in ("class", "missing") if not found else ("class", "box", "missing"):
        hits = hits_of(kind, rankings[kind], content[PLANTED])
        assert (sum(hits[:4]) == 4) == found, kind


def test_missing_boxes_that_overlap_each_other_are_all_found():
    planted = [{"kind": "missing", "id": i, "image_id": 0, "bbox": [20 * i, 0, 100, 100]} for i in (0, 1)]
    rows = [row(0, 20, 0, 100, 100), row(0, 0, 0, 100, 100), row(0, 10, 0, 100, 100)]
    assert hits_of("missing", rows, planted) == [True, True]  # the last repeats them


def test_a_box_without_room_is_not_moved():
    """Or what is no error would be counted as one that was not found."""
    content = content_of()
    for annotation in content["annotations"][1:]:
        size = next(x for x in content["images"] if x["id"] == annotation["image_id"])
        annotation["bbox"] = [0, 0, size["width"], size["height"]]
    with pytest.raises(DatasetError, match=naming("--rate", "--kinds")):
        plant(content, 0.25, 0, ["box"])
    for annotation in content["annotations"][2:]:
        size = next(x for x in content["images"] if x["id"] == annotation["image_id"])
        annotation["bbox"] = [0, 0, 0.75 * size["width"], 0.75 * size["height"]]
    result = plant(content, 0.25, 0, ["box"])
    now = {x["id"]: x["bbox"] for x in result["annotations"]}
    for error in result[PLANTED]:
        moved, (x, y, w, h) = now[error["id"]], error["bbox"]
        assert abs(moved[0] - x) >= 0.3 * w or abs(moved[1] - y) >= 0.3 * h
