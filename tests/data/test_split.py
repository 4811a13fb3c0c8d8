"""A data set in two parts: nothing is lost, doubled or torn apart, and both parts have the classes."""

import itertools
import json

import numpy as np
import pytest
from conftest import valid_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import UserError
from dn_detr_d2.commands import check as tool
from dn_detr_d2.data.split import choose_images, split_content

CLASSES = 4


@st.composite
def contents(draw, most=12):
    """A COCO file: each image with the set of its classes, twice where it has an even id."""
    sets = draw(st.lists(st.sets(st.integers(0, CLASSES - 1)), min_size=2, max_size=most))
    annotations = [
        {"image_id": image, "category_id": c}
        for image, classes in enumerate(sets)
        for c in sorted(classes) * (1 + image % 2)
    ]
    return {
        "info": {"year": 2026},
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(sets))],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(CLASSES)],
        "annotations": [entry | {"id": i, "bbox": [0, 0, 1, 1]} for i, entry in enumerate(annotations)],
    }


def classes_of(content):
    """{class: its images}."""
    found = {}
    for entry in content["annotations"]:
        found.setdefault(entry["category_id"], set()).add(entry["image_id"])
    return found


FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 5)


@settings(max_examples=150, deadline=None)
@given(contents(), FRACTIONS, SEEDS)
def test_parts_are_a_partition_of_the_wanted_sizes_and_annotations_follow_their_images(content, fraction, seed):
    before = json.dumps(content)
    parts = split_content(content, fraction, seed)
    assert json.dumps(content) == before
    images = [[image["id"] for image in part["images"]] for part in parts]
    assert sorted(images[0] + images[1]) == [image["id"] for image in content["images"]]
    assert min(map(len, images)) >= 1
    assert abs(len(images[0]) - fraction * len(content["images"])) <= 1
    for part, chosen in zip(parts, images, strict=True):
        assert part["annotations"] == [x for x in content["annotations"] if x["image_id"] in chosen]
        assert chosen == sorted(chosen)  # the order of the file
        assert (part["info"], part["categories"]) == (content["info"], content["categories"])
    assert split_content(content, fraction, seed) == parts


def lacking(present, first):
    """Classes of two images or more that one side lacks."""
    totals, here = present.sum(0), present[list(first)].sum(0)
    return int(((totals > 1) & ((here == 0) | (here == totals))).sum())


@settings(max_examples=100, deadline=None)
@given(contents(most=8), FRACTIONS, SEEDS)
def test_no_two_images_could_change_sides_and_bring_a_class_to_both(content, fraction, seed):
    """Every exchange, tried one by one."""
    present = np.zeros((len(content["images"]), CLASSES), dtype=np.int64)
    for category, images in classes_of(content).items():
        present[list(images), category] = 1
    first = set(np.flatnonzero(choose_images(present, fraction, seed)).tolist())
    others = set(range(len(present))) - first
    exchanged = [lacking(present, first - {i} | {j}) for i, j in itertools.product(first, others)]
    assert min(exchanged) >= lacking(present, first)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, CLASSES), min_size=2, max_size=20), FRACTIONS, SEEDS)
def test_where_images_have_one_class_each_both_sides_have_every_class_that_fits(labels, fraction, seed):
    """The last label stands for no object."""
    present = np.eye(CLASSES + 1, CLASSES, dtype=np.int64)[labels]
    first = np.flatnonzero(choose_images(present, fraction, seed))
    repeated = int((present.sum(0) > 1).sum())
    if min(len(first), len(labels) - len(first)) >= repeated:
        assert lacking(present, first) == 0


def test_frequent_classes_are_divided_as_the_images_are():
    """100 images of a, 60 of b, 10 of c, each image with one of them."""
    present = np.repeat(np.eye(3, dtype=np.int64), [100, 60, 10], axis=0)
    assert present[choose_images(present, 0.8, 1)].sum(0).tolist() == [80, 48, 8]


def test_another_seed_is_another_split():
    present = np.ones((40, 1), dtype=np.int64)
    chosen = {tuple(np.flatnonzero(choose_images(present, 0.5, seed))) for seed in range(5)}
    assert len(chosen) == 5


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), (ord(name[0]), 0, 0)).save(tmp_path / name)
    (tmp_path / "all.json").write_text(json.dumps(valid_coco()))
    return tmp_path


def test_the_command_writes_two_files_that_pass_its_own_check(folder, capsys):
    line = [str(folder / "all.json"), str(folder)]
    assert tool.main([*line, "--split", "0.5", "--seed", "3"]) == 0
    parts = [folder / "all_train.json", folder / "all_val.json"]
    assert [len(json.loads(part.read_text())["images"]) for part in parts] == [1, 1]
    said = capsys.readouterr().out
    assert all(part.name in said for part in parts)
    for part in parts:
        assert tool.main([str(part), str(folder)]) == 0
    images = [json.loads(part.read_text())["images"][0]["file_name"] for part in parts]
    assert sorted(images) == ["a.png", "b.png"]


@pytest.mark.parametrize(("fraction", "named"), [("0", 0.0), ("1", 1.0), ("nan", "nan"), ("80", 80.0)])
def test_a_fraction_out_of_range_is_refused(folder, capsys, fraction, named):
    assert tool.main([str(folder / "all.json"), str(folder), "--split", fraction]) == 2
    assert naming("--split", fraction).search(capsys.readouterr().err)
    assert not list(folder.glob("all_*"))


def test_a_set_that_a_training_would_refuse_is_not_split(folder, capsys):
    content = valid_coco()
    content["annotations"][0]["category_id"] = 99
    (folder / "all.json").write_text(json.dumps(content))
    assert tool.main([str(folder / "all.json"), str(folder), "--split", "0.5"]) == 2
    assert naming("category_id", 99).search(capsys.readouterr().err)
    assert not list(folder.glob("all_*"))


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match=naming(1)):
        split_content({"images": [{"id": 1}], "annotations": [], "categories": []}, 0.5, 0)


def test_a_file_that_is_there_is_not_overwritten(folder, capsys):
    """The parts get their names from the set, so an input or somebody's own file may have one of them."""
    line, other = [str(folder / "all.json"), str(folder)], folder / "all_val.json"
    other.write_bytes((folder / "all.json").read_bytes())
    for options in ([], ["--val", str(other), str(folder)]):
        assert tool.main([*line, *options, "--split", "0.5"]) == 2
        assert naming("all_val.json").search(capsys.readouterr().err)
    assert other.read_bytes() == (folder / "all.json").read_bytes()
    assert not (folder / "all_train.json").exists()
    assert tool.main([*line, "--split", "0.5", "--fix", str(folder / "fixed.json")]) == 0  # the way out that is named
    assert {"fixed_train.json", "fixed_val.json"} < {path.name for path in folder.iterdir()}
