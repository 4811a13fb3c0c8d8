"""Regions that look like objects, on drawn discs whose boxes are known, and the file that is written of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import naming
from PIL import Image
from torchvision.ops import box_iou

from dn_detr_d2.data import load_coco_json
from dn_detr_d2.data.regions import propose_regions
from tools.propose_regions import main

pytest.importorskip("skimage")
DISCS = [(60, 50, 22), (150, 80, 30), (230, 160, 25), (70, 170, 34)]  # centre and radius


def scene(discs=DISCS, size=(300, 220), scale=1):
    """A grey ground with a little noise, and discs of different colours on it."""
    width, height = size
    y, x = np.mgrid[: height * scale, : width * scale] / scale
    pixels = np.full((height * scale, width * scale, 3), 200.0)
    for i, (cx, cy, radius) in enumerate(discs):
        pixels[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = [
            (200, 40, 40),
            (40, 160, 40),
            (40, 40, 180),
            (90, 20, 90),
        ][i]
    noise = np.random.default_rng(0).normal(0, 3, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [1, 3])
def test_discs_are_the_first_regions(scale):
    boxes, scores = propose_regions(scene(scale=scale))
    wanted = torch.tensor([[cx - r, cy - r, cx + r, cy + r] for cx, cy, r in DISCS], dtype=torch.float64) * scale
    overlap = box_iou(wanted, torch.from_numpy(boxes[:4]))
    assert (overlap.max(1).values > 0.8).all()
    assert (np.diff(scores) <= 0).all()


def test_no_more_regions_than_wanted_and_no_two_of_the_same_place():
    boxes, _ = propose_regions(scene(), top=3)
    assert len(boxes) == 3
    boxes, _ = propose_regions(scene(), top=100, overlap=0.5)
    overlap = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(0)
    assert overlap.max() <= 0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64)])
def test_an_image_without_anything_has_no_region(size):
    boxes, scores = propose_regions(np.full((*size, 3), 128, np.uint8))
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


def test_the_file_is_a_training_set_of_one_class(tmp_path, capsys):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    Image.fromarray(scene()).save(tmp_path / "images" / "a.png")
    Image.fromarray(scene(DISCS[:1])).save(tmp_path / "images" / "b.png")
    assert main([str(tmp_path / "images"), str(tmp_path / "all.json"), "--top", "4"]) == 0
    records = load_coco_json(tmp_path / "all.json", tmp_path / "images")
    assert [len(record["annotations"]) for record in records] == [4, 1]
    assert {x["category_id"] for record in records for x in record["annotations"]} == {0}
    cx, cy, r = DISCS[0]
    assert records[1]["annotations"][0]["bbox"] == pytest.approx([cx - r, cy - r, 2 * r, 2 * r], abs=4)
    assert "5 regions of 2 images" in capsys.readouterr().out

    one = {"images": [{"id": 9, "file_name": "b.png"}], "categories": [{"id": 1, "name": "x"}], "annotations": []}
    (tmp_path / "one.json").write_text(json.dumps(one))
    line = [str(tmp_path / "images"), str(tmp_path / "out.json"), "--only", str(tmp_path / "one.json")]
    assert main(line) == 0
    assert [x["file_name"] for x in json.loads((tmp_path / "out.json").read_text())["images"]] == ["b.png"]


def test_annotations_are_not_overwritten_and_what_cannot_be_read_is_counted(tmp_path, capsys):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")
    only = {"images": [{"id": 9, "file_name": "a.png"}], "categories": [{"id": 1, "name": "x"}], "annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(only))
    before = (tmp_path / "train.json").read_bytes()
    assert main([str(tmp_path), str(tmp_path / "train.json"), "--only", str(tmp_path / "train.json")]) == 2
    assert (tmp_path / "train.json").read_bytes() == before
    capsys.readouterr()
    assert main([str(tmp_path), str(tmp_path / "out.json")]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())["images"]) == 1


@pytest.mark.parametrize("line", [
    ["missing", "out.json"], [".", "out.json", "--top", "0"], [".", "nowhere/out.json"], [".", "."],
])  # fmt: skip
def test_bad_input_is_refused(line, tmp_path, monkeypatch, capsys):
    """Before any image is looked at."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene()).save(tmp_path / "a.png")
    assert main(line) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out.json").exists()


def test_the_file_names_no_image_that_a_training_would_refuse(tmp_path, capsys):
    """A link that leads out of the image folder."""
    (tmp_path / "images").mkdir()
    for name in ("images/a.png", "elsewhere.png"):
        Image.fromarray(scene()).save(tmp_path / name)
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "elsewhere.png")
    assert main([str(tmp_path / "images"), str(tmp_path / "all.json")]) == 1
    assert naming("left out", "b.png", "elsewhere.png").search(capsys.readouterr().err)
    assert [Path(x["file_name"]).name for x in load_coco_json(tmp_path / "all.json", tmp_path / "images")] == ["a.png"]
