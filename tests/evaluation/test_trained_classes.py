"""A model is evaluated with the classes that it was trained on, whatever classes the test set lists, and in which order."""

import json

import pytest
import torch
from conftest import ROOT, SYSTEMS
from detectron2.modeling import build_model
from naming import naming
from PIL import Image
from toy_training import CASCADE, MASKS, OPTIONS, RCNN

from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.checkpoint.checkpointer import Checkpointer, classes_of_weights
from dn_detr_d2.checkpoint.classes import ClassRows, take_rows
from dn_detr_d2.engine import Trainer, load_for_evaluation
from dn_detr_d2.engine.setup import setup_for_evaluation
from dn_detr_d2.evaluation import build_evaluator
from dn_detr_d2.predictor import Predictor

pytestmark = pytest.mark.usefixtures("forgotten_sets")
TRAINED = ["nut", "bolt", "cog"]
FASTER = "faster_rcnn_dn_R50_FPN_12ep"
ALL = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
HOSTS = {
    "detr": (SYSTEMS["detr"], []),  # softmax
    "dn_detr": (SYSTEMS["dn_detr"], []),
    "faster_rcnn": (FASTER, [*RCNN, *ALL]),
    "cascade_mask_rcnn": (FASTER, [*RCNN, *ALL, *CASCADE, *MASKS]),
}


def file_of(folder, name, listed, used):
    """An entry of DATASETS.COCO_JSON with one image and an object of each class of ``used``."""
    Image.new("RGB", (48, 40), (90, 60, 30)).save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 40}],
        "categories": [{"id": 3 + i, "name": x} for i, x in enumerate(listed)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 3 + listed.index(x), "bbox": [2 + 9 * i, 3, 8, 9], "area": 72,
             "iscrowd": 0, "segmentation": [[2 + 9 * i, 3, 10 + 9 * i, 3, 10 + 9 * i, 12]]}
            for i, x in enumerate(used)
        ],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))
    return [f"test_{folder.name}_{name}", str(folder / f"{name}.json"), str(folder)]


@pytest.fixture(params=HOSTS)
def trained(request, tmp_path):
    """(options of an own config whose NUM_CLASSES is auto, the model as it was trained, its file)."""
    config, opts = HOSTS[request.param]
    path = str(ROOT / "configs" / f"{config}.yaml")
    own = [*OPTIONS, *opts, "MODEL.DN_DETR.NUM_CLASSES", "auto", "OUTPUT_DIR", str(tmp_path)]
    entry = file_of(tmp_path, "train", TRAINED, TRAINED)
    cfg = setup_cfg(path, [*own, "DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", (entry[0],)])
    model = build_model(cfg).eval()
    with torch.no_grad():  # scores of classes must differ from each other, and from those of the background
        for name, parameter in model.named_parameters():
            if "class_heads" in name or "cls_score" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    Checkpointer(model, str(tmp_path), cfg=cfg).save("model_final")
    return path, [*own, "DATASETS.TRAIN", (), "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")], model


def evaluated(path, opts, entry, *more):
    return setup_for_evaluation(path, [*opts, "DATASETS.COCO_JSON", [entry], "DATASETS.TEST", (entry[0],), *more])


def detections(model):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255
    with torch.no_grad():
        found = model([{"image": image, "height": 64, "width": 64}])[0]["instances"]
    return found.pred_boxes.tensor, found.scores, found.pred_classes


@pytest.mark.parametrize("number", ["auto", 3])
@pytest.mark.parametrize("listed", [["cog", "nut", "bolt"], ["bolt"], ["bolt", "washer"]], ids="-".join)
def test_detections_do_not_change_with_the_test_set(trained, tmp_path, listed, number):
    """A class that is listed besides, of which there is no object, is none, as in the evaluations of a training."""
    path, opts, model = trained
    entry = file_of(tmp_path, "val", listed, listed[:1])
    cfg = evaluated(path, opts, entry, "MODEL.DN_DETR.NUM_CLASSES", number)
    assert list(cfg.MODEL.DN_DETR.CLASS_NAMES) == TRAINED
    for one, other in zip(detections(load_for_evaluation(cfg)), detections(model), strict=True):
        assert len(one) > 0
        assert torch.equal(one, other)


def test_objects_of_a_class_that_the_model_lacks_are_refused(trained, tmp_path):
    path, opts, _ = trained
    with pytest.raises(ConfigError, match=naming("'washer'", "'nut'")):
        evaluated(path, opts, file_of(tmp_path, "val", ["bolt", "washer"], ["washer"]))


