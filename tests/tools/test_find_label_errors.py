"""tools/find_label_errors.py from the command line to the pictures."""

import csv

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from naming import naming
from PIL import Image

from dn_detr_d2.diagnostics import Suspicion
from dn_detr_d2.diagnostics.label_errors import COLUMNS, as_rows, write_report
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


def read_table(folder):
    """kind -> rows of label_errors.csv."""
    kinds = {}
    with (folder / "label_errors.csv").open() as file:
        for row in csv.DictReader(file):
            kinds.setdefault(row["kind"], []).append(row)
    return kinds


def test_table_file_and_pictures(run, tmp_path):
    out = tmp_path / "found"
    code, stdout, stderr = run("--num-images", 8, "--top", 3, "--output", out)
    assert (code, stderr) == (0, "")
    records = [record for record in DatasetCatalog.get("shapes_val") if record["image_id"] % 25 == 0]
    annotations = {x["id"]: x for record in records for x in record["annotations"]}
    kinds = read_table(out)
    assert list(kinds) == ["class", "box", "spurious", "missing"]
    for kind in ("class", "box", "spurious"):
        assert {int(row["annotation"]) for row in kinds[kind]} == set(annotations)
        assert len(kinds[kind]) == len(annotations)
    names = ("circle", "rectangle", "triangle")
    for kind, rows in kinds.items():
        scores = [float(row["score"]) for row in rows]
        assert scores == sorted(scores, reverse=True), kind
        for row in rows:
            if kind == "missing":
                assert (row["annotation"], row["label"], row["x0"]) == ("", "", "")
                assert row["suggested"] in names
                continue
            annotation = annotations[int(row["annotation"])]
            assert row["label"] == names[annotation["category_id"]]
            x, y, w, h = annotation["bbox"]
            assert [float(row[key]) for key in ("x0", "y0", "x1", "y1")] == pytest.approx([x, y, x + w, y + h], abs=0.2)
    assert all(row["label"] != row["suggested"] for row in kinds["class"])
    assert all(row["suggested_x0"] for kind in ("box", "missing") for row in kinds[kind])
    assert not any(row["suggested_x0"] for kind in ("class", "spurious") for row in kinds[kind])
    pictures = {picture.name for picture in out.glob("*.png")}
    wanted = {f"class_{i:04d}_{row['label']}_or_{row['suggested']}.png" for i, row in enumerate(kinds["class"][:3], 1)}
    wanted |= {
        f"{kind}_{i:04d}_{row['label']}.png" for kind in ("box", "spurious") for i, row in enumerate(kinds[kind][:3], 1)
    }
    wanted |= {f"missing_{i:04d}_{row['suggested']}.png" for i, row in enumerate(kinds["missing"][:3], 1)}
    assert pictures == wanted
    assert all(min(Image.open(out / name).size) == 480 for name in pictures)
    doubted = sum(float(row["score"]) > 0 for row in kinds["class"])
    assert f"{len(annotations)} annotations; for {doubted} of them another class is likelier" in stdout


def test_a_second_report_leaves_no_pictures_of_the_first(run, tmp_path):
    out = tmp_path / "found"
    assert run("--num-images", 2, "--top", 2, "--output", out)[0] == 0
    (out / "mine.png").write_text("kept")
    assert run("--num-images", 2, "--top", 1, "--kinds", "missing", "--output", out)[0] == 0
    names = {path.name for path in out.glob("*.png")}
    assert "mine.png" in names
    assert [name.split("_")[:2] for name in names - {"mine.png"}] == [["missing", "0001"]]


@pytest.mark.parametrize("name", ["a" * 300, "ä" * 200, "a\nb", "a\0b", "../../up", "a b/c\\d:e*?"])
def test_pictures_of_any_class_have_a_file_name(tmp_path, name):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    values = {"kind": "class", "score": 0.5, "file_name": str(tmp_path / "a.png"), "label": name, "suggested": name}
    rows = [dict.fromkeys(COLUMNS, "") | values | {"x0": 1, "y0": 1, "x1": 9, "y1": 9}]
    write_report(rows, 1, tmp_path / "out" / "deep")
    assert {path.suffix for path in (tmp_path / "out" / "deep").iterdir()} == {".png", ".csv"}
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def test_a_folder_that_cannot_be_made_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, said = run("--num-images", 1, "--top", 1, "--output", tmp_path / "file" / "out")
    assert code == 2
    assert naming(tmp_path / "file" / "out").search(said)
    assert "Traceback" not in said


def test_one_kind_alone(run, tmp_path):
    code, stdout, _ = run("--num-images", 2, "--top", 1, "--kinds", "missing", "--output", tmp_path / "found")
    assert code == 0
    assert list(read_table(tmp_path / "found")) == ["missing"]
    assert "another class" not in stdout


def test_a_model_without_boxes_judges_classes(run, tmp_path):
    out = tmp_path / "found"
    assert run("--num-images", 2, "--top", 1, "--output", out, system="mask2former")[0] == 0
    assert list(read_table(out)) == ["class"]


def test_a_model_of_one_class_judges_boxes(tmp_path, toy_model, toy_cfg, capsys):
    one = ["MODEL.DN_DETR.NUM_CLASSES", 1, "INPUT.MIN_SIZE_TEST", 48, "DATALOADER.NUM_WORKERS", 0]
    records = [record for record in DatasetCatalog.get("shapes_val")[:3] if record["annotations"]]
    for record in records:
        record["annotations"] = [x | {"category_id": 0} for x in record["annotations"]]
    DatasetCatalog.register("test_one_class", lambda: records)
    MetadataCatalog.get("test_one_class").thing_classes = ["shape"]
    try:
        (tmp_path / "config.yaml").write_text(toy_cfg("dn_detr", *one).dump())
        torch.save({"model": toy_model("dn_detr", *one).state_dict()}, tmp_path / "model.pth")
        given = ["--config-file", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth")]
        assert find_label_errors.main([*given, "--dataset", "test_one_class", "--output", str(tmp_path / "found")]) == 0
    finally:
        DatasetCatalog.remove("test_one_class")
        MetadataCatalog.remove("test_one_class")
    assert list(read_table(tmp_path / "found")) == ["box", "spurious", "missing"]


def test_a_crowd_is_not_missing():
    box, record = [10.0, 10, 30, 30], {"image_id": 1, "file_name": "a.png"}
    crowd = {"id": 1, "bbox": [0, 0, 40, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
    judged = [Suspicion("missing", 1, 0.9, suggested=0, suggested_box=box)]
    DatasetCatalog.register("test_crowd", lambda: [record | {"annotations": [crowd]}])
    try:
        assert as_rows(judged, ["a"], "test_crowd") == []
        crowd["bbox"] = [0, 0, 40, 19]  # less than half of the box
        assert [row["suggested"] for row in as_rows(judged, ["a"], "test_crowd")] == ["a"]
        crowd |= {"bbox": [0, 0, 40, 40], "iscrowd": 0}
        assert len(as_rows(judged, ["a"], "test_crowd")) == 1
        crowd |= {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 1}
        assert len(as_rows(judged, ["a"], "test_crowd")) == 1
        crowd["bbox"] = [10, 10, 30, 20]  # as width and height it would be another place
        assert as_rows(judged, ["a"], "test_crowd") == []
    finally:
        DatasetCatalog.remove("test_crowd")


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


def test_top_0_is_for_the_table_only(run, tmp_path):
    assert run("--num-images", 2, "--top", 0)[0] == 2
    assert run("--num-images", 2, "--top", 0, "--output", tmp_path / "found")[0] == 0
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["label_errors.csv"]
