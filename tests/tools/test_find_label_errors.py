"""tools/find_label_errors.py from the command line to the pictures, and flip_labels.py that measures it."""

import csv
import json
import re

import pytest
import torch
from detectron2.data import DatasetCatalog
from naming import naming
from PIL import Image

from dev import flip_labels
from tools import find_label_errors

SHAPES = ["MODEL.DN_DETR.NUM_CLASSES", 3, "INPUT.MIN_SIZE_TEST", 48, "DATALOADER.NUM_WORKERS", 0]


@pytest.fixture
def run(toy_cfg, toy_model, tmp_path, capsys):
    """run(*arguments, system=...) -> (exit code, stdout, stderr) with a toy model's config and weights."""

    def call(*arguments, system="dn_detr", weights=None, dataset="shapes_val"):
        (tmp_path / "config.yaml").write_text(toy_cfg(system, *SHAPES).dump())
        torch.save({"model": toy_model(system, *SHAPES).state_dict()}, tmp_path / "model.pth")
        command = ["--config-file", str(tmp_path / "config.yaml"), "--weights", str(weights or tmp_path / "model.pth")]
        code = find_label_errors.main([*command, "--dataset", dataset, *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_table_file_and_pictures(run, tmp_path):
    out = tmp_path / "found"
    code, stdout, stderr = run("--num-images", 8, "--top", 3, "--output", out)
    assert (code, stderr) == (0, "")
    records = [record for record in DatasetCatalog.get("shapes_val") if record["image_id"] % 25 == 0]
    count = sum(len(record["annotations"]) for record in records)
    with (out / "label_errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert {int(row["annotation"]) for row in rows} == {x["id"] for record in records for x in record["annotations"]}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    annotations = {x["id"]: x for record in records for x in record["annotations"]}
    names = ("circle", "rectangle", "triangle")
    for row in rows:
        annotation = annotations[int(row["annotation"])]
        assert row["label"] == names[annotation["category_id"]] != row["suggested"]
        x, y, w, h = annotation["bbox"]
        assert [float(row[key]) for key in ("x0", "y0", "x1", "y1")] == pytest.approx([x, y, x + w, y + h], abs=0.2)
    pictures = sorted(out.glob("*.png"))
    assert [picture.name for picture in pictures] == [
        f"{i:04d}_{row['label']}_or_{row['suggested']}.png" for i, row in enumerate(rows[:3], 1)
    ]
    assert min(Image.open(pictures[0]).size) == 480
    assert stdout.count("shapes_val") == 3
    assert f"{count} annotations; for {sum(x > 0 for x in scores)} of them another class is likelier" in stdout


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ([], {"weights": "nothing.pth"}, ["--weights", "nothing.pth"]),
        ([], {"dataset": "shape_val"}, ["'shape_val'", "'shapes_val'"]),
        ([], {"system": "dab_detr"}, ["MODEL.DN_DETR.DENOISING.NAME", "''"]),
        (["--top", -1], {}, ["--top", "--num-images", -1, 0]),
        (["MODEL.DN_DETR.NUM_CLASSES", 4], {}, ["MODEL.DN_DETR.NUM_CLASSES", 4, "shapes_val", 3]),
        (["MODEL.DN_DETR.HIDDEN_DIM", 32], {}, ["wrong shape"]),
        (["--output", __file__], {}, ["--output", __file__]),
        (["MODEL.DN_DETR.NUM_CLASES", 3], {}, ["MODEL.DN_DETR.NUM_CLASES", "MODEL.DN_DETR.NUM_CLASSES"]),
    ],
)
def test_mistakes_are_one_sentence_and_a_code(run, arguments, settings, named):
    code, stdout, stderr = run(*arguments, **settings)
    assert code == 2
    assert stderr.startswith("error: ")
    assert naming(*named).search(stderr)
    assert len(stderr.strip().splitlines()) == 1
    assert stdout == ""


def test_a_data_set_without_boxes_is_refused(run):
    record = DatasetCatalog.get("shapes_val")[0] | {"annotations": []}
    DatasetCatalog.register("test_no_boxes", lambda: [record])
    try:
        code, _, stderr = run(dataset="test_no_boxes")
    finally:
        DatasetCatalog.remove("test_no_boxes")
    assert code == 2
    assert naming(1, "'test_no_boxes'").search(stderr)


def test_planted_labels_are_counted():
    """Ten annotations of which two are flipped; the ranking has one of them first, the other last."""
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 9, "name": "c"}]
    original = {"categories": categories, "annotations": [{"id": i, "category_id": 3} for i in range(10)]}
    flipped = flip_labels.flip(original, 0.2, seed=4)
    planted = [x["id"] for x in flipped["annotations"] if x["category_id"] != 3]
    assert len(planted) == 2
    assert all(x["category_id"] == 3 for x in original["annotations"])  # left as it was
    others = [i for i in range(10) if i not in planted]
    order = [planted[0], *others, planted[1]]
    ranking = [{"annotation": str(i), "suggested": "a" if i == planted[0] else "c"} for i in order]
    lines = flip_labels.score(original, flipped, ranking)
    assert lines[0] == "2 of 10 annotations have a planted label (0.200 by chance)"
    assert "first 1: precision 1.000, recall 0.500" in lines
    assert "first 2: precision 0.500, recall 0.500" in lines
    assert lines[-1] == "the suggestion is the original class for 0.500 of the planted labels"


def test_flipping_from_the_command_line(tmp_path, capsys):
    content = {"categories": [{"id": 1, "name": "a"}], "annotations": [{"id": 1, "category_id": 1}]}
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert flip_labels.main([str(tmp_path / "one.json"), str(tmp_path / "out.json")]) == 2
    assert re.fullmatch(r"error: .*\b2\b.*\n", capsys.readouterr().err)
    content["categories"].append({"id": 2, "name": "b"})
    (tmp_path / "two.json").write_text(json.dumps(content))
    assert flip_labels.main([str(tmp_path / "two.json"), str(tmp_path / "out.json"), "--rate", "1"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["annotations"][0]["category_id"] == 2
    assert flip_labels.main([str(tmp_path / "two.json"), str(tmp_path / "out.json"), "--rate", "2"]) == 2
    assert naming("--rate", 2.0).search(capsys.readouterr().err)


def test_top_0_is_for_the_table_only(run, tmp_path):
    assert run("--num-images", 2, "--top", 0)[0] == 2
    assert run("--num-images", 2, "--top", 0, "--output", tmp_path / "found")[0] == 0
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["label_errors.csv"]
