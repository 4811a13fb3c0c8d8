import copy
import json
import logging

import pytest
from conftest import ROOT, valid_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError, setup_cfg
from dn_detr_d2.data import build_annotated_batch, build_probe_loader, build_test_loader, build_train_loader
from dn_detr_d2.data.loader import in_model_order, probe_records
from dn_detr_d2.data.summary import log_summary, summarise

SHAPES = [
    "MODEL.DN_DETR.NUM_CLASSES",
    "auto",
    "DATASETS.TRAIN",
    ("shapes_train",),
    "DATASETS.TEST",
    ("shapes_val",),
    "DATALOADER.NUM_WORKERS",
    0,
]
SHAPES += ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.CROP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 4]


@pytest.mark.parametrize(("filtered", "word"), [(True, "left out"), (False, "trained on")])
def test_images_without_boxes_are_counted_in_the_log(toy_cfg, caplog, filtered, word):
    cfg = toy_cfg("dn_detr", *SHAPES, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
    empty = sum(not r["annotations"] for r in DatasetCatalog.get("shapes_train"))
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        loader = build_train_loader(cfg)
    assert naming(filtered, f"{empty} of 1200", word).search(caplog.text)
    assert len(next(iter(loader))) == 4


@pytest.mark.parametrize("filtered", [True, False])
def test_a_set_without_any_box_is_refused(toy_cfg, filtered):
    name = f"test_blank_{filtered}"
    DatasetCatalog.register(name, lambda: [{"file_name": "x", "image_id": 1, "annotations": []}])
    cfg = toy_cfg("dn_detr", *SHAPES, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(DatasetError, match=naming("box")):
        build_train_loader(cfg)


def test_evaluation_sees_every_image_once(toy_cfg):
    loader = build_test_loader(toy_cfg("dn_detr", *SHAPES), "shapes_val")
    ids = [x["image_id"] for batch in loader for x in batch]
    assert sorted(ids) == [r["image_id"] for r in DatasetCatalog.get("shapes_val")]


def test_a_probe_shows_the_same_annotated_images_each_time_as_evaluation_shows_them(toy_cfg):
    cfg = toy_cfg("dn_detr", *SHAPES, "INPUT.MIN_SIZE_TEST", 48, "INPUT.RANDOM_FLIP", "horizontal")
    shown = {x["image_id"]: x["image"] for [x] in build_test_loader(cfg, "shapes_val")}
    annotated = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("shapes_val")}
    loader = build_probe_loader(cfg, "shapes_val", 8)
    for _ in range(2):
        batches = list(loader)
        assert [[x["image_id"] for x in batch] for batch in batches] == [[i * 25] for i in range(8)]
        for [x] in batches:
            assert x["image"].equal(shown[x["image_id"]])
            wanted = [annotation["category_id"] for annotation in annotated[x["image_id"]]]
            assert x["instances"].gt_classes.tolist() == wanted
            assert x["instances"].gt_index.tolist() == list(range(len(wanted)))


def test_zero_or_too_many_probe_images_are_all(toy_cfg):
    cfg = toy_cfg("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 3)
    for wanted in (0, 500):
        ids = [record["image_id"] for record in probe_records(cfg, "shapes_val", wanted)]
        assert ids == sorted(record["image_id"] for record in DatasetCatalog.get("shapes_val"))


def test_crowds_and_degenerate_boxes_are_no_targets_of_a_probe(toy_cfg):
    record = copy.deepcopy(next(r for r in DatasetCatalog.get("shapes_val") if len(r["annotations"]) >= 3))
    record["annotations"][0]["iscrowd"] = 1
    record["annotations"][1]["bbox"][2] = 0.0
    DatasetCatalog.register("test_crowd", lambda: [record])
    try:
        [batch] = build_probe_loader(toy_cfg("dn_detr", *SHAPES), "test_crowd", 1)
        assert batch[0]["instances"].gt_index.tolist() == list(range(2, len(record["annotations"])))
    finally:
        DatasetCatalog.remove("test_crowd")


def test_a_probe_without_any_box_is_refused(toy_cfg):
    DatasetCatalog.register("test_blank_probe", lambda: [{"file_name": "x", "image_id": 1, "annotations": []}])
    try:
        with pytest.raises(DatasetError, match=naming(1, "'test_blank_probe'")):
            build_probe_loader(toy_cfg("dn_detr", *SHAPES), "test_blank_probe", 1)
    finally:
        DatasetCatalog.remove("test_blank_probe")


def test_a_batch_for_checks_has_boxes_in_each_image(toy_cfg):
    batch = build_annotated_batch(toy_cfg("dn_detr", *SHAPES), "shapes_train", 3)
    assert len(batch) == 3
    assert all(len(x["instances"]) for x in batch)


def test_a_training_starts_with_a_summary_that_a_second_start_takes_from_the_cache(toy_cfg, caplog, monkeypatch):
    cfg = toy_cfg("dn_detr", *SHAPES, "MODEL.DN_DETR.NUM_QUERIES", 3)
    records = DatasetCatalog.get("shapes_train")
    boxes = sum(len(r["annotations"]) for r in records)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "dn_detr_d2"):
            build_train_loader(cfg)
        empty = sum(not r["annotations"] for r in records)
        assert any(naming("shapes_train", 1200, empty, boxes).search(text) for text in caplog.messages)
        assert naming("4 objects", "NUM_QUERIES", 3).search(caplog.text)
        monkeypatch.setattr("dn_detr_d2.data.summary.summarise", lambda records: pytest.fail("made a second time"))
    elsewhere = [record | {"file_name": f"/elsewhere/{record['image_id']}.bmp"} for record in records]
    caplog.clear()
    log_summary("shapes_train", elsewhere, 3)
    assert "/elsewhere/" in caplog.text  # the same annotations of images in another folder


def test_the_summary_of_a_part_of_a_file_is_not_that_of_the_whole(caplog):
    """A function of the user's returns a part, and the metadata name the whole file."""
    records = DatasetCatalog.get("shapes_train")
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        found = [log_summary("shapes_train", part, 3) for part in (records, records[:2], records)]
    assert found[1] == sum(len(record["annotations"]) for record in records[:2]) < found[0] == found[2]
    assert any(naming("2 images").search(text) for text in caplog.messages)


def test_a_summary_counts_what_the_mapper_will_do():
    boxes = [[1, 1, 5, 5], [1, 1, -5, 5], [50, 50, 5, 5], [-5, 1, 20, 5], [float("nan"), 1, 5, 5]]
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for box in boxes]
    annotations.append(annotations[0] | {"iscrowd": 1})
    found = summarise(
        [{"file_name": "x.png", "height": 20, "width": 30, "annotations": annotations}, {"file_name": "y"}]
    )
    assert (found["boxes"], found["crowds"], found["empty"], found["fullest_at"]) == (5, 1, 1, 0)
    assert list(found["problems"].values()) == [1, 1, 1, 1]


