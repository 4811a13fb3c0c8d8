"""The command line of tools/check_dataset.py: exit codes, what it says, and what it writes."""

import json

import check_dataset as tool
import pytest
from conftest import valid_coco
from PIL import Image

from dn_detr_d2.data import load_coco_json


@pytest.fixture
def run(tmp_path, capsys):
    """run(content, *options) -> (exit code, stdout, stderr); the folder holds a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), (len(name), ord(name[0]), 0)).save(tmp_path / name)

    def check(content, *options):
        (tmp_path / "set.json").write_text(content if isinstance(content, str) else json.dumps(content))
        code = tool.run([str(tmp_path / "set.json"), str(tmp_path), *map(str, options)])
        return (code, *capsys.readouterr())

    return check


def broken():
    boxes = [[-9, 0, 19, 9], [1, 1, 0, 5], [1, 1, 5, 5], [1, 1, 5, 5]]
    return valid_coco(annotations=[{"id": min(i, 2), "image_id": 1, "category_id": 1, "bbox": box, "area": 5}
                                   for i, box in enumerate(boxes)])  # fmt: skip


def test_a_set_without_a_fault_ends_with_0(run):
    code, out, _ = run(valid_coco(), "--num-queries", 2)
    assert (code, out.splitlines()[-1]) == (0, "no problems")


def test_a_faulty_set_ends_with_1_and_lists_every_kind(run):
    code, out, _ = run(broken(), "--num-queries", 1)
    assert code == 1
    for line in (
        "1 x annotation id appears more than once",
        "1 x box has no positive",
        "1 x box sticks out",
        "1 x image has more objects",
    ):
        assert line in out


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": 1' + "0" * 5000 + "}", "[" * 100000, "\xff"])
def test_a_file_that_cannot_be_read_ends_with_2_and_its_name(run, text):
    code, _, err = run(text)
    assert code == 2
    assert "set.json" in err
    assert err.count("\n") == 1


def test_a_folder_that_does_not_exist_ends_with_2(run, tmp_path):
    run(valid_coco())
    assert tool.run([str(tmp_path / "set.json"), str(tmp_path / "nowhere")]) == 2
    assert tool.run([str(tmp_path / "nothing.json"), str(tmp_path)]) == 2


def test_images_are_left_alone_on_request(run, tmp_path):
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").write_text("no image")
    assert run(valid_coco(), "--no-images")[0] == 0
    code, out, _ = run(valid_coco())
    assert code == 1
    assert "a.png" in out


def test_a_repaired_file_can_be_trained_on_and_has_no_problem(run, tmp_path):
    code, out, _ = run(broken(), "--fix", tmp_path / "out.json")
    assert code == 0
    assert "repaired: 1 x box sticks out of its image" in out
    assert "3 annotations changed or dropped" in out
    [first, *_] = load_coco_json(tmp_path / "out.json", tmp_path)
    assert [x["bbox"] for x in first["annotations"]] == [[0, 0, 10, 9], [1, 1, 5, 5], [1, 1, 5, 5]]
    assert json.loads((tmp_path / "out.json").read_text())["annotations"][0]["area"] == 90
    assert json.loads((tmp_path / "set.json").read_text()) == broken()


def test_the_input_is_not_overwritten(run, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "set.json")
    for name in ("set.json", "link.json"):
        code, _, err = run(broken(), "--fix", tmp_path / name)
        assert (code, "is an input" in err) == (2, True)
    assert run(broken(), "--fix", tmp_path / "nowhere" / "out.json")[0] == 2
    assert json.loads((tmp_path / "set.json").read_text()) == broken()


def test_two_sets_that_share_images_are_a_problem(run, tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(valid_coco()))
    code, out, _ = run(valid_coco(), "--val", tmp_path / "val.json", tmp_path)
    assert code == 1
    assert "2 x image is in both sets" in out
