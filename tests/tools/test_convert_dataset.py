"""YOLO and VOC sets, made by hand, against boxes computed by hand."""

import codecs
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError
from dn_detr_d2.commands import convert_dataset as tool
from dn_detr_d2.data import convert, convert_voc, convert_yolo, label_files, load_coco_json
from dn_detr_d2.data.check_set import write_json

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


def run(folders, kind, *options):
    """(exit code, content or None)."""
    out = folders / "out.json"
    code = tool.main([kind, str(folders / "labels"), str(folders / "images"), str(out), *options])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_yolo_boxes_are_in_pixels_and_an_image_without_labels_stays(folders):
    (folders / "labels" / "a.txt").write_text("1 0.5 0.5 1.0 1.0\n\n0 0.25 0.25 0.1 0.2\n")
    code, content = run(folders, "yolo", "--names", str(folders / "classes.txt"))
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
    assert run(folders, "yolo", "--names", str(folders / "data.yaml")) == (2, None)
    assert "data.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "0 1 2 3",
        "x 0.5 0.5 1 1",
        "2 0.5 0.5 1 1",
        "0 nan 0.5 1 1",
        "0 15 9 30 20",
        "-1 0.5 0.5 1 1",
        "0.5 0.5 0.5 1 1",
        "0 inf 0.5 1 1",
        "0 0.5 0.5 1e999 1",
        "0 0.5 0.5 1_0 1",
        "0,0.5,0.5,1,1",
        "0 0,5 0,5 1 1",
        "# class",
        "0",
        "0 .1 .1 .4 .1 .4 .4 .3",
        "0 .1 .1 .4 .1 .4 9",
        "0 0.5 0.5 1 1 0.9",
        "1e300 0.5 0.5 1 1",
        "0 -3 0.5 1 1",
    ],
)
def test_each_bad_label_file_is_named_and_nothing_is_written(folders, capsys, line):
    for name in ("a.txt", "sub/b.txt"):
        (folders / "labels" / name).write_text("0 0.5 0.5 1 1\n\n" + line)
    assert run(folders, "yolo", "--names", str(folders / "classes.txt")) == (2, None)
    errors = capsys.readouterr().err.splitlines()
    assert [any(name in error for name in ("a.txt", "b.txt")) for error in errors] == [True, True]
    assert all("line 3 " in error for error in errors)


@pytest.mark.parametrize(("options", "box"), [((), [0, 1, 30, 19]), (("--zero-based",), [1, 2, 29, 18])])
def test_voc_corners_are_one_based_and_inclusive_unless_told(folders, options, box):
    (folders / "labels" / "a.xml").write_text(VOC)
    code, content = run(folders, "voc", *options)
    assert (code, content["annotations"][0]["bbox"], content["categories"]) == (0, box, [{"id": 1, "name": "cat"}])
    assert content["images"] == [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}]


@pytest.mark.parametrize(
    "text",
    [
        "<annotation>",
        VOC.replace("<xmin>1</xmin>", ""),
        VOC.replace("xmin>1<", "xmin>one<"),
        VOC.replace("cat", ""),
        VOC.replace("xmax>30", "xmax>0"),
        VOC.replace("xmax>30", "xmax>nan"),
        VOC.replace("<ymax>20</ymax>", "<ymax/>"),
        VOC.replace("bndbox", "box"),
        "<html/>",
        '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>' + VOC.replace("cat", "&e;"),
        '<!DOCTYPE x [<!ENTITY e "ha"><!ENTITY f "&e;&e;">]>' + VOC.replace("cat", "&f;"),
        "",
        "\0",
    ],
)
def test_a_bad_voc_file_is_named(folders, capsys, text):
    (folders / "labels" / "a.xml").write_text(text)
    assert run(folders, "voc") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert "a.xml" in sentence


def test_a_voc_file_that_is_a_pipe_is_named(folders, capsys):
    os.mkfifo(folders / "labels" / "a.xml")  # opening it would wait for ever
    assert run(folders, "voc") == (2, None)
    assert "a.xml" in capsys.readouterr().err


def test_a_class_that_is_not_listed_is_refused(folders, capsys):
    (folders / "labels" / "a.xml").write_text(VOC.replace("cat", "bird"))
    assert run(folders, "voc", "--names", str(folders / "classes.txt")) == (2, None)
    assert "['bird']" in capsys.readouterr().err


def test_what_is_missing_is_refused(folders):
    assert run(folders, "yolo") == (2, None)
    assert run(folders, "voc") == (2, None)
    assert tool.main(["voc", "/nowhere", "/nowhere", "x.json"]) == 2


def noted(text):
    """{kind: count} of the notes in what a command printed."""
    return {kind: int(n) for kind, n in re.findall(r"^note: (.*): (\d+) \(.*\)$", text, re.MULTILINE)}


def yolo(folders, *lines, options=(), name="a"):
    """(exit code, content) of a set whose label file ``name`` has these lines."""
    (folders / "labels" / f"{name}.txt").write_text("\n".join(lines))
    return run(folders, "yolo", "--names", str(folders / "classes.txt"), *options)


def voc(folders, **files):
    """Writes one .xml a keyword: (<filename>, further elements before the object, the object or None for one of 9 x 8)."""
    for stem, (filename, more, thing) in files.items():
        thing = box(5, 6, 13, 13) if thing is None else thing
        said = f"<filename>{filename}</filename>" if filename else ""
        (folders / "labels" / f"{stem}.xml").write_text(f"<annotation>{said}{more}{thing}</annotation>")


def box(*corners, name="cat"):
    """An <object>."""
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in zip(convert_voc.CORNERS, corners, strict=True))
    return f"<object><name>{name}</name><bndbox>{inner}</bndbox></object>"


def pictures(folders, *names, size=(30, 20)):
    """Draws pictures of ``size`` (width, height)."""
    for name in names:
        (folders / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folders / "images" / name)


