"""The command line of dn-detr check: exit codes, what it says, and what it writes."""

import json

import numpy as np
import pytest
from conftest import valid_coco
from naming import naming
from PIL import Image
from pycocotools import mask as mask_util

from dn_detr_d2 import DatasetError, setup_cfg
from dn_detr_d2.commands import check as tool
from dn_detr_d2.data import load_coco_json
from dn_detr_d2.data.issues import Issue, Severity
from dn_detr_d2.data.label_files import LINKED
from dn_detr_d2.data.mapper import DetrDatasetMapper


@pytest.fixture
def run(tmp_path, capsys):
    """run(content, *options) -> (exit code, stdout, stderr); the folder holds a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), (len(name), ord(name[0]), 0)).save(tmp_path / name)

    def check(content, *options):
        (tmp_path / "set.json").write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
        code = tool.main([str(tmp_path / "set.json"), str(tmp_path), *map(str, options)])
        return (code, *capsys.readouterr())

    return check


def broken():
    boxes = [[-9, 0, 19, 9], [1, 1, 0, 5], [1, 1, 5, 5], [1, 1, 5, 5]]
    return valid_coco(
        annotations=[
            {"id": min(i, 2), "image_id": 1, "category_id": 1, "bbox": box, "area": 5} for i, box in enumerate(boxes)
        ]
    )


def test_a_set_without_a_fault_ends_with_0(run):
    code, out, _ = run(valid_coco(), "--num-queries", 2)
    assert (code, out.splitlines()[-1]) == (0, "no problems")


@pytest.mark.parametrize(("budget", "problems"), [(0, 0), (1, 1), (2, 0)])
def test_images_with_more_objects_than_the_budget_are_counted(run, budget, problems):
    """Image 1 of the set has two objects."""
    code, out, _ = run(valid_coco(), "--num-queries", 2, "--denoising-budget", budget)
    assert (code, len([line for line in out.splitlines() if str(Issue.OVER_BUDGET) in line])) == (0, problems)


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
    assert tool.main([str(tmp_path / "set.json"), str(tmp_path / "nowhere")]) == 2
    assert tool.main([str(tmp_path / "nothing.json"), str(tmp_path)]) == 2


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


def test_what_cannot_be_used_is_left_out_on_request_and_named(run, tmp_path):
    content = valid_coco()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    bad = [("cut.png", 30), ("gone.png", 30), ("small.png", 30), ("/etc/passwd", 30), (None, 30)]
    content["images"] += [{"id": 10 + i, "file_name": x, "width": w, "height": 20} for i, (x, w) in enumerate(bad)]
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    changes = [{"image_id": 10 + i} for i in range(5)]
    changes += [{"category_id": 9}, {"bbox": [1]}, {"iscrowd": 7}, {"bbox": None}]
    content["annotations"] += [good | {"id": 100 + i} | change for i, change in enumerate(changes)] + ["x"]
    content["images"] += [None]
    content["categories"] += [{"id": 7}]
    assert run(content)[0] == 1
    assert run(content, "--drop-bad")[0] == 2
    code, out, _ = run(content, "--fix", tmp_path / "out.json", "--drop-bad")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 5 + 9 + 1 + 2
    assert all(any(name in line for line in lines) for name in ("cut.png", "gone.png", "small.png", "passwd"))
    assert "17 images, categories and annotations left out" in out
    first, second = load_coco_json(tmp_path / "out.json", tmp_path)
    assert (len(first["annotations"]), len(second["annotations"])) == (2, 1)


def test_one_repair_mends_every_way_of_writing(run, tmp_path):
    """Text ids, doubled ids and keys, orphans, null and text values, sizes, absolute paths, back slashes, ._ files."""
    (tmp_path / "sub").mkdir()
    for name in ("sub/c.png", "sub/d.png"):
        Image.new("RGB", (30, 20), (len(name), ord(name[4]), 9)).save(tmp_path / name)
    content = {
        "images": [
            {"id": 1, "file_name": str(tmp_path / "a.png"), "width": -1, "height": None},
            {"id": 2.0, "file_name": "sub\\c.png", "width": "30", "height": 20.5},
            {"id": "3", "file_name": "sub/../sub/d.png"},
            {"id": 4, "file_name": "sub/._c.png"},
        ],
        "categories": [{"id": "1", "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 0, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": "1", "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": "0", "area": "12"},
            {"id": 1, "image_id": "2", "category_id": "2", "bbox": [1, 2, 3, 4], "iscrowd": None, "area": -5},
            {"id": 7, "image_id": 3, "category_id": 2.0, "bbox": [1, 2, 30, 4], "iscrowd": False},
            {"id": 8, "image_id": 99, "category_id": 2, "bbox": [1, 2, 3, 4]},
        ],
    }
    text = json.dumps(content).replace('"iscrowd": "0"', '"iscrowd": "0", "iscrowd": "0"')
    (tmp_path / "bom.json").write_text(text, encoding="utf-8-sig")
    assert tool.main([str(tmp_path / "bom.json"), str(tmp_path)]) == 1
    code, out, _ = run(text, "--fix", tmp_path / "out.json")
    assert code == 0, out
    fixed = json.loads((tmp_path / "out.json").read_text())
    assert [x["file_name"] for x in fixed["images"]] == ["a.png", "sub/c.png", "sub/../sub/d.png"]
    assert all((x["width"], x["height"]) == (30, 20) for x in fixed["images"])
    records = load_coco_json(tmp_path / "out.json", tmp_path)
    assert [[(x["category_id"], x["area"]) for x in record["annotations"]] for record in records] == [
        [(1, 12)],
        [(0, 12)],
        [(0, 120)],  # out by one pixel, which is rounding
    ]


def repaired_as_said(run, tmp_path, change):
    """Refuses a file with a change to its first annotation, naming --fix, which repairs it; what it writes."""
    content = valid_coco()
    content["annotations"][0] |= change
    run(content)
    with pytest.raises(DatasetError, match="--fix"):
        load_coco_json(tmp_path / "set.json", tmp_path)
    assert run(content, "--fix", tmp_path / "out.json")[0] == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("change", [{"image_id": "1"}, {"category_id": "1"}, {"iscrowd": "1"}, {"id": 4}, {"id": None}])
def test_a_sentence_that_names_the_repair_is_true(run, tmp_path, change):
    repaired_as_said(run, tmp_path, change)
    assert sum(len(x["annotations"]) for x in load_coco_json(tmp_path / "out.json", tmp_path)) == 3


MASK = [[2, 3, 12, 3, 12, 9, 2, 9]]
RUNS = {"size": [20, 30], "counts": [2 * 20 + 3, 6, *[14, 6] * 9, 600 - (2 * 20 + 3 + 6 + 9 * 20)]}


@pytest.mark.parametrize("change", [
    {"bbox": ["2", "3", "10", "6.0"]}, {"bbox": [2, 3, "10", 6]},
    *({"bbox": box, "segmentation": mask} for box in (None, []) for mask in (MASK, RUNS)),
])  # fmt: skip
def test_a_box_is_found_in_the_mask_or_in_text(run, tmp_path, change):
    assert repaired_as_said(run, tmp_path, change)["annotations"][0]["bbox"] == [2, 3, 10, 6]


@pytest.mark.parametrize(("choice", "box", "area", "mask"), [
    ("ignore", [1, 2, 10, 6], 60, MASK), ("scale", [0.5, 4, 5, 12], 60, [[1, 6, 6, 6, 6, 18, 1, 18]]),
])  # fmt: skip
def test_images_of_another_size_than_annotated(run, tmp_path, choice, box, area, mask):
    """Annotated at 60 x 10, the file has 30 x 20: half as wide, twice as high."""
    content = valid_coco()
    content["images"][0] |= {"width": 60, "height": 10}
    content["annotations"] = [{"id": 1, "image_id": content["images"][0]["id"], "category_id": 1, "bbox": [1, 2, 10, 6],
                               "area": 60, "segmentation": MASK}]  # fmt: skip
    assert run(content)[0] == 1
    assert run(content, "--fix", tmp_path / "out.json")[0] == 1
    code, out, _ = run(content, "--fix", tmp_path / "out.json", "--wrong-size", choice)
    assert code == 0, out
    fixed = json.loads((tmp_path / "out.json").read_text())
    assert [(x["width"], x["height"]) for x in fixed["images"]] == [(30, 20)] * 2
    [found] = fixed["annotations"]
    assert (found["bbox"], found["area"], found["segmentation"]) == (box, area, mask)
    assert run(content, "--wrong-size", choice)[0] == 2  # where to?


def of_one_image(box, **more):
    content = valid_coco()
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box} | more]
    return content


def repaired_by(run, tmp_path, content, *options):
    """The first annotation of what --fix writes."""
    _, out, err = run(content, "--fix", tmp_path / "out.json", *options)
    assert not err, out
    return json.loads((tmp_path / "out.json").read_text())["annotations"][0]


@pytest.mark.parametrize("drop", [[], ["--drop-bad"]])
@pytest.mark.parametrize("convention", ["xyxy", "cxcywh", "yxhw"])
def test_a_box_of_a_mask_is_not_converted(run, tmp_path, convention, drop):
    """Masks are in pixels, whatever the boxes are written as."""
    found = repaired_by(run, tmp_path, of_one_image(None, segmentation=MASK), "--boxes", convention, *drop)
    assert found["bbox"] == [2, 3, 10, 6]


def test_a_box_of_a_normalised_mask_is_one_in_pixels(run, tmp_path):
    ring = [value / (20 if i % 2 else 30) for i, value in enumerate(MASK[0])]
    found = repaired_by(run, tmp_path, of_one_image([], segmentation=[ring]), "--boxes", "xywh-normalised")
    assert found["bbox"] == pytest.approx([2, 3, 10, 6])


def test_boxes_that_are_shares_of_the_image_are_not_scaled_besides(run, tmp_path):
    content = of_one_image([0.25, 0.25, 0.5, 0.5])
    content["images"][0] |= {"width": 60, "height": 40}
    found = repaired_by(run, tmp_path, content, "--boxes", "xywh-normalised", "--wrong-size", "scale")
    assert found["bbox"] == [7.5, 5, 15, 10]


def test_an_image_that_is_turned_is_not_scaled(run, tmp_path):
    """Width and height exchanged: it was annotated without its EXIF orientation, and no factor makes that good."""
    content = of_one_image([2, 3, 10, 6])
    content["images"][0] |= {"width": 20, "height": 30}
    code, out, _ = run(content, "--fix", tmp_path / "out.json", "--wrong-size", "scale")
    assert code == 1, out
    assert json.loads((tmp_path / "out.json").read_text())["annotations"][0]["bbox"] == [2, 3, 10, 6]
    mapper = DetrDatasetMapper(setup_cfg("", ["MODEL.DN_DETR.NUM_CLASSES", 2], splits=()), False)
    record = load_coco_json(tmp_path / "set.json", tmp_path)[0]
    with pytest.raises(DatasetError, match=naming("a.png", "exiftool -Orientation=", "--wrong-size ignore")):
        mapper(record)


def test_run_lengths_are_scaled_with_their_image(run, tmp_path):
    """From 60 x 40 to 30 x 20: half of everything."""
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[6:18, 4:24] = 1
    runs = mask_util.encode(mask)
    content = of_one_image([4, 6, 20, 12], segmentation=runs | {"counts": runs["counts"].decode()})
    content["images"][0] |= {"width": 60, "height": 40}
    found = repaired_by(run, tmp_path, content, "--masks", "--wrong-size", "scale")
    assert found["bbox"] == [2, 3, 10, 6]
    assert np.array_equal(mask_util.decode(found["segmentation"]), mask[::2, ::2])


@pytest.mark.parametrize("change", ["size", "path"])
def test_an_image_that_is_the_same_after_a_repair_is_listed_once(run, tmp_path, change):
    """And no mask is measured against the image that follows."""
    content = valid_coco()
    content["annotations"] = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 10, 6], "segmentation": MASK}
                              for i in (1, 2)]  # fmt: skip
    again = dict(content["images"][0])
    again |= {"width": 60} if change == "size" else {"file_name": str(tmp_path / again["file_name"])}
    content["images"].insert(1, again)
    options = ["--wrong-size", "ignore"] if change == "size" else ["--drop-bad"]
    code, out, _ = run(content, "--masks", "--fix", tmp_path / "out.json", *options)
    assert code == 0, out
    fixed = json.loads((tmp_path / "out.json").read_text())
    assert len(fixed["images"]) == len(fixed["annotations"]) == 2
    assert all(x["segmentation"] == MASK for x in fixed["annotations"])


def test_a_panoptic_file_is_refused_and_not_emptied(run, tmp_path):
    content = valid_coco()
    content["annotations"] = [{"image_id": 1, "file_name": "a.png", "segments_info": []}]
    code, _, said = run(content, "--fix", tmp_path / "out.json", "--drop-bad")
    assert code == 2
    assert naming("segments_info", "DATASETS.COCO_PANOPTIC").search(said)
    assert not (tmp_path / "out.json").exists()


def corners(count=12):
    """A file whose boxes are corners, for images of 30 x 20 pixels."""
    boxes = [[8 + i, 5 + i / 2, 18 + i, 13 + i / 2] for i in range(count)]
    return valid_coco(
        annotations=[
            {"id": i, "image_id": 1 + i % 2, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
            for i, box in enumerate(boxes)
        ]
    )


def test_a_conversion_is_counted_and_its_areas_follow(run, tmp_path):
    code, out, _ = run(corners(), "--fix", tmp_path / "out.json", "--boxes", "xyxy")
    assert code == 0, out
    assert "12 x box converted from xyxy" in out
    assert "12 annotations changed" in out
    fixed = json.loads((tmp_path / "out.json").read_text())
    assert {(*x["bbox"][2:], x["area"]) for x in fixed["annotations"]} == {(10, 8, 80)}


def test_normalised_boxes_without_sizes_are_not_converted_to_nothing(run, tmp_path):
    content = corners()
    for image in content["images"]:
        del image["width"], image["height"]
    for entry in content["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.5, 0.25]
    options = "--fix", tmp_path / "out.json", "--boxes", "xywh-normalised"
    code, _, err = run(content, *options, "--no-images")
    assert (code, err.count("\n"), (tmp_path / "out.json").exists()) == (2, 1, False)
    assert "--no-images" in err
    assert run(content, *options)[0] == 0
    fixed = json.loads((tmp_path / "out.json").read_text())
    assert {tuple(x["bbox"]) for x in fixed["annotations"]} == {(3, 4, 15, 5)}


def test_many_boxes_that_stick_out_are_clipped_only_if_told(run, tmp_path):
    content = corners()
    for i, entry in enumerate(content["annotations"]):
        entry["bbox"] = [25, 5, 9, 9] if i % 2 else [-5, 5, 9, 9]
    code, _, err = run(content, "--fix", tmp_path / "out.json")
    assert (code, err.count("\n"), (tmp_path / "out.json").exists()) == (2, 1, False)
    assert "--boxes xywh" in err
    assert run(content, "--fix", tmp_path / "out.json", "--boxes", "xywh")[0] == 0


def test_masks_are_problems_and_repaired_only_on_request(run, tmp_path):
    ring = [5, 5, 15, 5, 15, 14, 5, 14]
    masks = [[ring], [ring[:4], ring], "x", {"size": [1, 1], "counts": [1]}, [[5, 5, 99, 5, 99, 14, 5, 14]], []]
    box = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 9]}
    content = valid_coco(annotations=[box | {"id": i, "segmentation": mask} for i, mask in enumerate(masks)])
    code, out, _ = run(content)
    assert code == 0
    assert "1 x object without a mask" in out
    assert run(content, "--masks")[0] == 1
    fixed = tmp_path / "out.json"
    assert run(content, "--fix", fixed)[0] == 0
    assert [x["segmentation"] for x in json.loads(fixed.read_text())["annotations"]] == masks
    code, out, _ = run(content, "--fix", fixed, "--masks")
    assert code == 1
    assert "3 x object without a mask" in out
    assert len(json.loads(fixed.read_text())["annotations"]) == 6
    code, out, _ = run(content, "--fix", fixed, "--masks", "--drop-bad")
    kept = {x["id"]: x["segmentation"] for x in json.loads(fixed.read_text())["annotations"]}
    assert kept == {0: [ring], 1: [ring], 4: [[5, 5, 30, 5, 30, 14, 5, 14]]}
    assert "left out: annotation 5" in out
    assert (code, "mask disagrees" in out) == (1, True)  # which needs a person


@pytest.fixture
def unlabeled(tmp_path):
    """A folder of its own with a whole image, a damaged one in a subfolder, and what is no image."""
    folder = tmp_path / "unlabeled"
    (folder / "sub").mkdir(parents=True)
    noise = Image.effect_noise((30, 20), 90).convert("RGB")
    noise.save(folder / "whole.png")
    noise.save(folder / "sub" / "half.png")
    (folder / "sub" / "half.png").write_bytes((folder / "sub" / "half.png").read_bytes()[:-300])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_without_annotations_are_checked(unlabeled, capsys):
    """DATASETS.UNLABELED takes such folders."""
    assert tool.main([str(unlabeled)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "2 images"
    assert f"1 x {Issue.DAMAGED}" in out
    assert "half.png" in out
    assert "annotations" not in out
    assert Severity.STOPS.value not in out  # a training leaves it out
    (unlabeled / "sub" / "half.png").unlink()
    assert tool.main([str(unlabeled)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problems"


def test_images_without_annotations_that_are_tested_on_are_named(run, unlabeled, tmp_path, capsys):
    """A detector that has learned from them looks better than it is."""
    run(valid_coco())
    (unlabeled / "sub" / "half.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert tool.main([str(unlabeled), "--val", str(tmp_path / "set.json"), str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"1 x {Issue.SAME_BYTES}" in out
    assert "half.png" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{folder}", "{folder}"], ["unlabeled", "alone"]),
        (["{folder}", "--split", "0.5"], ["--split", "unlabeled"]),
        (["{folder}", "--no-images"], ["--no-images", "unlabeled"]),
        (["{folder}", "--num-queries", "300"], ["--num-queries", "unlabeled"]),
        (["{set}"], ["IMAGE_FOLDER", "set.json"]),
        (["{empty}"], ["empty", ".png"]),
    ],
)
def test_a_folder_of_images_takes_nothing_about_annotations(run, unlabeled, tmp_path, arguments, named, capsys):
    run(valid_coco())
    (tmp_path / "empty").mkdir()
    places = {"folder": unlabeled, "set": tmp_path / "set.json", "empty": tmp_path / "empty"}
    assert tool.main([argument.format(**places) for argument in arguments]) == 2
    assert naming(*named).search(capsys.readouterr().err)


def test_links_to_images_elsewhere_are_images_of_a_folder(unlabeled, capsys):
    """As for a training; a link that leads nowhere is left out."""
    (unlabeled / "sub" / "half.png").unlink()
    (unlabeled / "whole.png").rename(unlabeled.parent / "elsewhere.png")
    (unlabeled / "linked.png").symlink_to(unlabeled.parent / "elsewhere.png")
    assert tool.main([str(unlabeled)]) == 0
    assert "1 images" in capsys.readouterr().out
    (unlabeled / "lost.png").symlink_to(unlabeled.parent / "nowhere.png")
    assert tool.main([str(unlabeled)]) == 1
    assert f"1 x {Issue.MISSING}" in capsys.readouterr().out


def test_folders_behind_links_are_named_and_not_searched(unlabeled, tmp_path, capsys):
    (unlabeled / "linked").symlink_to(tmp_path, target_is_directory=True)
    tool.main([str(unlabeled)])
    lines = capsys.readouterr().out.splitlines()
    assert f"{LINKED}: 1 ({unlabeled / 'linked'})" in lines
    assert "2 images" in lines
