"""Images without annotations: which they are, their two views, and their place in the stream."""

import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import valid_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image
from toy_training import make_cfg

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import build_train_loader
from dn_detr_d2.data.mapper import DetrDatasetMapper
from dn_detr_d2.data.registered import records_of
from dn_detr_d2.data.stream import MixedPositions, MixedStream, Positions, TrainingStream
from dn_detr_d2.data.unlabeled import (
    WEAK,
    StrongAugmentation,
    UnlabeledMapper,
    UnlabeledStream,
    images_below,
    unlabeled_records,
)
from dn_detr_d2.utils.rng import isolated_rng

SEMI = ["SEMI_SUPERVISED.ENABLED", True, "MODEL_EMA.ENABLED", True, "SEMI_SUPERVISED.BURN_IN", 1]
SEMI += ["DATASETS.UNLABELED", ("shapes_val",)]


def picture(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_folder_is_all_its_images_and_a_data_set_loses_its_annotations(tmp_path):
    for name in ("b.png", "a.JPG", "deeper/c.webp"):
        picture(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(tmp_path / "pictures"), "shapes_val"))
    found = unlabeled_records(cfg)
    assert [x["image_id"] for x in found[:3]] == ["a.JPG", "b.png", "deeper/c.webp"]
    assert len(found) == 3 + len(records_of("shapes_val"))
    assert not any("annotations" in x for x in found)


def test_folders_are_relative_to_the_data_sets(tmp_path, monkeypatch):
    picture(tmp_path / "sets" / "mine" / "a.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", ("mine",))
    assert [x["image_id"] for x in unlabeled_records(cfg)] == ["a.png"]


def test_a_coco_file_needs_no_annotations(tmp_path):
    content = valid_coco()
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    for image in content["images"]:
        picture(tmp_path / "images" / image["file_name"], (image["width"], image["height"]))
    entry = ["test_unlabeled", str(tmp_path / "test.json"), str(tmp_path / "images")]
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.COCO_JSON", [entry], "DATASETS.UNLABELED", ("test_unlabeled",))
    assert len(unlabeled_records(cfg)) == len(content["images"])
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 3  # those of the training


@pytest.mark.parametrize("missing", ["categories", "annotations", "both"])
def test_a_coco_file_lists_images_whatever_else_is_in_it(tmp_path, missing):
    """Neither categories nor annotations of such a file are used, and its sizes are not either."""
    content = valid_coco()
    for image in content["images"]:
        picture(tmp_path / "images" / image["file_name"], (40, 30))
        image["width"] = "wide"
    content["annotations"][0]["bbox"] = None
    for key in ("categories", "annotations") if missing == "both" else (missing,):
        del content[key]
    (tmp_path / "test.json").write_text(json.dumps(content))
    name = f"unlabeled_without_{missing}"
    entry = [name, str(tmp_path / "test.json"), str(tmp_path / "images")]
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.COCO_JSON", [entry], "DATASETS.UNLABELED", (name,))
    expected = [str(tmp_path / "images" / x["file_name"]) for x in sorted(content["images"], key=lambda x: x["id"])]
    assert [x["file_name"] for x in unlabeled_records(cfg)] == expected
    assert cfg.MODEL.DN_DETR.NUM_CLASSES == 3  # those of the training
    with pytest.raises(DatasetError, match=naming("test.json")):  # annotations are wanted of it
        make_cfg(tmp_path / "out", "DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", (name,))


@pytest.mark.parametrize(("change", "named"), [("image", "a.png"), ("file", "gone.json"), ("folder", "nowhere")])
def test_a_coco_file_whose_images_are_not_there_is_refused_before_anything_starts(tmp_path, change, named):
    content = {"images": [{"id": 1, "file_name": "a.png"}]}
    (tmp_path / "images").mkdir()
    if change != "image":
        picture(tmp_path / "images" / "a.png")
    (tmp_path / "set.json").write_text(json.dumps(content))
    file = tmp_path / ("gone.json" if change == "file" else "set.json")
    folder = tmp_path / ("nowhere" if change == "folder" else "images")
    entry = ["absent_images", str(file), str(folder)]
    with pytest.raises(DatasetError, match=naming(named)):
        make_cfg(tmp_path / "out", *SEMI, "DATASETS.COCO_JSON", [entry], "DATASETS.UNLABELED", ("absent_images",))


