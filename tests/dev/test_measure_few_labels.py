"""dev/measure_few_labels.py: fixed lists, a split that hides annotations, and the table of what has been trained."""

import json

import pytest
from conftest import valid_coco
from naming import naming
from PIL import Image

from dev import measure_few_labels
from dev.ablate_bccd import folder_name, has_ended
from dev.measure_few_labels import ALONE, FROZEN, LISTS, OURS, PLAN, REGIONS, ap_with_nms, main, write_split
from dn_detr_d2 import UserError
from dn_detr_d2.data import load_coco_json


def test_the_lists_are_parts_of_each_other_of_the_size_that_they_are_called():
    lists = {percent: (LISTS / f"bccd_{percent}_percent.txt").read_text().split() for percent in PLAN if percent < 100}
    assert {percent: len(names) for percent, names in lists.items()} == {5: 10, 10: 20, 20: 41}  # of 205
    assert set(lists[5]) < set(lists[10]) < set(lists[20])
    assert all(len(set(names)) == len(names) for names in lists.values())


def test_a_split_keeps_every_image_once_and_no_annotation_of_the_others(tmp_path):
    content = valid_coco()
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    first = content["images"][0]
    files = write_split(path, [first["file_name"]], tmp_path / "out")
    annotated, unlabeled = (load_coco_json(file, tmp_path) for file in files)
    of_first = [x for x in content["annotations"] if x["image_id"] == first["id"]]
    assert [len(record["annotations"]) for record in annotated] == [len(of_first)]
    assert len(unlabeled) == len(content["images"]) - 1
    assert "annotations" not in json.loads(files[1].read_text())
    with pytest.raises(UserError, match=naming("nobody.png")):
        write_split(path, ["nobody.png"], tmp_path / "out")


def finished(folder, ap):
    """A training as it lies there when it has ended."""
    folder.mkdir(parents=True)
    names = ("AP", "AP50", "AP-Platelets", "AP-RBC", "AP-WBC")
    values = {f"bbox/{name}": ap + i for i, name in enumerate(names)}
    line = {"iteration": 799, "time": 0.5, "ema/bbox/AP": ap - 10} | values
    (folder / "metrics.json").write_text(json.dumps(line) + "\n")
    (folder / "model_final.pth").touch()