def test_the_predictor_takes_the_classes_of_the_weights(trained):
    path, opts, model = trained
    predictor = Predictor(setup_cfg(path, opts, splits=()))
    assert list(predictor.cfg.MODEL.DN_DETR.CLASS_NAMES) == TRAINED
    for one, other in zip(detections(predictor.model), detections(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)  # norms are folded into convolutions


@pytest.mark.parametrize("masks", [True, False])
def test_a_mask_rcnn_is_evaluated_on_masks_too(tmp_path, masks):
    entry = file_of(tmp_path, "val", TRAINED, TRAINED)
    opts = [*OPTIONS, *RCNN, *(MASKS if masks else []), "DATASETS.COCO_JSON", [entry], "DATASETS.TEST", (entry[0],)]
    cfg = setup_cfg(str(ROOT / "configs" / f"{FASTER}.yaml"), [*opts, "OUTPUT_DIR", str(tmp_path)], splits=("TEST",))
    results = Trainer.test(cfg, build_model(cfg).eval())
    assert set(results) == ({"bbox", "segm"} if masks else {"bbox"})


def test_a_mask_rcnn_on_a_set_of_boxes_is_evaluated_on_boxes(tmp_path, caplog):
    """Its boxes do not need the masks; it says so with the key that it has."""
    entry = file_of(tmp_path, "val", TRAINED, TRAINED)
    content = json.loads((tmp_path / "val.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    opts = [*OPTIONS, *RCNN, *MASKS, "DATASETS.COCO_JSON", [entry], "DATASETS.TEST", (entry[0],)]
    cfg = setup_cfg(str(ROOT / "configs" / f"{FASTER}.yaml"), opts, splits=("TEST",))
    assert build_evaluator(cfg, entry[0])._tasks == ("bbox",)
    assert naming("MODEL.MASK_ON", entry[0]).search(caplog.text)


@pytest.mark.parametrize("host", ["dn_detr"])
def test_a_set_that_is_trained_on_too_is_evaluated_like_any_other(tmp_path, host):
    path = str(ROOT / "configs" / f"{HOSTS[host][0]}.yaml")
    entry = file_of(tmp_path, "val", ["bolt", "washer", "nut"], ["bolt"])
    opts = [*OPTIONS, "DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", (entry[0],), "DATASETS.TEST", (entry[0],)]
    opts += ["MODEL.DN_DETR.NUM_CLASSES", 3, "MODEL.DN_DETR.CLASS_NAMES", TRAINED]
    assert list(setup_cfg(path, opts, splits=("TEST",)).MODEL.DN_DETR.CLASS_NAMES) == TRAINED


def test_names_of_which_the_model_knows_none_are_said(trained, tmp_path):
    path, opts, _ = trained
    with pytest.raises(ConfigError, match=naming("'cat'", "'nut'", "categories")) as caught:
        evaluated(path, opts, file_of(tmp_path, "val", ["cat", "dog", "eel", "fox"], ["cat"]))
    assert "auto" not in str(caught.value)


def test_a_fine_tuning_carries_the_rows_of_box_and_mask_heads_over_by_name(tmp_path):
    path, more = str(ROOT / "configs" / f"{FASTER}.yaml"), [*RCNN, *MASKS]
    models = []
    for name, classes in (("old", TRAINED), ("new", ["cog", "washer", "nut", "pin"])):
        entry = file_of(tmp_path, name, classes, classes)
        opts = [*OPTIONS, *more, "DATASETS.COCO_JSON", [entry], "DATASETS.TRAIN", (entry[0],)]
        cfg = setup_cfg(path, opts)
        models.append(build_model(cfg).train())
        if name == "old":
            Checkpointer(models[0], str(tmp_path), cfg=cfg).save("model_final")
    fresh = {key: x.clone() for key, x in models[1].state_dict().items()}
    Checkpointer(models[1], cfg=cfg, new_classes=True).load(str(tmp_path / "model_final.pth"), checkpointables=[])
    old, new = (model.state_dict() for model in models)
    scores, deltas = "roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.bbox_pred.weight"
    masks = "roi_heads.mask_head.predictor.weight"
    assert torch.equal(new[scores][[0, 2, 4]], old[scores][[2, 0, 3]])  # cog, nut, background
    assert torch.equal(new[scores][[1, 3]], fresh[scores][[1, 3]])
    assert torch.equal(new[deltas][[*range(4), *range(8, 12)]], old[deltas][[*range(8, 12), *range(4)]])
    assert torch.equal(new[deltas][4:8], fresh[deltas][4:8])
    assert torch.equal(new[masks][[0, 2]], old[masks][[2, 0]])
    assert torch.equal(new["backbone.fpn_lateral2.weight"], old["backbone.fpn_lateral2.weight"])


def test_rows_of_retinanet_are_those_of_each_anchor():
    """A x R rows: the classes of the first anchor, then those of the second."""
    theirs = {"head.cls_score.bias": torch.arange(6.0), "head.bbox_pred.bias": torch.zeros(8)}
    ours = {"head.cls_score.bias": torch.full((4,), -1.0), "head.bbox_pred.bias": torch.zeros(8)}
    found = take_rows(theirs, ours, ClassRows([2, None], "carried over by name"), 3)
    assert found["head.cls_score.bias"].tolist() == [2, -1, 5, -1]


def test_weights_of_detectron2_say_their_number(tmp_path):
    state = {"roi_heads.box_predictor.cls_score.weight": torch.ones(4, 32)}
    torch.save({"model": state}, tmp_path / "x.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "x.pth"), "MODEL.DN_DETR.NUM_CLASSES", "auto"]
    found = classes_of_weights(setup_cfg(FASTER, opts, splits=()))
    assert dict(zip(found[::2], found[1::2], strict=True))["MODEL.ROI_HEADS.NUM_CLASSES"] == 3