def test_links_to_images_elsewhere_are_images_of_a_folder(tmp_path):
    """A folder of links is how some of many images are chosen; no annotation file has a say in where they lead."""
    picture(tmp_path / "archive" / "a.png")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "a.png").symlink_to(tmp_path / "archive" / "a.png")
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(tmp_path / "chosen"),))
    assert [x["image_id"] for x in unlabeled_records(cfg)] == ["a.png"]


def test_sizes_of_a_coco_file_that_are_exchanged_do_no_harm(tmp_path):
    """As they are where a photograph's orientation was applied to its size, and its annotations are not used anyway."""
    content = valid_coco()
    for image in content["images"]:
        picture(tmp_path / "images" / image["file_name"], (40, 30))
        image.update(width=30, height=40)
    content["annotations"] = []
    (tmp_path / "turned.json").write_text(json.dumps(content))
    entry = ["turned_unlabeled", str(tmp_path / "turned.json"), str(tmp_path / "images")]
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.COCO_JSON", [entry], "DATASETS.UNLABELED", ("turned_unlabeled",))
    mapper = UnlabeledMapper(cfg)
    made = [mapper(record) for record in unlabeled_records(cfg)]
    assert len(made) == len(content["images"])
    assert all((x["height"], x["width"]) == (30, 40) for x in made)


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Whoever runs the tests may be root, who can read everything."""
    picture(tmp_path / "pictures" / "a.png")
    refused = PermissionError(13, "Permission denied", str(tmp_path / "pictures" / "lost+found"))
    monkeypatch.setattr("os.walk", lambda folder, onerror: onerror(refused))
    with pytest.raises(DatasetError, match=naming("lost+found", "Permission denied")):
        images_below(tmp_path / "pictures")


def test_what_is_neither_a_data_set_nor_a_folder_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=naming("shapes_vall", "shapes_val", "folder")):
        make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", ("shapes_vall",))
    with pytest.raises(ConfigError, match=naming("DATASETS.UNLABELED", "['a', 'b']")):
        make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (["a", "b"],))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(DatasetError, match=naming("empty")):
        make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(tmp_path / "empty"),))


def test_what_is_no_image_is_left_out_and_counted(tmp_path, caplog):
    """Hidden files and folders, a folder with the name of an image, and two files that cannot be read."""
    folder = tmp_path / "pictures"
    for name in ("good.png", ".hidden.png", "._good.png", ".checkpoints/copy.png"):
        picture(folder / name)
    (folder / "folder.png").mkdir()
    for name in ("bad.png", "worse.jpg"):
        (folder / name).write_text("no image")
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(folder),))
    with caplog.at_level("WARNING", "dn_detr_d2"):
        assert [x["image_id"] for x in unlabeled_records(cfg)] == ["good.png"]
    assert naming(2, "bad.png").search(caplog.text)
    (folder / "good.png").unlink()
    with pytest.raises(DatasetError, match=naming("DATASETS.UNLABELED", folder)):
        make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(folder),))


def test_images_by_any_usual_name_count_and_other_files_are_said(tmp_path, caplog):
    folder = tmp_path / "pictures"
    picture(folder / "a.png")
    (folder / "b.jfif").write_bytes(jpeg())
    Image.new("L", (20, 30)).save(folder / "c.pgm")
    for name in ("notes.txt", "data.json"):
        (folder / name).write_text("no image")
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(folder),))
    with caplog.at_level("INFO", "dn_detr_d2"):
        assert [x["image_id"] for x in unlabeled_records(cfg)] == ["a.png", "b.jfif", "c.pgm"]
    assert naming(folder, 2, "left out").search(caplog.text)


def jpeg(size=(64, 48)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def test_a_damaged_image_is_passed_over_in_the_same_way_each_time(tmp_path, caplog):
    """Its header can be read, its pixels cannot: found only when it is drawn. Alone, it ends the training by name."""
    folder = tmp_path / "pictures"
    for i in range(3):
        picture(folder / f"{i}.png", seed=i)
    (folder / "half.jpg").write_bytes(jpeg()[:900])
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.UNLABELED", (str(folder),))
    records = unlabeled_records(cfg)
    assert len(records) == 4
    stream = UnlabeledStream(records, UnlabeledMapper(cfg), 5)
    with caplog.at_level("WARNING", "dn_detr_d2"):
        drawn = [stream[position] for position in range(40)]
    assert [x["image_id"] for x in drawn].count("half.jpg") == 0
    assert {x["image_id"] for x in drawn} == {"0.png", "1.png", "2.png"}
    assert len([x for x in caplog.records if "half.jpg" in x.getMessage()]) == 1
    for position in (39, 0, 17):
        again = UnlabeledStream(records, UnlabeledMapper(cfg), 5)[position]
        assert again["image_id"] == drawn[position]["image_id"]
        assert torch.equal(again["image"], drawn[position]["image"])
    whole = [i for i in range(40) if records[stream.index(i)]["image_id"] != "half.jpg"]
    assert all(drawn[i]["image_id"] == records[stream.index(i)]["image_id"] for i in whole)
    with pytest.raises(DatasetError, match=naming("half.jpg")):
        UnlabeledStream([x for x in records if x["image_id"] == "half.jpg"], UnlabeledMapper(cfg), 5)[0]


def test_images_that_are_also_tested_on_are_counted(tmp_path, caplog):
    cfg = make_cfg(tmp_path / "out", *SEMI, "DATASETS.TEST", ("shapes_val",))
    with caplog.at_level("WARNING", "dn_detr_d2"):
        found = unlabeled_records(cfg)
    assert naming(len(found), "DATASETS.UNLABELED", "shapes_val").search(caplog.text)
    caplog.clear()
    unlabeled_records(make_cfg(tmp_path / "out", *SEMI))
    assert "DATASETS.TEST" not in caplog.text


def test_the_weak_view_is_what_an_annotated_image_becomes_and_the_strong_one_has_its_geometry(tmp_path):
    cfg, record = make_cfg(tmp_path / "out", *SEMI), records_of("shapes_val")[0]
    changed = 0
    for seed in range(20):
        with isolated_rng(seed):
            expected = DetrDatasetMapper(cfg, True)(record)["image"]
        with isolated_rng(seed):
            found = UnlabeledMapper(cfg)(record)
        assert torch.equal(found[WEAK], expected)
        assert found["image"].shape == expected.shape
        assert found["image"].dtype == torch.uint8
        assert "instances" not in found
        changed += not torch.equal(found["image"], expected)
    assert changed >= 15


def test_the_strong_view_of_bgr_is_that_of_rgb_turned_around():
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    for seed in range(10):
        with isolated_rng(seed):
            rgb = StrongAugmentation("RGB")(image)
        with isolated_rng(seed):
            bgr = StrongAugmentation("BGR")(image.flip(0))
        assert torch.equal(bgr.flip(0), rgb)


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_images_of_any_size_have_a_strong_view(height, width, seed):
    with isolated_rng(seed):
        assert StrongAugmentation("RGB")(torch.zeros(3, height, width, dtype=torch.uint8)).shape == (3, height, width)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 9), st.sampled_from([1, 2]))
def test_batches_begin_with_annotated_images_and_others_follow_after_the_burn_in(few, many, burn_in, start, world):
    """As a list that is cut: iteration t has positions B t ... of the first, U (t - burn_in) ... of the second."""
    few, many = few * world, many * world
    for rank in range(world):
        positions = MixedPositions(Positions(few, rank, world), Positions(many, rank, world), burn_in)
        positions.start = start
        for t, batch in zip(range(start, start + 5), positions, strict=False):
            first = [(0, few * t + i) for i in range(rank, few, world)]
            second = [(1, many * (t - burn_in) + i) for i in range(rank, many, world)] if t >= burn_in else []
            assert batch == first + second


def test_the_two_streams_have_orders_of_their_own_from_one_seed():
    records = [{"image_id": i} for i in range(50)]
    made = MixedStream(TrainingStream(records, dict, 3), TrainingStream(records, dict, 99))
    first, second = ([made[which, i]["image_id"] for i in range(50)] for which in (0, 1))
    assert first != second
    assert first == [TrainingStream(records, dict, 3)[i]["image_id"] for i in range(50)]
    other = MixedStream(TrainingStream(records, dict, 8), TrainingStream(records, dict, 99))
    other.reseed(3)
    assert [other[1, i]["image_id"] for i in range(50)] == second


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_where_it_is_told(tmp_path, workers):
    cfg = make_cfg(tmp_path / "out", *SEMI, "SEMI_SUPERVISED.UNLABELED_RATIO", 2, "DATALOADER.NUM_WORKERS", workers)
    whole = list(islice(build_train_loader(cfg), 4))
    assert [len(batch) for batch in whole] == [2, 6, 6, 6]
    assert [[WEAK in record for record in batch] for batch in whole[1:]] == [[False] * 2 + [True] * 4] * 3
    later = build_train_loader(cfg)
    later.seek(2)
    for expected, found in zip(whole[2:], islice(later, 2), strict=True):
        assert [x["file_name"] for x in expected] == [x["file_name"] for x in found]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(expected, found, strict=True))
