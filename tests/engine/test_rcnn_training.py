"""The trainer, its checks and checkpoints, evaluation and predictor with a detector of Detectron2: Faster R-CNN."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, make_batch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image
from ranks import run_program
from toy_training import CASCADE, MASKS, OPTIONS, RCNN, make_rcnn_cfg, train

from dn_detr_d2 import CheckpointError, ConfigError, DatasetError, setup_cfg
from dn_detr_d2.diagnostics import check_denoising, judge_labels, probe
from dn_detr_d2.diagnostics.validation_loss import validation_losses
from dn_detr_d2.engine import Trainer, load_for_evaluation
from dn_detr_d2.predictor import Predictor

pytestmark = pytest.mark.usefixtures("forgotten_sets")
SHORT = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)]
CONFIG = ROOT / "configs" / "faster_rcnn_dn_R50_FPN_12ep.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_rcnn_cfg(folder, *SHORT))
    return folder


def test_the_log_has_every_loss_and_their_sum(trained):
    (line,) = (json.loads(x) for x in (trained / "metrics.json").read_text().splitlines())
    terms = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "dn/box_reg")
    assert line["total_loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-6)
    assert line["loss_dn"] == line["dn/box_reg"] > 0


def test_the_predictor_is_detectron2s_and_reads_no_other_detector(trained):
    cfg = make_rcnn_cfg(trained, "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    ours, theirs = (predictor(cfg)(image)["instances"] for predictor in (Predictor, DefaultPredictor))
    assert len(ours) > 0
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    with pytest.raises(CheckpointError, match=naming("backbone.fpn_lateral2.weight")):
        Predictor(cfg)


def test_autocast_at_inference_comes_out_in_float32(trained, monkeypatch):
    monkeypatch.setattr("dn_detr_d2.config.validation.slow_bfloat16", lambda: "")
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    full, half = (
        Predictor(make_rcnn_cfg(trained, "MODEL.WEIGHTS", str(trained / "model_final.pth"), "TEST.AMP", amp))
        for amp in ("", "bf16")
    )
    for predictor in (full, half):
        predictor.model.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        expected = full(image)["instances"]
    found = half(image)["instances"]
    assert expected.scores.dtype == torch.bfloat16
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    assert len(found) > 0
    assert torch.equal(found.scores, expected.scores.float())
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor.float())


def test_known_objects_and_labels_are_refused(trained):
    cfg = make_rcnn_cfg(trained, "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    image, predictor = np.zeros((48, 64, 3), np.uint8), Predictor(cfg)
    nothing = Instances((48, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    for prompts in ({"labels": [0]}, {"known": nothing}):
        with pytest.raises(ConfigError, match=naming("MODEL.META_ARCHITECTURE", "'GeneralizedRCNN'")):
            predictor(image, **prompts)
    for key, value in (("KNOWN_FRACTION", 0.5), ("LABEL_PROMPTS", True)):
        with pytest.raises(ConfigError, match=naming(key, "'GeneralizedRCNN'")):
            make_rcnn_cfg(trained, f"MODEL.DN_DETR.DENOISING.{key}", value)


def test_weights_of_other_classes_are_refused_and_a_training_adds_the_classes(trained, tmp_path):
    start = ["MODEL.WEIGHTS", str(trained / "model_final.pth"), "MODEL.DN_DETR.NUM_CLASSES", 5, "DATASETS.TRAIN", ()]
    with pytest.raises(CheckpointError, match=naming("class 0", 5)):
        load_for_evaluation(make_rcnn_cfg(tmp_path, *start))
    annotations = five_classes(tmp_path)
    trainer = train(make_rcnn_cfg(tmp_path / "out", *start, *annotations, *SHORT))
    assert trainer.model.roi_heads.box_predictor.cls_score.out_features == 6


def five_classes(folder):
    """Options for a data set of one image with one of five classes, as a user has it."""
    Image.new("RGB", (48, 48)).save(folder / "a.png")
    polygon = [[8, 8, 30, 8, 30, 30, 8, 30]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 48}],
        "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, 6)],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 2, "bbox": [8, 8, 22, 22], "segmentation": polygon}],
    }
    (folder / "set.json").write_text(json.dumps(content))
    return [
        "DATASETS.COCO_JSON",
        [["test_five", str(folder / "set.json"), str(folder)]],
        "DATASETS.TRAIN",
        ("test_five",),
    ]


@pytest.mark.parametrize("form", ["polygon", "bitmask"])
def test_mask_rcnn_trains_on_the_masks_of_a_coco_file(tmp_path, form):
    """The mask that arrives covers the annotated square, whichever its form."""
    options = [*five_classes(tmp_path), *MASKS, *SHORT, "INPUT.MASK_FORMAT", form, "SOLVER.IMS_PER_BATCH", 1]
    options += ["DATASETS.TEST", ("test_five",)]
    trainer = train(make_rcnn_cfg(tmp_path / "out", *options, "MODEL.DN_DETR.NUM_CLASSES", 5))
    losses = [json.loads(x).get("loss_mask") for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any(losses)
    assert all(loss is None or math.isfinite(loss) for loss in losses)
    (image,) = next(iter(trainer.data_loader))
    instances = image["instances"]
    trainer.model.roi_heads.box_predictor.test_score_thresh = 0.0
    results = Trainer.test(
        trainer.cfg.clone(), trainer.model.eval(), [Trainer.build_evaluator(trainer.cfg, "test_five")]
    )
    assert math.isfinite(results["bbox"]["AP"])
    (area,) = instances.gt_masks.area().tolist() if form == "polygon" else [int(instances.gt_masks.tensor.sum())]
    assert area == pytest.approx(instances.gt_boxes.area().item(), rel=0.12)  # pixels of a 22 x 22 square at the border


def test_masks_that_are_not_there_are_told(tmp_path):
    """Before the training, with a count."""
    options, file = five_classes(tmp_path), tmp_path / "set.json"
    content = json.loads(file.read_text())
    content["annotations"] += [
        content["annotations"][0] | {"id": 8},
        content["annotations"][0] | {"id": 9, "iscrowd": 1},
    ]
    for annotation in content["annotations"][1:]:
        annotation["segmentation"] = []
    file.write_text(json.dumps(content))
    options += ["DATASETS.TEST", (), "MODEL.DN_DETR.NUM_CLASSES", 5]
    with pytest.raises(DatasetError, match=naming(1, 2, "annotation", 8, "MODEL.MASK_ON")):
        train(make_rcnn_cfg(tmp_path / "out", *options, *MASKS, *SHORT))


@pytest.mark.parametrize("cascade", [False, True])
def test_a_loss_that_is_not_finite_stops_the_training_and_is_named(tmp_path, cascade):
    """In a cascade Detectron2 asserts that the boxes of the first stage are finite, before any loss is."""
    options = [*SHORT, *(CASCADE if cascade else [])]
    bias = f"roi_heads.box_predictor.{'0.' if cascade else ''}bbox_pred.bias"
    state = build_model(make_rcnn_cfg(tmp_path, *options)).state_dict()
    state[bias][1] = math.nan
    torch.save({"model": state}, tmp_path / "start.pth")
    with pytest.raises(FloatingPointError, match=naming(bias)):
        train(make_rcnn_cfg(tmp_path / "out", *options, "MODEL.WEIGHTS", str(tmp_path / "start.pth")))
    assert list((tmp_path / "out" / "nan_report").glob("*.json"))


def test_mixed_precision_trains(tmp_path):
    train(make_rcnn_cfg(tmp_path, *SHORT, "SOLVER.AMP.ENABLED", True))
    (line,) = (json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines())
    assert line["dn/box_reg"] > 0


def test_what_looks_at_queries_refuses_a_model_without_them(tmp_path):
    for key, value in (
        ("TEST.INSTABILITY.NUM_IMAGES", 2),
        ("TEST.VALIDATION_LOSS", 2),
        ("DEBUG.CHECK_DENOISING", True),
    ):
        with pytest.raises(ConfigError, match=naming("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")):
            train(make_rcnn_cfg(tmp_path, *SHORT, "DATASETS.TEST", ("shapes_val",), key, value))
    model, batch = build_model(make_rcnn_cfg(tmp_path)), make_batch(2)
    for look in (check_denoising, probe, judge_labels, validation_losses):
        with pytest.raises(ConfigError, match=naming("GeneralizedRCNN")):
            look(model, batch)


def test_keys_that_a_detector_of_detectron2_does_not_read_are_named(tmp_path, caplog):
    setup_cfg(str(CONFIG), ["MODEL.DN_DETR.NUM_CLASSES", 3, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 3], splits=())
    (line,) = (record.getMessage() for record in caplog.records if "GeneralizedRCNN" in record.getMessage())
    assert "DECODER" in line
    assert "DENOISING" not in line
    assert "NUM_CLASSES" not in line


def test_the_command_line_trains_in_two_processes_and_evaluates(tmp_path):
    """From outside: exit codes, the checkpoint, and an evaluation of it on the embedded data set."""
    options = [str(x) for x in (*OPTIONS, *RCNN, *SHORT, "OUTPUT_DIR", tmp_path / "out")]
    line = [ROOT / "train_net.py", "--config-file", CONFIG]
    found = run_program(*line, "--num-gpus", 2, *options)
    assert found.returncode == 0, found.stderr
    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "DATASETS.TEST", "('shapes_val',)"]
    found = run_program(*line, "--eval-only", *options, *weights)
    assert found.returncode == 0, found.stderr
    assert "copypaste: AP,AP50" in found.stdout
    assert (tmp_path / "out" / "inference" / "coco_instances_results.json").is_file()