def test_the_table_has_what_was_trained_and_names_what_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_few_labels, "data_overrides", lambda args, percent: {})
    (tmp_path / "data" / "bccd").mkdir(parents=True)
    (tmp_path / "data" / "bccd" / "train.json").write_text("{}")
    for seed, ap in ((1, 40.0), (2, 44.0)):
        finished(tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed{seed}", ap)
    finished(tmp_path / "runs" / f"{folder_name(f'10 percent {OURS}')}_seed2", 50.0)
    line = ["--bccd", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--report"]
    assert main([*line, "--percent", "10"]) == 0
    page = (tmp_path / "few_labels.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| 1")]
    assert rows[0][:5] == ["10 %", ALONE, "2", "42.0 (40.0 to 44.0)", "43.0 (41.0 to 45.0)"]
    assert rows[1] == ["10 %", OURS, "1", "50.0", "51.0", "52.0", "53.0", "54.0", "-", "0.50"]
    assert len(rows) == 2
    assert f"10 % {OURS} (1 of 2 seeds)" in " ".join(page.split())
    assert Image.open(tmp_path / "few_labels.png").width > 1000


COLUMNS = ("AP", "AP50", "platelets", "red cells", "white cells", "seconds an iteration")
ONE = {name: [1.0] for name in COLUMNS}


@pytest.fixture
def a_report(tmp_path, monkeypatch):
    """Reports what lies in a folder for the shares that are named; (exit code, rows of the table, results)."""
    monkeypatch.setattr(measure_few_labels, "data_overrides", lambda args, percent: {})
    (tmp_path / "data" / "bccd").mkdir(parents=True)
    (tmp_path / "data" / "bccd" / "train.json").write_text("{}")

    def report(runs, *percents):
        line = ["--bccd", str(tmp_path / "data"), "--runs", str(runs), "--output", str(tmp_path), "--report"]
        code = main([*line, "--percent", *percents])
        page = (tmp_path / "few_labels.md").read_text() if code == 0 else ""
        rows = [
            [cell.strip() for cell in row.split("|")[1:-1]]
            for row in page.splitlines()
            if row[:1] == "|" and " % " in row[:8]
        ]
        return code, rows, json.loads((tmp_path / "few_labels.json").read_text())

    return report


def test_a_report_adds_to_the_results_of_another_machine(tmp_path, a_report):
    for seed, ap in ((1, 40.0), (2, 44.0)):
        finished(tmp_path / "first" / f"{folder_name(f'10 percent {ALONE}')}_seed{seed}", ap)
    finished(tmp_path / "first" / f"{folder_name(f'10 percent {OURS}')}_seed1", 46.0)
    assert a_report(tmp_path / "first", "10")[0] == 0
    for seed, ap in ((1, 50.0), (2, 53.0)):
        finished(tmp_path / "second" / f"{folder_name(f'10 percent {OURS}')}_seed{seed}", ap)
    finished(tmp_path / "second" / f"{folder_name(f'10 percent {ALONE}')}_seed1", 60.0)
    finished(tmp_path / "second" / f"{folder_name(f'20 percent {ALONE}')}_seed1", 70.0)
    code, rows, results = a_report(tmp_path / "second", "10", "20")
    assert code == 0
    assert [row[:4] for row in rows] == [
        ["10 %", ALONE, "2", "52.0 (44.0 to 60.0)"],  # seed 1 of this machine, 2 of the other
        ["10 %", OURS, "2", "51.5 (50.0 to 53.0)"],
        ["20 %", ALONE, "1", "70.0"],
    ]
    values = {name: [50.0 + i, 53.0 + i] for i, name in enumerate(COLUMNS[:5])}
    assert results["10"][OURS] == {"seeds": [1, 2]} | values | {COLUMNS[5]: [0.5, 0.5], "AP with NMS": [None, None]}
    assert a_report(tmp_path / "second", "20") == (code, rows, results)  # whatever is named, the page is whole
    assert a_report(tmp_path / "nothing", "5") == (code, rows, results)


def leave_detections(run, data):
    """One image with two objects; the first is found twice before the second is found once."""
    boxes = [[10, 10, 20, 20], [60, 60, 30, 30]]
    truth = {"images": [{"id": 1, "width": 100, "height": 100}], "categories": [{"id": 3, "name": "cell"}]}
    truth["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    (data / "bccd" / "test.json").write_text(json.dumps(truth))
    found = [
        {"image_id": 1, "category_id": 3, "bbox": box, "score": score}
        for box, score in ((boxes[1], 0.3), (boxes[0], 0.9), ([10, 10, 20, 21], 0.8))
    ]
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(found))


def test_what_was_found_twice_is_left_out_in_a_column_of_its_own(tmp_path, a_report):
    """Without NMS half of the objects are found at precision 1, the others at 2 / 3: AP (51 + 50 * 2 / 3) / 101 = 0.835."""
    for seed in (1, 2):
        finished(tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed{seed}", 40.0)
    run = tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed2"
    leave_detections(run, tmp_path / "data")
    _, rows, results = a_report(tmp_path / "runs", "10")
    assert results["10"][ALONE]["AP with NMS"] == [None, 100.0]
    assert rows[0][-2] == "100.0, 1 of 2"
    annotations = tmp_path / "data" / "bccd" / "test.json"
    assert ap_with_nms(run, annotations, 1.0) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=0.01)
    _, rows, kept = a_report(tmp_path / "nothing", "10")  # from the file of results
    assert (rows[0][-2], kept) == ("100.0, 1 of 2", results)
    (run / "inference" / "coco_instances_results.json").unlink()
    assert a_report(tmp_path / "runs", "10")[2] == results  # the same training, of which less is left
    (run / "metrics.json").unlink()
    finished(tmp_path / "other" / run.name, 41.0)
    assert a_report(tmp_path / "other", "10")[2]["10"][ALONE]["AP with NMS"] == [None, None]  # another one
    (run / "inference" / "coco_instances_results.json").write_text("[]")
    assert ap_with_nms(run, annotations) == 0.0
    with pytest.raises(UserError, match=naming("gone.json", "--bccd")):
        ap_with_nms(run, tmp_path / "gone.json")


def test_of_results_without_seeds_all_are_reported_or_none(tmp_path, a_report):
    """Which of them a training would take the place of is not known."""
    two = {name: [1.0, 2.0] for name in COLUMNS}
    (tmp_path / "few_labels.json").write_text(json.dumps({"10": {ALONE: two, OURS: two}}))
    finished(tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed1", 40.0)
    for seed, ap in ((1, 50.0), (2, 53.0)):
        finished(tmp_path / "runs" / f"{folder_name(f'10 percent {OURS}')}_seed{seed}", ap)
    _, rows, _ = a_report(tmp_path / "runs", "10")
    assert [row[2:4] for row in rows] == [["2", "1.5 (1.0 to 2.0)"], ["2", "51.5 (50.0 to 53.0)"]]


def test_kinds_and_seeds_can_be_chosen(tmp_path, monkeypatch):
    (tmp_path / "bccd").mkdir()
    (tmp_path / "bccd" / "train.json").write_text("{}")
    calls = []

    def fake(args, name, overrides, seed):
        calls.append((name, seed, overrides.get("MODEL.WEIGHTS"), overrides.get("MODEL.FREEZE")))

    monkeypatch.setattr(measure_few_labels, "train", fake)
    monkeypatch.setattr(measure_few_labels, "data_overrides", lambda args, percent: {})
    monkeypatch.setattr(measure_few_labels, "content_of", lambda *_, **__: {})
    monkeypatch.setattr(measure_few_labels, "load_coco_json", lambda *_: [])
    line = ["--bccd", str(tmp_path), "--runs", str(tmp_path / "runs"), "--percent", "20", "100", "--seeds", "2"]
    assert main([*line, "--kinds", FROZEN, OURS]) == 2  # nothing has been trained
    start = str(tmp_path / "runs" / "model_final.pth")
    pretraining = (FROZEN, 2, None, ["backbone"])
    assert calls == [
        pretraining, (f"20 percent {FROZEN}", 2, start, None), pretraining, (f"100 percent {FROZEN}", 2, start, None)
    ]  # fmt: skip


def test_a_training_that_was_stopped_before_its_last_evaluation_has_not_ended(tmp_path, a_report):
    """model_final.pth is written before it; --resume evaluates."""
    run = tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed1"
    finished(run, 40.0)
    with (run / "metrics.json").open("a") as file:
        file.write('{"iteration": 819, "time": 0.5, "total_loss": 1.0}\n')
    finished(tmp_path / "runs" / f"{folder_name(f'10 percent {OURS}')}_seed1", 46.0)
    assert [row[1] for row in a_report(tmp_path / "runs", "10")[1]] == [OURS]
    assert has_ended(run, evaluated=False)  # as a pretraining
    assert not has_ended(tmp_path, evaluated=False)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        json.dumps({"10": {ALONE: {"AP": [1.0]}}}),
        json.dumps({"10": {ALONE: ONE | {"AP": [1.0, 2.0]}}}),
        json.dumps({"10": {ALONE: ONE | {"seeds": [1, 2]}}}),
        json.dumps({"10": {"by magic": ONE}}),
        json.dumps({"11": {ALONE: ONE}}),
    ],
    ids=["damaged", "a list", "column missing", "seeds missing", "other seeds", "unknown kind", "unknown share"],
)
def test_other_results_are_refused_and_kept(tmp_path, a_report, capsys, content):
    finished(tmp_path / "runs" / f"{folder_name(f'10 percent {ALONE}')}_seed1", 40.0)
    (tmp_path / "few_labels.json").write_text(content)
    line = ["--bccd", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--report"]
    assert main([*line, "--percent", "10"]) == 2
    assert "few_labels.json" in capsys.readouterr().err
    assert (tmp_path / "few_labels.json").read_text() == content


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    (tmp_path / "bccd").mkdir()
    (tmp_path / "bccd" / "train.json").write_text(json.dumps(valid_coco()))
    assert main(["--bccd", str(tmp_path), "--runs", str(tmp_path / "runs"), "--report"]) == 2
    assert "error: " in capsys.readouterr().err


def test_regions_of_the_training_images_are_pretrained_on_with_each_seed(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    images = tmp_path / "data" / "bccd" / "images"
    images.mkdir(parents=True)
    content = valid_coco()
    for image in content["images"]:
        picture = Image.new("RGB", (image["width"], image["height"]), (200, 200, 200))
        picture.paste((160, 20, 20), (5, 5, 15, 15))
        picture.save(images / image["file_name"])
    (images / "tested.png").write_bytes((images / content["images"][0]["file_name"]).read_bytes())
    (tmp_path / "data" / "bccd" / "train.json").write_text(json.dumps(content))
    calls = []

    def fake(args, name, overrides, seed):
        calls.append((name, overrides["DATASETS.TRAIN"], overrides["DATASETS.TEST"], seed))

    monkeypatch.setattr(measure_few_labels, "train", fake)
    line = ["--bccd", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    found = measure_few_labels.pretrained(measure_few_labels.parse_arguments(line), REGIONS, 7)
    assert found == {"MODEL.WEIGHTS": str(tmp_path / "runs" / "model_final.pth")}
    assert calls == [(REGIONS, ("bccd_regions",), (), 7)]
    written = json.loads((tmp_path / "runs" / "regions.json").read_text())
    assert [x["file_name"] for x in written["images"]] == [x["file_name"] for x in content["images"]]
    assert written["annotations"]
