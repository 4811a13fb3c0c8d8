"""File names that are not UTF-8, which Linux permits, in what the programs print, log and write."""

import csv
import json
import logging
import os

import pytest
import torch
from detectron2.utils.logger import setup_logger
from PIL import Image
from ranks import run_program

from dn_detr_d2.utils.text_output import escape_unwritable, escaped

NAME = os.fsdecode(b"\xff.png")


@pytest.fixture
def folder(tmp_path):
    """A folder with an image of such a name and a data set of it."""
    made = tmp_path / "images"
    made.mkdir()
    try:
        Image.new("RGB", (64, 48), (90, 20, 30)).save(made / NAME)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    content = {
        "images": [{"id": 1, "file_name": NAME, "width": 64, "height": 48}],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(1, 6)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 9, 9]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [8, 4, 90, 9]},  # one sticks out, which is logged
        ],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    return made


def program(*arguments):
    """(exit code, stdout, stderr) of a program of this project, with a terminal of strict UTF-8."""
    ran = run_program(*arguments)
    return ran.returncode, ran.stdout, ran.stderr


def test_what_utf8_writes_stays_as_it_is():
    assert escaped("Straße 你好") == "Straße 你好"
    assert escaped(f"a/{NAME}") == "a/\\udcff.png"


def test_a_log_file_takes_every_name(tmp_path):
    logger = setup_logger(str(tmp_path), name="dn_detr_d2")
    escape_unwritable("dn_detr_d2")
    logger.warning("image %s", NAME)
    for handler in logger.handlers:
        handler.flush()
    assert "image \\udcff.png" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    logging.getLogger("dn_detr_d2").handlers.clear()


def test_check_dataset_names_it(folder, tmp_path):
    code, said, errors = program(
        "tools/check_dataset.py", tmp_path / "set.json", folder, "--fix", tmp_path / "new.json"
    )
    assert "Traceback" not in errors
    assert code == 0, errors
    assert json.loads((tmp_path / "new.json").read_text())["images"][0]["file_name"] == NAME
    code, said, errors = program("tools/check_dataset.py", tmp_path / "set.json", folder)
    assert (code, errors) == (1, "")
    assert "\\udcff.png" in said


@pytest.fixture
def finished(toy_cfg, toy_model, tmp_path):
    """config.yaml and model.pth of a toy model."""
    cfg = toy_cfg("dn_deformable_detr", "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": toy_model("dn_deformable_detr").state_dict()}, tmp_path / "model.pth")
    return tmp_path / "config.yaml", tmp_path / "model.pth"


def test_demo_draws_and_names_it(folder, finished, tmp_path):
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    arguments = ["--config-file", finished[0], "--input", folder, "--output", tmp_path / "out", "--json"]
    arguments += ["--confidence-threshold", 0, "--opts", "MODEL.WEIGHTS", finished[1]]
    code, said, errors = program("demo.py", *arguments)
    assert code == 1  # the other file is no image
    assert "Traceback" not in errors
    assert "\\udcff.png: " in said
    assert "\\udcfe.png" in errors
    assert os.path.exists(os.fsencode(tmp_path / "out") + b"/\xff.png")
    assert {NAME} == {os.path.basename(x["file_name"]) for x in json.loads((tmp_path / "out/results.json").read_text())}


def test_label_errors_of_it_are_tabled(folder, finished, tmp_path):
    listed = json.dumps([["odd_names", str(tmp_path / "set.json"), str(folder)]])
    arguments = ["--config-file", finished[0], "--weights", finished[1], "--dataset", "odd_names"]
    arguments += ["--output", tmp_path / "found", "DATASETS.COCO_JSON", listed]
    code, _, errors = program("tools/find_label_errors.py", *arguments)
    assert code == 0, errors
    assert "Traceback" not in errors
    with (tmp_path / "found/label_errors.csv").open(encoding="utf-8", newline="") as file:
        assert {os.path.basename(row["file_name"]) for row in csv.DictReader(file)} == {"\\udcff.png"}


def test_a_training_on_it_logs_and_ends(folder, tmp_path):
    from toy_training import command

    listed = json.dumps([["odd_train", str(tmp_path / "set.json"), str(folder)]])
    options = ["DATASETS.COCO_JSON", listed, "DATASETS.TRAIN", "('odd_train',)", "DATASETS.TEST", "('odd_train',)"]
    code, said, errors = program(*command(tmp_path / "out", overrides=[*options, "SOLVER.MAX_ITER", 3]))
    assert code == 0, errors[-2000:]
    assert "Logging error" not in errors
    assert "\\udcff.png, annotation 2" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "\\udcff.png, annotation 2" in said + errors