def config_of(folder, name, content):
    """The config of a training on an annotation file of the two pictures of :func:`conftest.valid_coco`."""
    for picture in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(folder / picture)
    (folder / "set.json").write_text(json.dumps(content))
    opts = ["DATASETS.COCO_JSON", [[name, str(folder / "set.json"), str(folder)]], "DATASETS.TRAIN", (name,)]
    return setup_cfg(str(ROOT / "configs" / "quickstart.yaml"), [*opts, "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"])


def test_boxes_of_which_none_can_be_trained_on_are_refused(tmp_path):
    """As dn-detr check says; a training on nothing would run to its end."""
    content = valid_coco()
    for annotation, box in zip(content["annotations"], ([1, 2, 0, 0], [50, 50, 5, 5], [1, 1, 4, -1]), strict=True):
        annotation["bbox"] = box
    cfg = config_of(tmp_path, f"degenerate_{tmp_path.name}", content)
    with pytest.raises(DatasetError, match=naming("box")):
        build_train_loader(cfg)


def test_records_get_the_numbers_that_the_model_gives_to_their_classes():
    """Square, circle and a class of the model that the data set does not have; annotations stay as they are."""
    own = MetadataCatalog.get("shapes_val").thing_classes
    records = DatasetCatalog.get("shapes_val")[:20]
    before = copy.deepcopy(records)
    order = ["moon", *own[::-1]]
    moved = in_model_order(records, "shapes_val", order)
    assert records == before
    for old, new in zip(before, moved, strict=True):
        names = [own[x["category_id"]] for x in old["annotations"]]
        assert [order[x["category_id"]] for x in new["annotations"]] == names
    assert in_model_order(records, "shapes_val", list(own)) is records
    with pytest.raises(DatasetError, match=naming("NUM_CLASSES")):
        in_model_order(records, "shapes_val", order[:2])
    assert in_model_order([{"annotations": []}], "shapes_val", order[:2]) == [{"annotations": []}]  # nothing has it


def test_crowds_alone_are_refused_as_that(tmp_path):
    content = valid_coco()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    cfg = config_of(tmp_path, f"crowds_{tmp_path.name}", content)
    with pytest.raises(DatasetError, match=naming("3 annotations")):
        build_train_loader(cfg)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_images_for_a_gpu_are_read_into_pinned_memory(toy_cfg, device, sampler):
    cfg = toy_cfg("dn_detr", *SHAPES, "DATALOADER.SAMPLER_TRAIN", sampler).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device  # without the check that there is one
    loaders = [build_train_loader(cfg), build_test_loader(cfg, "shapes_val")]
    for loader in loaders:
        while not hasattr(loader, "pin_memory"):
            loader = loader.dataset
        assert loader.pin_memory == (device == "cuda")
