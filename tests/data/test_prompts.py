"""Known classes, and what the mapper tells a model of an image."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from naming import naming
from PIL import Image
from test_mapper import mapper

from dn_detr_d2 import ConfigError, UserError, setup_cfg
from dn_detr_d2.coco import RAW_IDS, coco_names, raw_names
from dn_detr_d2.data import class_number, evaluated_classes, split_classes
from dn_detr_d2.data.mapper import AnnotatedDatasetMapper

DENOISING = "MODEL.DN_DETR.DENOISING."
CFG = setup_cfg(str(ROOT / "configs" / "dn_detr_R50_50ep.yaml"), ["MODEL.DN_DETR.NUM_CLASSES", 80], splits=())


def configured(fraction, seed=0, classes=80, names=()):
    cfg = CFG.clone()
    cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.CLASS_NAMES = classes, list(names)
    cfg.MODEL.DN_DETR.DENOISING.KNOWN_FRACTION, cfg.MODEL.DN_DETR.DENOISING.KNOWN_SEED = fraction, seed
    return cfg


@pytest.mark.parametrize(
    ("fraction", "classes", "known"), [(0.7, 80, 56), (0.5, 80, 40), (0.7, 3, 2), (0.5, 3, 1), (0.29, 100, 29)]
)
def test_a_share_of_the_classes_is_known(fraction, classes, known):
    assert [len(part) for part in split_classes(configured(fraction, classes=classes))] == [known, classes - known]


@given(st.floats(0.1, 0.99), st.integers(0, 2**32 - 1), st.integers(11, 300))
def test_the_split_is_a_partition_and_a_function_of_the_seed(fraction, seed, classes):
    known, unknown = split_classes(configured(fraction, seed, classes))
    assert sorted(known + unknown) == list(range(classes))
    assert (known, unknown) == (sorted(known), sorted(unknown))
    assert (known, unknown) == split_classes(configured(fraction, seed, classes))


def test_the_split_of_a_seed_stays_the_same_for_ever():
    assert split_classes(configured(0.5, 7, 6)) == ([0, 3, 5], [1, 2, 4])
    assert split_classes(configured(0.5, 8, 6))[0] != [0, 3, 5]


def test_of_raw_ids_those_in_use_are_split():
    known, unknown = split_classes(configured(0.5, classes=91, names=raw_names()))
    assert sorted(known + unknown) == sorted(RAW_IDS)


@pytest.mark.parametrize(("fraction", "classes"), [(0.3, 3), (0.5, 1), (0.01, 80)])
def test_a_share_of_no_class_is_refused(fraction, classes):
    with pytest.raises(ConfigError, match=naming("KNOWN_FRACTION", fraction, classes)):
        split_classes(configured(fraction, classes=classes))


def test_evaluation_is_over_the_unknown_classes_or_those_that_are_named():
    names = ["a", "b", "c"]
    cfg = configured(0.7, 0, 3, names)
    unknown = [names[i] for i in split_classes(cfg)[1]]
    assert evaluated_classes(cfg) == unknown
    assert evaluated_classes(configured(0.7, 0, 3)) == [str(names.index(x)) for x in unknown]
    cfg.TEST.AP_CLASSES = ["b"]
    assert evaluated_classes(cfg) == ["b"]
    assert evaluated_classes(configured(0.0)) == []


@pytest.mark.parametrize(("label", "number"), [("car", 2), (2, 2), (79, 79)])
def test_a_class_has_a_name_and_a_number(label, number):
    assert class_number(label, configured(0.0, names=coco_names())) == number


@pytest.mark.parametrize("label", ["lorry", 80, -1, True, 2.0, None, "2"])
def test_classes_that_do_not_exist_are_refused(label):
    with pytest.raises(UserError, match=naming(repr(label))):
        class_number(label, configured(0.0, names=coco_names()))
    with pytest.raises(UserError):
        class_number(label, configured(0.0))


@pytest.fixture
def record(tmp_path):
    """A 60 x 40 image with objects of the classes 0, 1, 2, 2, and a crowd of class 3."""
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    boxes = [[0, 0, 30, 40], [30, 0, 30, 20], [30, 20, 30, 20], [5, 5, 10, 10], [1, 1, 9, 9]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": int(label == 3)}
        for box, label in zip(boxes, (0, 1, 2, 2, 3), strict=True)
    ]
    return {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 60, "image_id": 1, "annotations": annotations}


KNOWN = [f"{DENOISING}KNOWN_FRACTION", 0.4, f"{DENOISING}NUM_GROUPS", 1]
LABELS = [f"{DENOISING}LABEL_PROMPTS", True]


@pytest.mark.parametrize("is_train", [True, False])
def test_objects_of_known_classes_are_set_apart(toy_cfg, record, is_train):
    """In evaluation too, resized with the image; what is to be found stays out of evaluation."""
    known = split_classes(toy_cfg("dn_detr", *KNOWN))[0]
    made = mapper(toy_cfg, *KNOWN, "INPUT.MIN_SIZE_TEST", 80, is_train=is_train)(record)
    labels, scale = (0, 1, 2, 2), made["image"].shape[1] / 40
    assert scale == (1 if is_train else 2)
    assert made["known"].gt_classes.tolist() == [x for x in labels if x in known]
    boxes = [
        [x * scale for x in (x0, y0, x0 + w, y0 + h)] for x0, y0, w, h in (a["bbox"] for a in record["annotations"])
    ]
    expected = [box for box, label in zip(boxes, labels, strict=False) if label in known]
    torch.testing.assert_close(made["known"].gt_boxes.tensor, torch.tensor(expected).reshape(-1, 4))
    assert made["known"].image_size == tuple(made["image"].shape[1:])
    assert "annotations" not in made
    if is_train:
        assert made["instances"].gt_classes.tolist() == [x for x in labels if x not in known]
    else:
        assert "instances" not in made


def test_training_draws_one_of_the_classes_that_are_there_uniformly(toy_cfg, record):
    training = mapper(toy_cfg, *LABELS)
    np.random.seed(0)
    drawn = [training(record) for _ in range(300)]
    counts = [sum(x["labels"] == [label] for x in drawn) for label in range(5)]
    assert counts[3:] == [0, 0]  # a crowd is no object
    assert sum(counts) == 300
    assert min(counts[:3]) > 70  # 100 expected, standard deviation 8; objects of class 2 are two
    assert all(len(x["instances"]) == 4 for x in drawn)


def test_evaluation_is_told_all_classes_that_are_there(toy_cfg, record):
    assert mapper(toy_cfg, *LABELS, is_train=False)(record)["labels"] == [0, 1, 2]
    assert mapper(toy_cfg, *LABELS, is_train=False)(record | {"annotations": []})["labels"] == []


def test_an_image_without_objects_is_asked_for_any_class(toy_cfg, record):
    training = mapper(toy_cfg, *LABELS)
    drawn = {training(record | {"annotations": []})["labels"][0] for _ in range(100)}
    assert drawn == {0, 1, 2, 3, 4}


def test_diagnostics_are_told_known_objects_and_no_labels(toy_cfg, record):
    assert "known" in AnnotatedDatasetMapper(toy_cfg("dn_detr", *KNOWN))(record)
    made = AnnotatedDatasetMapper(toy_cfg("dn_detr", *LABELS))(record)
    assert "labels" not in made
    assert len(made["instances"]) == 4


def test_without_prompts_records_are_as_ever(toy_cfg, record):
    assert {"known", "labels"}.isdisjoint(mapper(toy_cfg)(record))
    assert "instances" not in mapper(toy_cfg, is_train=False)(record)


def test_classes_of_ap_that_the_model_has_not_are_refused_before_a_training():
    data = ["DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",)]
    with pytest.raises(ConfigError, match=naming("TEST.AP_CLASSES", "'squares'", "'rectangle'")):
        setup_cfg("", [*data, "TEST.AP_CLASSES", ["circle", "squares"]])
    assert setup_cfg("", [*data, "TEST.AP_CLASSES", ["circle"]]).TEST.AP_CLASSES == ["circle"]
