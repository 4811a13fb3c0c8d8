"""COCO sets that Detectron2 registers: its records, with the guards of our reader."""

import copy
import json

import pytest
import torch
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, register_coco_instances
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image

from dn_detr_d2 import DatasetError, doctor, setup_cfg
from dn_detr_d2.coco import NUM_RAW_CLASSES, RAW_IDS, coco_names
from dn_detr_d2.config import load_config
from dn_detr_d2.data import build_probe_loader, build_test_loader, build_train_loader, check_records, records_of
from dn_detr_d2.engine import Trainer

CATEGORIES = [{"id": i, "name": name} for i, name in zip(RAW_IDS, coco_names(), strict=True)]
PRESENT = [1, 13, 90]  # person, stop sign, toothbrush
CORNERS = torch.tensor([[5.0, 5, 25, 25], [30, 5, 50, 25], [30, 30, 55, 55]])


def content(**changes):
    """An annotation file as COCO's are, with changes; ids are not in order."""
    boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in CORNERS.tolist()]
    polygon = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0]]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (139, 25)],
        "annotations": [
            {
                "id": 9 - i,
                "image_id": 25,
                "category_id": c,
                "bbox": b,
                "area": 400,
                "iscrowd": 0,
                "segmentation": polygon,
            }
            for i, (c, b) in enumerate(zip(PRESENT, boxes, strict=True))
        ],
        "categories": CATEGORIES[::-1],
    } | changes


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """coco(set, **changes) -> its name; Detectron2's catalogs with its COCO sets below a folder of this test."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    builtin.register_all_coco(str(tmp_path))
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (80, 60)).save(tmp_path / "secret.png")

    def make(name="coco_2017_val", text=None, **changes):
        files = MetadataCatalog.get(name)
        for folder in ("annotations", files.image_root.rsplit("/")[-1]):
            (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
        for i in (139, 25):
            Image.new("RGB", (80, 60)).save(f"{files.image_root}/{i}.png")
        (tmp_path / files.json_file).write_text(text or json.dumps(content(**changes)))
        return name

    return make


def config(name, num_classes=80):
    opts = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0]
    opts += [
        "SOLVER.IMS_PER_BATCH",
        1,
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        True,
        "INPUT.CROP.ENABLED",
        False,
        "MODEL.DN_DETR.NUM_CLASSES",
        num_classes,
    ]
    return setup_cfg(str(ROOT / "configs" / "dn_detr_R50_12ep.yaml"), opts)


def read_by_the_doctor(name):
    raise DatasetError(doctor._data_set(name, load_config()))


DOORS = {
    "training": lambda name: build_train_loader(config(name)),
    "test": lambda name: build_test_loader(config(name), name),
    "probe": lambda name: build_probe_loader(config(name), name),
    "before anything starts": check_records,
    "doctor": read_by_the_doctor,
}
OUTSIDE = [{"id": i, "file_name": "../../secret.png", "width": 80, "height": 60} for i in (139, 25)]


@pytest.mark.parametrize("read", DOORS.values(), ids=DOORS)
def test_an_image_outside_the_folder_is_refused(coco, read):
    with pytest.raises(DatasetError, match=naming("instances_val2017.json", "'../../secret.png'")):
        read(coco(images=OUTSIDE))


@pytest.mark.parametrize("read", DOORS.values(), ids=DOORS)
def test_a_file_that_is_cut_off_is_named(coco, read):
    with pytest.raises(DatasetError, match=naming("instances_val2017.json", "JSON")):
        read(coco(text=json.dumps(content())[:500]))


def test_a_missing_file_is_named_with_the_way_out(coco):
    with pytest.raises(DatasetError, match=naming("instances_val2017.json", "DETECTRON2_DATASETS")):
        records_of("coco_2017_val")


def test_records_and_metadata_are_those_of_detectron2(coco):
    name = coco()
    ours = records_of(name)
    metadata = MetadataCatalog.get(name).as_dict()
    theirs = DatasetCatalog.get(name)
    for record in theirs:
        for annotation in record["annotations"]:
            del annotation["segmentation"]
    assert [annotation.pop("id") for record in ours for annotation in record["annotations"]] == [9, 8, 7]
    assert [annotation.pop("area") for record in ours for annotation in record["annotations"]] == [400, 400, 400]
    assert ours == theirs
    assert metadata == MetadataCatalog.get(name).as_dict()
    known = _get_builtin_metadata("coco")
    assert {key: metadata[key] for key in known} == known


def test_other_categories_than_those_of_the_set_are_refused(coco):
    renamed = [*CATEGORIES[:-1], {"id": 90, "name": "brush"}]
    known = copy.deepcopy(MetadataCatalog.get(coco(categories=renamed)).as_dict())
    with pytest.raises(
        DatasetError, match=naming("instances_val2017", "(90, 'brush')", "(90, 'toothbrush')", "COCO_JSON")
    ):
        records_of("coco_2017_val")
    assert MetadataCatalog.get("coco_2017_val").as_dict() == known


@pytest.mark.parametrize(("num_classes", "expected"), [(NUM_RAW_CLASSES, PRESENT), (80, [0, 11, 79])])
def test_perfect_detections_have_full_ap_with_raw_and_contiguous_ids(coco, num_classes, expected):
    name = coco()
    cfg = config(name, num_classes)
    batch = next(iter(build_train_loader(cfg)))
    assert batch[0]["instances"].gt_classes.tolist() == expected
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator._output_dir = None
    evaluator.reset()
    for [image] in build_test_loader(cfg, name):
        count = 3 if image["image_id"] == 25 else 0
        found = Instances((60, 80), pred_boxes=Boxes(CORNERS[:count]), scores=torch.ones(count))
        found.pred_classes = torch.tensor(expected[:count], dtype=torch.int64)
        evaluator.process([image], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_a_published_test_set_has_no_annotations(coco):
    whole = content()
    del whole["annotations"]
    name = coco("coco_2017_test-dev", json.dumps(whole))
    assert [x["image_id"] for [x] in build_test_loader(config(name), name)] == [25, 139]
    assert "annotations" not in Trainer.build_evaluator(config(name), name)._coco_api.dataset


def test_ids_may_be_doubled_in_the_minival_of_2014_alone(coco):
    doubled = content()["annotations"] * 2
    assert len(records_of(coco("coco_2014_minival", annotations=doubled))[0]["annotations"]) == 6
    with pytest.raises(DatasetError, match=naming("annotation ids")):
        records_of(coco("coco_2014_val", annotations=doubled))


def test_a_set_that_a_user_gives_to_detectron2_gets_its_classes(coco, tmp_path):
    coco(categories=[{"id": 13, "name": "sign"}, {"id": 90, "name": "brush"}, {"id": 1, "name": "man"}])
    files = MetadataCatalog.get("coco_2017_val")
    register_coco_instances("test_given", {}, files.json_file, files.image_root)
    assert [x["category_id"] for x in records_of("test_given")[0]["annotations"]] == [0, 1, 2]
    assert MetadataCatalog.get("test_given").thing_classes == ["man", "sign", "brush"]
    assert MetadataCatalog.get("test_given").thing_dataset_id_to_contiguous_id == {1: 0, 13: 1, 90: 2}


def test_a_function_of_the_user_is_asked_itself(coco):
    files = MetadataCatalog.get(coco())
    DatasetCatalog.register("test_own", lambda: [{"file_name": "x", "image_id": 1, "annotations": []}])
    own = {"json_file": files.json_file, "image_root": files.image_root, "evaluator_type": "coco"}
    MetadataCatalog.get("test_own").set(**own)
    assert records_of("test_own") == [{"file_name": "x", "image_id": 1, "annotations": []}]


def test_a_set_without_images_is_refused(coco):
    DatasetCatalog.register("test_nothing", list)
    with pytest.raises(DatasetError, match=naming("'test_nothing'")):
        build_test_loader(config(coco()), "test_nothing")