def by_picture(content):
    """{file name: [(class, box)]}."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    classes = {category["id"]: category["name"] for category in content["categories"]}
    found = {name: [] for name in names.values()}
    for x in content["annotations"]:
        found[names[x["image_id"]]].append((classes[x["category_id"]], x["bbox"]))
    return found


# YOLO: lines


@pytest.mark.parametrize("label", ["1", "1.0", "+1", "1e0", "1.000000000000000000e+00", "10e-1", "01"])
@pytest.mark.parametrize("coordinates", ["0.5 0.5 1 1", "5e-1\t+.5  1. 1.0e0 ", "0.50 0.5 1E0 1"])
def test_numbers_may_have_any_notation(folders, label, coordinates):
    code, content = yolo(folders, f"{label} {coordinates}")
    assert (code, by_picture(content)["a.png"]) == (0, [("dog", [0, 0, 30, 20])])


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\n\n\t\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_line_ends_and_a_byte_order_mark_do_not_matter(folders, end, mark):
    (folders / "labels" / "a.txt").write_bytes(mark + end.join(["0 0.5 0.5 1 1", "1 0.5 0.5 1 1", ""]).encode())
    (folders / "classes.txt").write_bytes(mark + end.replace("\n\n\t\n", "\n").join(["cat", "dog", ""]).encode())
    code, content = run(folders, "yolo", "--names", str(folders / "classes.txt"))
    assert (code, [name for name, _ in by_picture(content)["a.png"]]) == (0, ["cat", "dog"])
    assert [category["name"] for category in content["categories"]] == ["cat", "dog"]


def test_label_and_class_files_may_be_utf_16(folders):
    (folders / "labels" / "a.txt").write_text("1 0.5 0.5 1 1\r\n", "utf-16")
    (folders / "classes.txt").write_text("cat\r\ncafé\r\n", "utf-16")
    code, content = run(folders, "yolo", "--names", str(folders / "classes.txt"))
    assert (code, by_picture(content)["a.png"]) == (0, [("café", [0, 0, 30, 20])])


def test_bytes_that_are_no_text_are_named_with_their_line(folders, capsys):
    (folders / "labels" / "a.txt").write_bytes(b"0 0.5 0.5 1 1\n0 0.5\xff 0.5 1 1\n")
    assert run(folders, "yolo", "--names", str(folders / "classes.txt")) == (2, None)
    assert "a.txt: line 2 " in capsys.readouterr().err


def test_a_polygon_is_its_bounding_box_and_stays_as_segmentation(folders, capsys):
    code, content = yolo(folders, "0 0.1 0.1 0.4 0.1 0.4 0.4", "1 0.5 0.5 0.1 0.2", "1 0 0 1 0 1 1 0 1")
    triangle, plain, rectangle = content["annotations"]
    assert code == 0
    assert triangle["bbox"] == pytest.approx([3, 2, 9, 6])
    assert triangle["segmentation"] == [pytest.approx([3, 2, 12, 2, 12, 8])]
    assert (triangle["area"], rectangle["area"]) == (pytest.approx(9 * 6 / 2), 600)
    assert plain["bbox"] == pytest.approx([13.5, 8, 3, 4])
    assert "segmentation" not in plain
    assert noted(capsys.readouterr().out)[convert_yolo.POLYGONS] == 2


def test_boxes_without_a_size_are_dropped_and_counted(folders, capsys):
    code, content = yolo(
        folders, "0 0.5 0.5 0 0.25", "0 0.5 0.5 -0.1 0.2", "1 0.5 0.5 1 1", "0 0.5 0.5 1e-12 1", "0 .1 .1 .2 .1 .3 .1"
    )
    assert (code, by_picture(content)["a.png"]) == (0, [("dog", [0, 0, 30, 20])])
    assert noted(capsys.readouterr().out)[convert.EMPTY_BOX] == 4


def test_boxes_that_stick_out_are_clipped_and_boxes_outside_are_dropped(folders, capsys):
    lines = (
        "0 0.0 0.5 0.4 0.5",
        "0 1.3 0.5 0.2 0.2",
        "0 -0.3 0.5 0.2 0.2",
        "0 0.95 0.5 0.1000001 0.5",
        "0 .5 .5 1.1 .1 1 .5",
    )
    code, content = yolo(folders, *lines)
    found = [found for _, found in by_picture(content)["a.png"]]
    assert code == 0
    assert found == [pytest.approx(x) for x in ([0, 5, 6, 10], [27, 5, 3, 10], [15, 2, 15, 8])]
    assert content["annotations"][-1]["segmentation"] == [pytest.approx([15, 10, 30, 2, 30, 10])]
    counts = noted(capsys.readouterr().out)
    assert (counts[convert.CLIPPED_BOX], counts[convert.OUTSIDE_BOX]) == (2, 2)


def test_lines_that_stand_twice_are_dropped_and_counted(folders, capsys):
    code, content = yolo(folders, "0 0.5 0.5 1 1", "0 0.50 5e-1 1.0 1", "1 0.5 0.5 1 1", "0 0.5 0.5 1 1")
    assert (code, [name for name, _ in by_picture(content)["a.png"]]) == (0, ["cat", "dog"])
    assert noted(capsys.readouterr().out)[convert_yolo.REPEATED] == 2


def test_a_bad_file_is_one_sentence_with_its_first_line_and_a_count(folders, capsys):
    assert yolo(folders, "0 0.5 0.5 1 1", "x 0 0 1 1", "0 0.5", "7 0.5 0.5 1 1") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert "a.txt: line 2 " in sentence
    assert "2 more lines" in sentence


def test_a_confidence_is_refused_or_left_out(folders, capsys):
    lines = "0 0.5 0.5 1 1 0.93", "1 0.1 0.1 0.4 0.1 0.4 0.4 0.5", "1 0.5 0.5 0.1 0.2"
    assert yolo(folders, *lines) == (2, None)
    assert "--ignore-confidence" in capsys.readouterr().err
    code, content = yolo(folders, *lines, options=["--ignore-confidence"])
    assert code == 0
    assert [x["bbox"] for x in content["annotations"]] == [
        pytest.approx(x) for x in ([0, 0, 30, 20], [3, 2, 9, 6], [13.5, 8, 3, 4])
    ]
    assert noted(capsys.readouterr().out)[convert_yolo.CONFIDENCES] == 2


def test_boxes_in_pixels_are_named_and_read_if_told(folders, capsys):
    lines = "0 15 9 20 10", "1 3 2 12 2 12 8"
    assert yolo(folders, *lines) == (2, None)
    assert "--pixels" in capsys.readouterr().err
    code, content = yolo(folders, *lines, options=["--pixels"])
    assert (code, [x["bbox"] for x in content["annotations"]]) == (0, [[5, 4, 20, 10], [3, 2, 9, 6]])


def test_pixels_beyond_the_picture_are_named(folders, capsys):
    assert yolo(folders, "0 15 9 200 10", options=["--pixels"]) == (2, None)
    assert "30x20" in capsys.readouterr().err
    assert yolo(folders, "0 0.5 0.5 1 1", options=[])[0] == 0  # the way out: without --pixels


@pytest.mark.parametrize(("boxes", "row"), [("xyxy", "{x0} {y0} {x1} {y1}"), ("xywh", "{x0} {y0} {w} {h}")])
def test_boxes_of_another_convention_are_noticed_and_read_if_told(folders, capsys, boxes, row):
    rows = [
        {
            "x0": 0.05 * i,
            "y0": 0.04 * i,
            "x1": 0.5 + 0.04 * i,
            "y1": 0.6 + 0.03 * i,
            "w": 0.5 - 0.01 * i,
            "h": 0.6 - 0.01 * i,
        }
        for i in range(12)
    ]
    lines = ["0 " + row.format(**values) for values in rows]
    assert yolo(folders, *lines) == (2, None)
    assert f"--boxes {boxes}" in capsys.readouterr().err
    code, content = yolo(folders, *lines, options=["--boxes", boxes])
    expected = [[30 * v["x0"], 20 * v["y0"], 30 * v["w"], 20 * v["h"]] for v in rows]
    assert (code, [x["bbox"] for x in content["annotations"]]) == (0, [pytest.approx(x) for x in expected])
    assert yolo(folders, *lines, options=["--boxes", "cxcywh"])[0] == 0  # the other way out: as they are


@pytest.mark.parametrize("bad", ["0 -0.03 0.2 0.4 0.5", "0 0.2 0.2 0.2 0.5", "0 0.9 0.9 0.2 0.1"])
@pytest.mark.parametrize("count", [8, 20])
def test_one_bad_line_does_not_hide_the_convention_of_the_others(folders, capsys, bad, count):
    lines = [f"0 {0.3 + 0.01 * i:.2f} 0.4 {0.8 + 0.01 * i:.2f} 0.95" for i in range(count)]
    lines += [bad] if count > 8 else []
    assert yolo(folders, *lines) == (2, None)
    assert "--boxes xyxy" in capsys.readouterr().err
    code, content = yolo(folders, *lines, options=["--boxes", "xyxy"])
    assert (code, content["annotations"][0]["bbox"]) == (0, pytest.approx([9, 8, 15, 11]))


@pytest.mark.parametrize(
    "line", ["0 .5 .5 .2 .2 .5 .5 2 .4 .4 1", "0 .5 .5 .2 .2 .9 7", "0 .5 .5 .2 .2 .5 .5 2 .4 .4 0"]
)
def test_boxes_with_more_numbers_are_not_called_pixels(folders, capsys, line):
    assert yolo(folders, line, "1 0.3 0.3 0.1 0.1") == (2, None)
    err = capsys.readouterr().err
    assert "--pixels" not in err
    assert "kpt_shape" in err
    assert "--ignore-confidence" in err


def test_a_confidence_and_the_number_of_a_track_are_left_out(folders, capsys):
    code, content = yolo(folders, "0 .5 .5 1 1 .9 7", "0 .5 .5 .1 .2 .9 1", options=["--ignore-confidence"])
    boxes = [pytest.approx(x) for x in ([0, 0, 30, 20], [13.5, 8, 3, 4])]
    assert (code, [x["bbox"] for x in content["annotations"]]) == (0, boxes)
    assert noted(capsys.readouterr().out)[convert_yolo.CONFIDENCES] == 2


def test_key_points_are_left_out_where_data_yaml_tells_of_them(folders, capsys):
    (folders / "data.yaml").write_text("names: [cat]\nkpt_shape: [2, 3]")
    (folders / "labels" / "a.txt").write_text("0 0.5 0.5 1 1 0.1 0.1 2 0.2 0.2 1\n0 0.5 0.5 0.1 0.2")
    code, content = run(folders, "yolo", "--names", str(folders / "data.yaml"))
    assert (code, len(content["annotations"]), content["annotations"][0]["bbox"]) == (0, 2, [0, 0, 30, 20])
    assert noted(capsys.readouterr().out)[convert_yolo.POSES] == 1


# YOLO: files


def test_pictures_and_label_files_without_partner_are_counted_and_named(folders, capsys):
    pictures(folders, "c.JPG", "d.png")
    (folders / "labels" / "c.TXT").write_text("0 0.5 0.5 1 1")
    for name in ("gone.txt", "sub/gone.txt", "classes.txt", "README.roboflow.txt"):
        (folders / "labels" / name).write_text("0 0.5 0.5 1 1")
    code, content = yolo(folders, "")
    out = capsys.readouterr().out
    assert (code, {name: len(found) for name, found in by_picture(content).items()}) == (
        0,
        {"a.png": 0, "c.JPG": 1, "d.png": 0, "sub/b.png": 0},
    )
    assert noted(out) == {convert_yolo.NO_PICTURE: 2, convert_yolo.NO_LABEL_FILE: 2}
    assert "(gone.txt, sub/gone.txt)" in out
    assert "(d.png, sub/b.png)" in out
    assert "4 images, 1 boxes, 2 classes; written" in out.splitlines()[-1]


@pytest.mark.parametrize("there", ["labels/train", "labels/sub", "other/labels", "images"])
def test_labels_in_another_folder_are_refused_and_found(folders, capsys, there):
    (folders / there).mkdir(parents=True, exist_ok=True)
    (folders / "images" / "sub" / "b.png").unlink()
    (folders / there / "a.txt").write_text("0 0.5 0.5 1 1")
    (folders / "other").mkdir(exist_ok=True)
    labels = "labels" if there != "other/labels" else "other"
    arguments = ["--names", str(folders / "classes.txt")]
    out = folders / "out.json"
    assert tool.main(["yolo", str(folders / labels), str(folders / "images"), str(out), *arguments]) == 2
    assert not out.exists()
    [command] = re.findall(r": (yolo .*) OUT.json --names FILE", capsys.readouterr().err)
    assert tool.main([*command.split(), str(out), *arguments]) == 0
    assert by_picture(json.loads(out.read_text()))["a.png"] == [("cat", [0, 0, 30, 20])]


def test_the_whole_data_set_as_both_folders_is_refused_and_the_folders_are_found(folders, capsys):
    (folders / "images" / "sub" / "b.png").unlink()
    (folders / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    out, arguments = folders / "out.json", ["--names", str(folders / "classes.txt")]
    assert tool.main(["yolo", str(folders), str(folders), str(out), *arguments]) == 2
    [command] = re.findall(r": (yolo .*) OUT.json --names FILE", capsys.readouterr().err)
    assert tool.main([*command.split(), str(out), *arguments]) == 0
    assert by_picture(json.loads(out.read_text())) == {"a.png": [("cat", [0, 0, 30, 20])]}


def test_a_set_without_boxes_is_refused_unless_told(folders, capsys):
    assert yolo(folders, "") == (2, None)
    assert "--allow-empty" in capsys.readouterr().err
    code, content = yolo(folders, "", options=["--allow-empty"])
    assert (code, len(content["images"]), content["annotations"]) == (0, 2, [])
    assert len(content["categories"]) == 2


def test_hidden_files_are_skipped_and_counted_once(folders, capsys):
    for name in ("images/._a.png", "images/.DS_Store", "labels/._a.txt", "labels/sub/.a.txt"):
        (folders / name).write_bytes(b"\0\5\x16\7")
    (folders / "images" / "__MACOSX").mkdir()
    (folders / "images" / "__MACOSX" / "a.png").write_bytes(b"\0")
    code, content = yolo(folders, "0 0.5 0.5 1 1")
    assert (code, sorted(by_picture(content))) == (0, ["a.png", "sub/b.png"])
    assert noted(capsys.readouterr().out)[label_files.HIDDEN] == 5
    (folders / "images" / "a.txt").write_text("0 0.5 0.5 1 1")
    one = [str(folders / "images")] * 2
    assert tool.main(["yolo", *one, str(folders / "o.json"), "--names", str(folders / "classes.txt")]) == 0
    assert noted(capsys.readouterr().out)[label_files.HIDDEN] == 3


def test_names_are_compared_whatever_the_normalisation_of_unicode(folders):
    pictures(folders, "\u00e9t\u00e9.png")
    (folders / "labels" / "e\u0301te\u0301.txt").write_text("0 0.5 0.5 1 1")
    code, content = yolo(folders, "")
    assert (code, by_picture(content)["\u00e9t\u00e9.png"]) == (0, [("cat", [0, 0, 30, 20])])


def test_bad_files_are_left_out_if_told(folders, capsys):
    (folders / "images" / "sub" / "b.png").write_bytes(b"no picture")
    assert yolo(folders, "0 0.5 0.5 1 1") == (2, None)
    assert "--drop-bad" in capsys.readouterr().out
    code, content = yolo(folders, "0 0.5 0.5 1 1", options=["--drop-bad"])
    printed = capsys.readouterr()
    assert (code, sorted(by_picture(content))) == (0, ["a.png"])
    assert naming("1 bad files").search(printed.out)
    assert "b.png" in printed.err


def test_label_files_behind_links_stay_in_their_folder(folders, capsys):
    (folders / "secret").write_text("root:x:0:0 secret")
    (folders / "labels" / "a.txt").symlink_to(folders / "secret")
    assert run(folders, "yolo", "--names", str(folders / "classes.txt")) == (2, None)
    assert "root:x" not in capsys.readouterr().err
    (folders / "labels" / "a.txt").unlink()
    (folders / "labels" / "real.txt").write_text("0 0.5 0.5 1 1")
    (folders / "labels" / "a.txt").symlink_to(folders / "labels" / "real.txt")
    assert run(folders, "yolo", "--names", str(folders / "classes.txt"))[0] == 0


def test_pictures_behind_links_stay_in_their_folder(folders, capsys):
    pictures(folders, "../outside.png", "../far/x.png")
    (folders / "images" / "c.png").symlink_to(folders / "outside.png")
    (folders / "images" / "far").symlink_to(folders / "far")
    assert yolo(folders, "0 0.5 0.5 1 1") == (2, None)
    assert "c.png" in capsys.readouterr().err
    (folders / "images" / "c.png").unlink()
    code, content = yolo(folders, "0 0.5 0.5 1 1")
    assert (code, sorted(by_picture(content))) == (0, ["a.png", "sub/b.png"])
    assert noted(capsys.readouterr().out)[label_files.LINKED] == 1


def test_names_that_are_not_utf_8_do_not_stop_the_command(folders):
    pictures(folders, "x.png")
    for file in (folders / "images" / "x.png", folders / "labels" / "y.txt"):
        file.touch()
        os.rename(os.fsencode(file), os.fsencode(file.parent / "b\udcff\udcfe") + os.fsencode(file.suffix))
    (folders / "labels" / "a.txt").write_text("0 0.5 0.5 1 1\n")
    program = [sys.executable, str(ROOT / "tools" / "convert_dataset.py"), "yolo", "labels", "images", "out\udcff.json"]
    done = subprocess.run(
        [*program, "--names", "classes.txt"], cwd=folders, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    [out] = folders.glob("out*.json")
    assert len(load_coco_json(out, folders / "images")) == 3


def test_options_and_paths_that_do_not_fit_are_refused(folders, capsys):
    labels, images, out, names = (str(folders / x) for x in ("labels", "images", "out.json", "classes.txt"))
    (folders / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    for arguments in (
        ["yolo", labels, images],
        ["yolo", labels, images, out, "--names", names, "--zero-based"],
        ["voc", labels, images, out, "--pixels"],
        ["yolo", labels, images, out, "--names", names, "--split", "train"],
        ["yolo", labels, images, names, "--names", names],
        ["voc", "data.yaml", out],
    ):
        assert tool.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert (folders / "classes.txt").read_text() == "cat\ndog\n"
    assert not (folders / "out.json").exists()
    assert tool.main(["yolo", labels, images, out]) == 2
    [found] = re.findall(r"--names (\S+) is there", capsys.readouterr().err)
    assert tool.main(["yolo", labels, images, out, "--names", found]) == 0


def test_a_folder_that_is_not_there_is_code_2(folders):
    (folders / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    folder = str(folders / "labels")
    out = folders / "nowhere" / "out.json"
    assert tool.main(["yolo", folder, str(folders / "images"), str(out), "--names", str(folders / "classes.txt")]) == 2
    assert not out.parent.exists()


def test_a_disk_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def _fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", _fail)
    with pytest.raises(DatasetError, match=naming("out.json")):
        write_json({"images": []}, str(path))
    assert path.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["out.json"]


def test_a_file_name_cannot_write_to_the_terminal(folders, capsys):
    (folders / "labels" / "x\nerror: \x1b[31m.txt").touch()
    assert yolo(folders, "0 0.5 0.5 1 1")[0] == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\nerror" not in out


def test_pictures_that_share_a_label_file_are_counted(folders, capsys):
    pictures(folders, "a.jpg")
    code, content = yolo(folders, "0 0.5 0.5 1 1")
    assert (code, [len(by_picture(content)[name]) for name in ("a.jpg", "a.png")]) == (0, [1, 1])
    assert noted(capsys.readouterr().out)[convert_yolo.SHARED] == 1


def test_long_nonsense_is_refused_soon(folders, capsys):
    start = time.monotonic()
    assert yolo(folders, "0 0.5 0.5 1 " + "9" * 1_000_000 + "x") == (2, None)
    (folders / "labels" / "a.xml").write_text("<annotation>" * 200_000)
    assert run(folders, "voc") == (2, None)
    (folders / "labels" / "a.xml").write_text("<annotation>" * 200_000 + "</annotation>" * 200_000)
    assert run(folders, "voc") == (2, None)
    assert time.monotonic() - start < 20
    assert len(capsys.readouterr().err) < 5000


# YOLO: data.yaml


def data_yaml(folders, text, split="train", *options):
    """(exit code, content) of a split of a data.yaml with this text."""
    (folders / "data.yaml").write_text(text)
    out = folders / "out.json"
    out.unlink(missing_ok=True)
    code = tool.main(["yolo", str(folders / "data.yaml"), "--split", split, str(out), *options])
    return code, json.loads(out.read_text()) if out.exists() else None


@pytest.fixture
def splits(tmp_path):
    """images/{train,val} and labels/{train,val}: t1.png (cat), t2.png (dog) and v1.png (cat) of 30 x 20 pixels."""
    (tmp_path / "images").mkdir()
    pictures(tmp_path, "train/t1.png", "train/t2.png", "val/v1.png")
    for name, label in (("train/t1", 0), ("train/t2", 1), ("val/v1", 0)):
        file = tmp_path / "labels" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{label} 0.5 0.5 1 1")
    (tmp_path / "train.txt").write_text("./images/train/t1.png\nimages/train/t2.png\n\n")
    (tmp_path / "cvat.txt").write_text("data/images/train/t1.png\ndata/images/train/t2.png\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text("images/val/v1.png\r\n")
    return tmp_path


NAMES = "names: [cat, dog]\n"
BOX = [0, 0, 30, 20]


@pytest.mark.parametrize(
    "path", ["", "path: .\n", "path: {here}\n", "path: /content/gone\n", "path: null\n", "path: ''\n"]
)
@pytest.mark.parametrize("train", ["images/train", "./images/train/", "{here}/images/train", "../images/train"])
def test_a_split_is_a_folder(splits, path, train):
    code, content = data_yaml(splits, (NAMES + path + f"train: {train}\n").replace("{here}", str(splits)))
    assert (code, by_picture(content)) == (0, {"t1.png": [("cat", BOX)], "t2.png": [("dog", BOX)]})
    assert len(load_coco_json(splits / "out.json", splits / "images" / "train")) == 2


@pytest.mark.parametrize(
    "train", ["train.txt", "[images/train]", "[train.txt]", "[images/train, train.txt]", "cvat.txt"]
)
def test_a_split_is_a_list_of_files_or_of_folders(splits, capsys, train):
    code, content = data_yaml(splits, NAMES + f"train: {train}\n")
    assert (code, by_picture(content)) == (0, {"t1.png": [("cat", BOX)], "t2.png": [("dog", BOX)]})
    assert noted(capsys.readouterr().out) == ({convert_yolo.TWICE: 2} if ", train.txt" in train else {})


def test_several_folders_are_written_relative_to_the_one_they_share(splits, capsys):
    code, content = data_yaml(splits, NAMES + "val: [images/train, lists/val.txt]\n", "val")
    assert (code, sorted(by_picture(content))) == (0, ["train/t1.png", "train/t2.png", "val/v1.png"])
    [folder] = re.findall(r"image folder: (.*)", capsys.readouterr().out)
    assert len(load_coco_json(splits / "out.json", folder)) == 3


def test_the_splits_of_roboflow_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    for split in ("train", "valid"):
        pictures(tmp_path, f"../{split}/images/x.png")
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "x.txt").write_text("0 0.5 0.5 1 1")
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['cat']\nroboflow:\n  x: 1\n"
    for split in ("train", "val"):
        code, content = data_yaml(tmp_path, text, split)
        assert (code, by_picture(content)) == (0, {"x.png": [("cat", BOX)]})
    assert data_yaml(tmp_path, text, "test") == (2, None)


def test_the_last_part_images_of_a_path_becomes_labels(tmp_path):
    (tmp_path / "images").mkdir()
    pictures(tmp_path, "set/images/cam/x.png", "beside/y.png")
    for file in (tmp_path / "images/set/labels/cam/x.txt", tmp_path / "labels/beside/y.txt"):
        file.parent.mkdir(parents=True)
        file.write_text("0 0.5 0.5 1 1")
    code, content = data_yaml(tmp_path, "names: cat\ntrain: images\n")
    assert (code, by_picture(content)) == (0, {"set/images/cam/x.png": [("cat", BOX)], "beside/y.png": [("cat", BOX)]})


def test_labels_beside_the_pictures_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    pictures(tmp_path, "../obj_train_data/x.png")
    (tmp_path / "obj_train_data" / "x.txt").write_text("0 0.5 0.5 1 1")
    code, content = data_yaml(tmp_path, "names: cat\ntrain: obj_train_data\n")
    assert (code, by_picture(content)) == (0, {"x.png": [("cat", BOX)]})


def test_a_path_that_does_not_exist_is_counted(splits, capsys):
    assert data_yaml(splits, NAMES + "path: /content/gone\ntrain: images/train\n")[0] == 0
    assert noted(capsys.readouterr().out) == {convert_yolo.MOVED: 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (NAMES + "train: images/gone", "images/gone"),
        (NAMES + "val: images/val", "'val'"),
        (NAMES + "train: 3", "3"),
        (NAMES + "train: []", "[]"),
        (NAMES + "train: {a: b}", "a"),
        (NAMES + "train: [images/train, gone.txt]", "gone.txt"),
        ("train: images/train", "names"),
        (NAMES + "path: [a]\ntrain: images/train", "path"),
        ("names: {1: cat, 2: dog}\ntrain: images/train", "[1, 2]"),
        ("names: {a: cat}\ntrain: images/train", "'a'"),
        ("names: {0.5: cat}\ntrain: images/train", "'0.5'"),
        ("names: {0: cat, 0: dog}\ntrain: images/train", "'0'"),
        ("nc: 3\n" + NAMES + "train: images/train", "3"),
        ("nc: two\n" + NAMES + "train: images/train", "two"),
        (NAMES + "train: pipe", "pipe"),
        ("nc: 2\nnames: nut\ntrain: images/train", "nut"),
        ("names: [[cat]]\ntrain: images/train", "cat"),
    ],
)
def test_a_data_yaml_that_contradicts_itself_is_named(splits, capsys, text, value):
    os.mkfifo(splits / "pipe")  # opening it would wait for ever
    assert data_yaml(splits, text) == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert "data.yaml" in sentence
    assert value in sentence


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: nut", ["nut"]),
        ("nc: 1\nnames: nut", ["nut"]),
        ("nc: 2.0\nnames: [a, b]", ["a", "b"]),
        ("names:\n  '0': nut\n  '1': bolt", ["nut", "bolt"]),
        ("names: {1: bolt, 0: nut}", ["nut", "bolt"]),
        ("names: {0: unused, 1: nut, 2: bolt}", ["unused", "nut", "bolt"]),
        ("names: [no, 1.10]", ["no", "1.10"]),
        ("names: ['traffic light ', 007]", ["traffic light", "007"]),
        ("x: &n [a]\nnames: *n", ["a"]),
        ("\ufeffnames: [a]", ["a"]),
    ],
)
def test_names_are_read_as_they_are_written(folders, text, names):
    (folders / "data.yaml").write_text(text, "utf-8")
    assert tool.read_names(folders / "data.yaml") == names


def test_a_data_yaml_that_unfolds_without_end_is_refused(folders, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (folders / "data.yaml").write_text("\n".join([*lines, "names: *a29"]))
    assert run(folders, "yolo", "--names", str(folders / "data.yaml")) == (2, None)
    assert len(capsys.readouterr().err) < 2000


def test_labels_that_count_from_1_are_read_with_a_name_before_them(folders):
    (folders / "labels" / "a.txt").write_text("1 0.5 0.5 1 1\n2 0.5 0.5 0.1 0.1")
    (folders / "data.yaml").write_text("names: {1: nut, 2: bolt}")
    assert run(folders, "yolo", "--names", str(folders / "data.yaml")) == (2, None)
    (folders / "data.yaml").write_text("names: {0: unused, 1: nut, 2: bolt}")  # what the sentence says
    code, content = run(folders, "yolo", "--names", str(folders / "data.yaml"))
    assert (code, [name for name, _ in by_picture(content)["a.png"]]) == (0, ["nut", "bolt"])


def test_a_split_must_be_named(splits, capsys):
    (splits / "data.yaml").write_text(NAMES + "train: images/train")
    assert tool.main(["yolo", str(splits / "data.yaml"), str(splits / "out.json")]) == 2
    assert "--split train" in capsys.readouterr().err


# VOC


@pytest.mark.parametrize(
    "filename",
    [
        "",
        "a",
        "gone.png",
        "a.jpg",
        "sub/a.png",
        "C:\\data\\a.png",
        "/home/x/a.png",
        "../images/a.png",
        "../classes.txt",
        ".",
    ],
)
def test_the_name_of_the_xml_is_enough(folders, capsys, filename):
    voc(folders, a=(filename, "", None))
    code, content = run(folders, "voc")
    assert (code, by_picture(content)) == (0, {"a.png": [("cat", [4, 5, 9, 8])]})
    counts = noted(capsys.readouterr().out)
    assert counts.get(convert_voc.BY_STEM, 0) + counts.get(convert_voc.ALIKE, 0) == 1


@pytest.mark.parametrize(
    "filename", ["frame.001.png", "frame.001", "C:\\x\\frame.001.png", "frame.001.jpg", "x/frame.001.png"]
)
def test_a_filename_that_names_a_picture_is_followed(folders, filename):
    pictures(folders, "frame.001.png")
    voc(folders, other=(filename, "", None))
    code, content = run(folders, "voc")
    assert (code, sorted(by_picture(content))) == (0, ["frame.001.png"])


def test_pictures_and_xml_without_partner_are_counted_and_named(folders, capsys):
    voc(folders, a=("a.png", "", None), gone=("gone.png", "", None))
    code, content = run(folders, "voc")
    out = capsys.readouterr().out
    counts = noted(out)
    assert (code, sorted(by_picture(content))) == (0, ["a.png"])
    assert (counts[convert_voc.NO_PICTURE], counts[convert_voc.NO_XML]) == (1, 1)
    assert "(gone.xml)" in out
    assert "(sub/b.png)" in out


def test_pictures_in_another_folder_are_found(folders, capsys):
    (folders / "else").mkdir()
    (folders / "images" / "a.png").rename(folders / "else" / "a.png")
    voc(folders, a=("a.png", "", None))
    assert run(folders, "voc") == (2, None)
    [found] = re.findall(r"lie in (\S+); give", capsys.readouterr().err)
    assert tool.main(["voc", str(folders / "labels"), found, str(folders / "out.json")]) == 0


def test_two_xml_of_one_picture_are_refused_with_both_names(folders, capsys):
    pictures(folders, "c.png")
    voc(folders, a=("a.png", "", None), c=("a.png", "", box(1, 1, 5, 5, name="dog")))
    assert run(folders, "voc") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert ("a.xml" in sentence, "c.xml" in sentence, "--match stem" in sentence) == (True, True, True)
    code, content = run(folders, "voc", "--match", "stem")
    assert (code, by_picture(content)) == (0, {"a.png": [("cat", [4, 5, 9, 8])], "c.png": [("dog", [0, 0, 5, 5])]})


def test_a_copy_of_an_xml_is_refused_without_a_way_out_that_fails(folders, capsys):
    voc(folders, **{"a": ("a.png", "", None), "a (copy)": ("a.png", "", None)})
    assert run(folders, "voc") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert "a (copy).xml" in sentence
    assert "--match" not in sentence
    (folders / "labels" / "a (copy).xml").unlink()
    assert run(folders, "voc")[0] == 0


def test_filenames_that_are_exchanged_lose_against_the_names_of_the_xml(folders, capsys):
    pictures(folders, "c.png")
    voc(folders, a=("c.png", "", None), c=("a.png", "", box(1, 1, 5, 5, name="dog")))
    code, content = run(folders, "voc")
    assert code == 0
    assert by_picture(content)["a.png"] == [("cat", [4, 5, 9, 8])]
    assert by_picture(content)["c.png"] == [("dog", [0, 0, 5, 5])]
    assert noted(capsys.readouterr().out)[convert_voc.CROSSED] == 2
    code, content = run(folders, "voc", "--match", "filename")
    assert (code, by_picture(content)["c.png"]) == (0, [("cat", [4, 5, 9, 8])])


def test_a_name_that_fits_two_pictures_is_refused(folders, capsys):
    pictures(folders, "a.jpg")
    voc(folders, a=("a", "", None))
    assert run(folders, "voc") == (2, None)
    assert {"a.jpg", "a.png"} <= set(re.findall(r"a\.\w{3}\b", capsys.readouterr().err))
    voc(folders, a=("a.jpg", "", None))  # the way out
    code, content = run(folders, "voc")
    assert (code, sorted(by_picture(content))) == (0, ["a.jpg"])


def test_sub_folders_and_other_cases_of_the_ending_are_read(folders):
    pictures(folders, "cam1/x.JPG", "cam2/x.jpg")
    for cam, name in (("cam1", "x.XML"), ("cam2", "x.xml")):
        (folders / "labels" / cam).mkdir()
        text = f"<annotation><filename>x.jpg</filename>{box(1, 1, 5, 5, name=cam)}</annotation>"
        (folders / "labels" / cam / name).write_text(text)
    code, content = run(folders, "voc")
    expected = {f"{cam}/x.{end}": [(cam, [0, 0, 5, 5])] for cam, end in (("cam1", "JPG"), ("cam2", "jpg"))}
    assert (code, by_picture(content)) == (0, expected)


@pytest.mark.parametrize("size", [(300, 200), (20, 30), (31, 20)])
def test_a_size_that_is_not_the_pictures_is_refused(folders, capsys, size):
    voc(folders, a=("a.png", "<size><width>{}</width><height>{}</height></size>".format(*size), box(1, 1, 10, 10)))
    assert run(folders, "voc") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert f"{size[0]}x{size[1]}" in sentence
    assert "30x20" in sentence
    assert ("EXIF" in sentence) == (size == (20, 30))
    code, content = run(folders, "voc", "--wrong-size", "ignore")
    assert (code, by_picture(content)["a.png"]) == (0, [("cat", [0, 0, 10, 10])])
    code, content = run(folders, "voc", "--wrong-size", "scale")
    scaled = [0, 0, 10 * 30 / size[0], 10 * 20 / size[1]]
    assert (code, by_picture(content)["a.png"][0][1]) == (0, pytest.approx(scaled))


def test_the_size_of_a_picture_is_that_after_its_exif_orientation(folders, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(folders / "images" / "t.jpg", exif=exif)  # shown as 30 x 20
    voc(folders, t=("t.jpg", "<size><width>20</width><height>30</height></size>", None))
    assert run(folders, "voc") == (2, None)
    assert "EXIF" in capsys.readouterr().err
    voc(folders, t=("t.jpg", "<size><width>30</width><height>20</height></size>", None))
    code, content = run(folders, "voc")
    assert (code, content["images"][0]["width"], content["images"][0]["height"]) == (0, 30, 20)


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size/>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>-1</width><height>20</height></size>",
        "<size><width>30</width></size>",
    ],
)
def test_a_size_that_says_nothing_is_unknown(folders, capsys, size):
    voc(folders, a=("a.png", size, None))
    code, content = run(folders, "voc")
    assert (code, content["images"][0]["width"]) == (0, 30)
    assert noted(capsys.readouterr().out)[convert_voc.NO_SIZE] == 1


def test_a_size_in_fractions_is_read_and_one_that_is_no_number_is_named(folders, capsys):
    voc(folders, a=("a.png", "<size><width>30.0</width><height> 20 </height></size>", None))
    assert run(folders, "voc")[0] == 0
    voc(folders, a=("a.png", "<size><width>wide</width><height>20</height></size>", None))
    assert run(folders, "voc")[0] == 2
    assert "'wide'" in capsys.readouterr().err


def test_corners_in_the_wrong_order_are_put_in_order(folders, capsys):
    voc(folders, a=("a.png", "", box(13, 13, 5, 6)), b=("sub/b.png", "", box(5, 13, 13, 6)))
    code, content = run(folders, "voc")
    expected = [("cat", [4, 5, 9, 8])]
    assert (code, by_picture(content)) == (0, {"a.png": expected, "sub/b.png": expected})
    assert noted(capsys.readouterr().out)[convert_voc.SWAPPED] == 2


def _many(folders, boxes, size=(100, 80)):
    """One picture m.png of ``size`` with these boxes."""
    pictures(folders, "m.png", size=size)
    voc(folders, m=("m.png", "", "".join(box(*corners) for corners in boxes)))


XYWH = [(61, 51, 20, 20), (71, 11, 15, 30), (51, 41, 10, 10), (11, 6, 80, 70)]  # three of them no corners in order
SHIFTED = [[60, 50, 20, 20], [70, 10, 15, 30], [50, 40, 10, 10], [10, 5, 80, 70]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--corners", "xywh"], SHIFTED),
        (["--corners", "xywh", "--zero-based"], [list(map(float, corners)) for corners in XYWH]),
        (["--corners", "swapped"], [[19, 19, 42, 32], [14, 10, 57, 20], [9, 9, 42, 32], [10, 5, 70, 65]]),
    ],
)
def test_boxes_of_which_many_are_no_corners_are_refused_and_read_if_told(folders, capsys, options, expected):
    _many(folders, XYWH)
    assert run(folders, "voc") == (2, None)
    [sentence] = capsys.readouterr().err.splitlines()
    assert all(f"--corners {name}" in sentence for name in ("xywh", "swapped"))
    assert "3 of 4 boxes" in sentence
    code, content = run(folders, "voc", *options)  # the way out
    assert (code, [found for _, found in by_picture(content)["m.png"]]) == (0, expected)
    assert noted(capsys.readouterr().out).get(convert_voc.SWAPPED, 0) == 3 * ("swapped" in options)


def test_centres_are_refused_and_read_if_told(folders, capsys):
    _many(folders, [(81, 71, 20, 18), (85, 70, 30, 10), (90, 65, 18, 30)])  # as [x, y, w, h] they would stick out
    assert run(folders, "voc") == (2, None)
    assert "--corners xywh" not in capsys.readouterr().err
    code, content = run(folders, "voc", "--corners", "cxcywh")
    found = [found for _, found in by_picture(content)["m.png"]]
    assert (code, found) == (0, [[70, 61, 20, 18], [69, 64, 30, 10], [80, 49, 18, 30]])


def test_a_few_swapped_corners_and_those_that_fit_as_nothing_else_are_put_in_order(folders, capsys):
    _many(folders, [*XYWH[:2], (5, 5, 9, 9)])  # two are too few
    assert run(folders, "voc")[0] == 0
    _many(folders, [*XYWH[:3], *[(5, 5, 9, 9)] * 9])  # 3 of 12 are a quarter, not more
    assert run(folders, "voc")[0] == 0
    _many(folders, [(95, 75, 60, 50), (90, 70, 55, 40), (98, 78, 70, 60)])  # no position with a size in 100 x 80
    capsys.readouterr()
    code, content = run(folders, "voc")
    assert (code, by_picture(content)["m.png"][0][1]) == (0, [59, 49, 36, 26])
    assert noted(capsys.readouterr().out)[convert_voc.SWAPPED] == 3


def test_a_polygon_without_a_box_is_corners_whatever_is_said_of_the_boxes(folders):
    points = "<x1>5</x1><y1>6</y1><x2>13</x2><y2>6</y2><x3>13</x3><y3>13</y3>"
    voc(folders, a=("a.png", "", f"<object><name>cat</name><polygon>{points}</polygon></object>"))
    assert by_picture(run(folders, "voc", "--corners", "xywh")[1])["a.png"] == [("cat", [4, 5, 9, 8])]


def test_tags_may_be_in_any_case(folders, capsys):
    more = "<size><width>30</width><height>20</height></size>"
    polygon = (
        "<polygon><x1>5</x1><y1>6</y1><x2>13</x2><y2>6</y2><x3>13</x3><y3>13</y3></polygon><difficult>1</difficult>"
    )
    thing = box(5, 6, 13, 13).replace("</object>", polygon + "</object>")
    text = f"<annotation><filename>a.png</filename>{more}{thing}</annotation>"
    read = []
    for change in (str, str.upper, str.title):
        written = re.sub(r"</?\w+", lambda tag, change=change: change(tag[0]), text)
        (folders / "labels" / "a.xml").write_text(written)
        assert run(folders, "voc")[0] == 0
        read.append((json.loads((folders / "out.json").read_text()), noted(capsys.readouterr().out)))
    assert by_picture(read[0][0])["a.png"] == [("cat", [4, 5, 9, 8])]
    assert read[1] == read[0] == read[2]


def test_the_picture_of_an_xml_that_cannot_be_read_is_not_counted_as_one_without(folders, capsys):
    pictures(folders, "c.png", "bad.png", "sub/bad.png")
    voc(folders, a=("a.png", "", None), bad=("bad.png", "", box(1, 1, "x", 3)))
    code, _ = run(folders, "voc", "--drop-bad")
    assert (code, noted(capsys.readouterr().out)[convert_voc.NO_XML]) == (0, 3)  # c.png, sub/b.png and sub/bad.png


@pytest.mark.parametrize("head", ["", '<?xml version="1.0"?>', '<?xml version="1.0" encoding="UTF-8"?>'])
def test_bytes_that_are_not_utf_8_are_refused_with_a_way_out_that_works(folders, capsys, head):
    text = VOC.replace("cat", "café")
    (folders / "labels" / "a.xml").write_bytes((head + text).encode("latin-1"))
    assert run(folders, "voc") == (2, None)
    declaration = re.search(r"<\?xml .*\?>", capsys.readouterr().err)[0]
    (folders / "labels" / "a.xml").write_bytes((declaration + text).encode("latin-1"))
    code, content = run(folders, "voc")
    assert (code, content["categories"][0]["name"]) == (0, "café")


def test_text_that_is_no_xml_says_nothing_of_its_encoding(folders, capsys):
    (folders / "labels" / "a.xml").write_text("<annotation><b></annotation>")
    assert run(folders, "voc") == (2, None)
    assert "UTF-8" not in capsys.readouterr().err


def test_fractions_signs_and_blanks_in_corners_are_read(folders):
    voc(folders, a=("a.png", "", box("5.25", " +6 ", "1.3e1", "13.50\n")))
    code, content = run(folders, "voc")
    assert (code, by_picture(content)["a.png"]) == (0, [("cat", [4.25, 5, 8.75, 8.5])])


def test_boxes_without_a_size_or_outside_are_dropped_and_counted(folders, capsys):
    things = box(10, 10, 9, 12) + box(50, 10, 60, 12) + box(5, 6, 13, 13) + box(20, 5, 40, 10)
    voc(folders, a=("a.png", "", things))
    code, content = run(folders, "voc")
    counts = noted(capsys.readouterr().out)
    assert (code, [found for _, found in by_picture(content)["a.png"]]) == (0, [[4, 5, 9, 8], [19, 4, 11, 6]])
    assert (counts[convert.EMPTY_BOX], counts[convert.OUTSIDE_BOX], counts[convert.CLIPPED_BOX]) == (1, 1, 1)


@pytest.mark.parametrize(
    "points",
    [
        "<x1>5</x1><y1>6</y1><x2>13</x2><y2>6</y2><x3>13</x3><y3>13</y3>",
        "<pt><x>5</x><y>6</y></pt><pt><x>13</x><y>6</y></pt><pt><x>13</x><y>13</y></pt>",
    ],
)
def test_a_polygon_stands_in_for_a_box_and_stays_as_segmentation(folders, capsys, points):
    polygon = f"<polygon>{points}</polygon>"
    both = box(5, 6, 13, 13).replace("</object>", polygon + "</object>")
    voc(folders, a=("a.png", "", f"<object><name>cat</name>{polygon}</object>" + both))
    code, content = run(folders, "voc")
    assert (code, [x["bbox"] for x in content["annotations"]]) == (0, [[4, 5, 9, 8]] * 2)
    assert [x["segmentation"] for x in content["annotations"]] == [[[4.5, 5.5, 12.5, 5.5, 12.5, 12.5]]] * 2
    counts = noted(capsys.readouterr().out)
    assert (counts[convert_voc.POLYGON_BOXES], counts[convert_voc.POLYGONS]) == (1, 2)


@pytest.mark.parametrize(
    "difficult", ["", "<difficult/>", "<difficult>1</difficult>", "<difficult>Unspecified</difficult>"]
)
def test_difficult_may_be_anything_and_parts_are_no_objects(folders, capsys, difficult):
    part = box(1, 1, 3, 3, name="head").replace("object>", "part>")
    thing = box(5, 6, 13, 13, name=" traffic\n  light ").replace("</object>", difficult + part + "</object>")
    voc(folders, a=("a.png", "", thing))
    code, content = run(folders, "voc")
    assert (code, by_picture(content)["a.png"]) == (0, [("traffic light", [4, 5, 9, 8])])
    assert noted(capsys.readouterr().out).get(convert_voc.DIFFICULT, 0) == ("1" in difficult)


def test_hidden_xml_are_skipped_and_counted(folders, capsys):
    voc(folders, a=("a.png", "", None))
    for name in ("._a.xml", ".DS_Store"):
        (folders / "labels" / name).write_bytes(b"\0\5\x16\7")
    assert run(folders, "voc")[0] == 0
    assert noted(capsys.readouterr().out)[label_files.HIDDEN] == 2


def test_sentences_about_xml_name_the_line(folders, capsys):
    for text, line in (
        (VOC.replace("xmin>1<", "xmin>one<"), 1),
        ("<annotation>\n\n" + box(1, 1, "x", 3) + "</annotation>", 3),
        ("<annotation>\n<object/>\n</annotation>", 2),
        ("<annotation>\n<b>\n</annotation>", 3),
        ('<?xml version="1.0"?>\n<!DOCTYPE x>\n<annotation/>', 2),
        ("\n<html/>", 2),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', 1),
    ):
        (folders / "labels" / "a.xml").write_text(text)
        assert run(folders, "voc") == (2, None)
        [sentence] = capsys.readouterr().err.splitlines()
        assert f"a.xml: line {line}" in sentence


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
def test_xml_may_have_any_encoding_that_it_names(folders, encoding):
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n' + VOC.replace("cat", "café")
    (folders / "labels" / "a.xml").write_bytes(text.encode(encoding))
    code, content = run(folders, "voc")
    assert (code, content["categories"][0]["name"]) == (0, "café")


def test_corners_of_zero_are_counted_for_a_set_that_is_zero_based(folders, capsys):
    voc(folders, a=("a.png", "", box(0, 0, 9, 8)))
    code, content = run(folders, "voc")
    assert (code, by_picture(content)["a.png"]) == (0, [("cat", [0, 0, 9, 8])])
    assert noted(capsys.readouterr().out)[convert_voc.BELOW_ONE] == 1
    assert run(folders, "voc", "--zero-based")[0] == 0
    assert convert_voc.BELOW_ONE not in noted(capsys.readouterr().out)


def test_normalised_corners_are_refused(folders, capsys):
    voc(folders, a=("a.png", "", box(0.1, 0.2, 0.5, 0.7)))
    assert run(folders, "voc") == (2, None)
    assert "--zero-based" in capsys.readouterr().err
    voc(folders, a=("a.png", "", box(0.1 * 30, 0.2 * 20, 0.5 * 30, 0.7 * 20)))  # the way out
    code, content = run(folders, "voc", "--zero-based")
    assert (code, by_picture(content)["a.png"][0][1]) == (0, pytest.approx([3, 4, 12, 10]))


def test_an_empty_voc_set_needs_names(folders, capsys):
    voc(folders, a=("a.png", "", ""))
    assert run(folders, "voc") == (2, None)
    assert run(folders, "voc", "--allow-empty") == (2, None)
    assert "--names" in capsys.readouterr().err
    code, content = run(folders, "voc", "--allow-empty", "--names", str(folders / "classes.txt"))
    assert (code, by_picture(content)) == (0, {"a.png": []})


def test_an_xml_behind_a_link_stays_in_its_folder(folders, capsys):
    (folders / "secret.xml").write_text(VOC)
    (folders / "labels" / "a.xml").symlink_to(folders / "secret.xml")
    assert run(folders, "voc") == (2, None)
    assert "a.xml" in capsys.readouterr().err


def test_a_list_chooses_a_part_of_a_voc_set(folders, capsys):
    for name in ("a", "sub/b"):
        (folders / "labels" / f"{name}.xml").write_text(VOC.replace("a.png", f"{name.split('/')[-1]}.png"))
    (folders / "train.txt").write_text("\ufeffb\r\n\r\n", encoding="utf-8")
    code, content = run(folders, "voc", "--list", str(folders / "train.txt"))
    assert code == 0
    assert [image["file_name"] for image in content["images"]] == ["sub/b.png"]
    assert "without an .xml" not in capsys.readouterr().out
    for text, named in (("b\nc\n", "'c'"), ("\n", "--list")):
        (folders / "train.txt").write_text(text)
        assert run(folders, "voc", "--list", str(folders / "train.txt"))[0] == 2
        assert named in capsys.readouterr().err
    assert run(folders, "yolo", "--names", str(folders / "classes.txt"), "--list", "x")[0] == 2
    assert "--list" in capsys.readouterr().err
