"""YOLO and VOC sets, made by hand, against boxes computed by hand."""

import json
import os

import convert_dataset as tool
import pytest
from PIL import Image

from dn_detr_d2.data import load_coco_json

VOC = """<annotation><filename>a.png</filename><object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"""


@pytest.fixture
def folders(tmp_path):
    """labels/ and images/ with a.png and sub/b.png of 30 x 20 pixels."""
    (tmp_path / "labels" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / name)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


def convert(folders, kind, *options):
    """(exit code, content or None)."""
    out = folders / "out.json"
    code = tool.run([kind, str(folders / "labels"), str(folders / "images"), str(out), *options])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_yolo_boxes_are_in_pixels_and_an_image_without_labels_stays(folders):
    (folders / "labels" / "a.txt").write_text("1 0.5 0.5 1.0 1.0\n\n0 0.25 0.25 0.1 0.2\n")
    code, content = convert(folders, "yolo", "--names", str(folders / "classes.txt"))
    assert code == 0
    assert content["annotations"][0]["bbox"] == [0, 0, 30, 20]
    assert content["annotations"][1]["bbox"] == pytest.approx([6, 3, 3, 4])
    records = load_coco_json(folders / "out.json", folders / "images")
    assert [[x["category_id"] for x in record["annotations"]] for record in records] == [[1, 0], []]


@pytest.mark.parametrize("text", ["names: [cat, dog]", "names: {0: cat, 1: dog}"])
def test_class_names_come_from_data_yaml(folders, text):
    (folders / "data.yaml").write_text(text)
    assert tool.read_names(folders / "data.yaml") == ["cat", "dog"]


@pytest.mark.parametrize("text", ["names: 3", "[]", "x: [", "names: [a, a]", "names: {1: a}", "nc: 2", ""])
def test_a_file_without_class_names_is_named(folders, text, capsys):
    (folders / "data.yaml").write_text(text)
    assert convert(folders, "yolo", "--names", str(folders / "data.yaml")) == (1, None)
    assert "data.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["0 1 2 3", "x 0.5 0.5 1 1", "2 0.5 0.5 1 1", "0 0.5 0.5 0 1", "0 nan 0.5 1 1", "0 15 9 30 20"]
)
def test_each_bad_label_file_is_named_and_nothing_is_written(folders, capsys, line):
    for name in ("a.txt", "sub/b.txt"):
        (folders / "labels" / name).write_text(line)
    assert convert(folders, "yolo", "--names", str(folders / "classes.txt")) == (1, None)
    errors = capsys.readouterr().err.splitlines()
    assert [any(name in error for name in ("a.txt", "b.txt")) for error in errors] == [True, True]


@pytest.mark.parametrize(("options", "box"), [((), [0, 1, 30, 19]), (("--zero-based",), [1, 2, 29, 18])])
def test_voc_corners_are_one_based_and_inclusive_unless_told(folders, options, box):
    (folders / "labels" / "a.xml").write_text(VOC)
    code, content = convert(folders, "voc", *options)
    assert (code, content["annotations"][0]["bbox"], content["categories"]) == (0, box, [{"id": 1, "name": "cat"}])
    assert content["images"] == [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}]


@pytest.mark.parametrize("text", [
    "<annotation>", VOC.replace("<xmin>1</xmin>", ""), VOC.replace("xmin>1<", "xmin>one<"), VOC.replace("cat", ""),
    VOC.replace("a.png", "gone.png"), VOC.replace("a.png", "../classes.txt"), VOC.replace("xmax>30", "xmax>0"),
    '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>' + VOC.replace("cat", "&e;"),
    '<!DOCTYPE x [<!ENTITY e "ha"><!ENTITY f "&e;&e;">]>' + VOC.replace("cat", "&f;"), "", "\0",
])  # fmt: skip
def test_a_bad_voc_file_is_named(folders, capsys, text):
    (folders / "labels" / "a.xml").write_text(text)
    assert convert(folders, "voc") == (1, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert "a.xml" in sentence


def test_a_voc_file_that_is_a_pipe_is_named(folders, capsys):
    os.mkfifo(folders / "labels" / "a.xml")  # opening it would wait for ever
    assert convert(folders, "voc") == (1, None)
    assert "a.xml: it is no regular file" in capsys.readouterr().err


def test_a_class_that_is_not_listed_is_refused(folders, capsys):
    (folders / "labels" / "a.xml").write_text(VOC.replace("cat", "bird"))
    assert convert(folders, "voc", "--names", str(folders / "classes.txt")) == (1, None)
    assert "['bird']" in capsys.readouterr().err


def test_what_is_missing_is_refused(folders):
    assert convert(folders, "yolo") == (1, None)
    assert convert(folders, "voc") == (1, None)
    assert tool.run(["voc", "/nowhere", "/nowhere", "x.json"]) == 1
