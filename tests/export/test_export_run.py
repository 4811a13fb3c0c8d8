"""The program: what it writes, what it refuses, and that no bad file keeps its name."""

import json

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import MASK_SYSTEMS, SYSTEMS
from detectron2.config import CfgNode
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError
from dn_detr_d2.commands import export
from dn_detr_d2.config import load_config
from dn_detr_d2.data import read_image
from dn_detr_d2.export import run
from dn_detr_d2.export.formats import FORMATS
from dn_detr_d2.export.onnx_predictor import OnnxPredictor
from dn_detr_d2.export.run import Wish
from dn_detr_d2.predictor import Predictor
from dn_detr_d2.utils.files import sha256_of

CLASSES = ["cat", "dog", "cow", "hen", "pig"]
SIZES = ["INPUT.MIN_SIZE_TEST", 70, "INPUT.MAX_SIZE_TEST", 110, "TEST.DETECTIONS_PER_IMAGE", 20]
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL = [*SIZES, *RESNET18, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 2]


@pytest.fixture
def trained(toy_cfg, toy_model, tmp_path):
    """trained(system) -> command line of a model with weights, and its config; the picture is image.png beside them."""

    def make(system="dn_deformable_detr"):
        options = [*SMALL, "MODEL.DN_DETR.CLASS_NAMES", CLASSES]
        weights = tmp_path / "model.pth"
        torch.save({"model": toy_model(system, *options).state_dict(), "class_names": CLASSES}, weights)
        cfg = toy_cfg(system, *options, "MODEL.WEIGHTS", str(weights))
        (tmp_path / "config.yaml").write_text(cfg.dump())
        noise = np.random.default_rng(0).integers(256, size=(9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(tmp_path / "image.png")
        flags = ["--config-file", str(tmp_path / "config.yaml"), "--sample-image", str(tmp_path / "image.png")]
        return [*flags, "--output", str(tmp_path / "out"), "MODEL.WEIGHTS", str(weights)], cfg

    return make


@pytest.fixture
def writer(monkeypatch):
    """writer(function) makes --format torch_export write and load by that: exporting takes seconds."""

    def replace(write, load=lambda path: lambda images, sizes: []):
        monkeypatch.setitem(FORMATS, "torch_export", (".pt2", write, load))

    return replace


def check_predictor(path, cfg, picture):
    """The copied program gives what the package's predictor gives."""
    expected = Predictor(cfg)(read_image(picture, "BGR"))["instances"]
    scores, classes, boxes, masks = OnnxPredictor(path).arrays(picture)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
    assert sorted(classes) == sorted(expected.pred_classes.tolist())
    best = expected.scores > expected.scores[-1] + 1e-3  # of equal ones the order is chance
    np.testing.assert_allclose(boxes[best], expected.pred_boxes.tensor[best].numpy(), atol=0.05)
    if masks is not None:
        assert (masks[best] != expected.pred_masks[best].numpy()).mean() < 1e-3


def test_an_onnx_file_says_what_it_needs_and_finds_what_the_model_finds(trained, tmp_path, capsys):
    command, cfg = trained()
    assert export.main(["--format", "onnx", "--opset", "19", *command]) == 0
    path = tmp_path / "out" / "model.onnx"
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    assert str(path) in capsys.readouterr().out
    check_predictor(path, cfg, str(tmp_path / "image.png"))
    file = onnx.load(path)
    assert file.opset_import[0].version == 19
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(said["class_names"]) == CLASSES
    assert json.loads(said["weights_sha256"]) == sha256_of(tmp_path / "model.pth")
    assert json.loads(said["resize"])["shortest_edge"] == 70
    assert CfgNode(yaml.safe_load(said["config"])).MODEL.DN_DETR.CLASS_NAMES == CLASSES


@pytest.mark.long
@pytest.mark.parametrize("system", [*SYSTEMS, *MASK_SYSTEMS])
def test_the_copied_program_finds_what_every_system_finds(trained, tmp_path, system):
    command, cfg = trained(system)
    assert export.main(["--format", "onnx", *command]) == 0
    if cfg.MODEL.DN_DETR.MASK.ENABLED and "instances" not in cfg.MODEL.DN_DETR.MASK.OUTPUTS:
        with pytest.raises(ValueError, match="sem_seg"):
            OnnxPredictor(tmp_path / "out" / "model.onnx")(str(tmp_path / "image.png"))
        return
    check_predictor(tmp_path / "out" / "model.onnx", cfg, str(tmp_path / "image.png"))


@pytest.mark.long
@pytest.mark.parametrize("flag", ["--fp16", "--int8"])
def test_smaller_files_are_smaller_and_pass(trained, tmp_path, flag):
    command, _ = trained()
    assert export.main(["--format", "onnx", *command]) == 0
    assert export.main(["--format", "onnx", flag, *command]) == 0
    small = tmp_path / "out" / f"model_{flag[2:]}.onnx"
    assert small.stat().st_size < 0.8 * (tmp_path / "out" / "model.onnx").stat().st_size
    OnnxPredictor(small)


def broken(model, path, metadata):
    path.write_bytes(b"x" * 99)


def fails(model, path, metadata):
    path.write_bytes(b"half")
    raise RuntimeError("no translation for an operator\nwith many lines")


def cannot_load(path):
    raise ValueError("Protobuf parsing failed")


def other_values(path):
    return lambda images, sizes: [torch.zeros(len(images), 9, 5), torch.rand(len(images), 9, 4)]


def not_numbers(path):
    return lambda images, sizes: [torch.full((len(images), 9, 5), torch.nan), torch.rand(len(images), 9, 4)]


@pytest.mark.parametrize(
    ("write", "load", "said"),
    [
        (fails, None, "no translation"),
        (broken, cannot_load, "Protobuf"),
        (broken, other_values, "0.0 %"),
        (broken, not_numbers, "NaN"),
    ],
)
def test_a_file_that_does_not_do_its_models_work_is_deleted(trained, writer, tmp_path, capsys, write, load, said):
    command, _ = trained()
    writer(write, load)
    assert export.main(["--format", "torch_export", *command]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [said in line for line in lines if line.startswith("error:")] == [True]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"opset": 17}, (18, 20, 17)),
        ({"opset": 21}, (18, 20, 21)),
        ({"fp16": True, "int8": True}, ("--fp16", "--int8")),
        ({"kind": "torch_export", "fp16": True}, ("--fp16", "torch_export")),
        ({"kind": "torch_export", "opset": 18}, ("--opset", "torch_export")),
        ({"kind": "aoti", "int8": True}, ("--int8", "aoti")),
        ({"sample": "/nowhere.png"}, ("--sample-image", "/nowhere.png")),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, wish, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        Wish(**({"kind": "onnx", "folder": tmp_path} | wish)).check()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "model_int8.onnx").touch()
    Wish("onnx", tmp_path).check()
    with pytest.raises(ConfigError, match=naming(tmp_path / "model_int8.onnx")):
        Wish("onnx", tmp_path, int8=True).check()
    with pytest.raises(ConfigError, match=naming("--output", "is a file")):
        Wish("onnx", tmp_path / "model_int8.onnx").check()


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ConfigError, match=naming("onnxscript", "dn_detr_d2[export]")):
        Wish("onnx", tmp_path).check()


def test_inputs_that_cannot_be_used_are_one_sentence(trained, tmp_path, capsys):
    command, _ = trained()
    (tmp_path / "image.png").write_bytes(b"no image")
    faulty = {
        "image.png": command,
        "MODEL.WEIGHTS": command[:-2],
        "absent.pth": [*command[:-1], "absent.pth"],
        "deploy/export_model.py": [*command, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
        "--sample-image": [*command[:2], *command[4:]],  # neither an image nor DATASETS.TEST
        "--run-eval": ["--run-eval", *command],
    }
    for named, arguments in faulty.items():
        assert export.main(["--format", "torch_export", *arguments]) == 2, named
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert [named in line for line in lines] == [True], (named, lines)
        assert not list(tmp_path.glob("out/*"))


def test_classes_that_the_config_leaves_open_are_the_checkpoints(trained, tmp_path):
    trained()
    zoo = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.DN_DETR.NUM_CLASSES", "auto"]
    wish = Wish("onnx", tmp_path, sample="image.png")
    assert load_config("dn_detr_R50_50ep", zoo).MODEL.DN_DETR.NUM_CLASSES is None
    node = run.config_of("dn_detr_R50_50ep", zoo, wish).MODEL.DN_DETR
    assert (node.NUM_CLASSES, node.CLASS_NAMES) == (5, CLASSES)
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "model.pth")
    with pytest.raises(ConfigError, match=naming("auto", tmp_path / "model.pth")):
        run.config_of("dn_detr_R50_50ep", zoo, wish)


def test_autocast_and_graphs_of_evaluations_do_not_concern_an_export(trained, tmp_path, monkeypatch):
    """fp16 and graphs need a GPU, and a file in float32 would not agree with a model in bfloat16."""
    trained()
    seen = []
    monkeypatch.setattr(run, "write", lambda cfg, model, wish, draft: draft.write_bytes(b""))
    monkeypatch.setattr(run, "verify", lambda cfg, *_: seen.append(cfg.TEST) or (None, {}))
    wish = Wish("torch_export", tmp_path / "out", sample=str(tmp_path / "image.png"))
    opts = ["TEST.AMP", "fp16", "TEST.CUDA_GRAPHS", 2]
    path = run.export_model(str(tmp_path / "config.yaml"), opts, str(tmp_path / "model.pth"), wish)[0]
    assert path.is_file()
    assert [(node.AMP, node.CUDA_GRAPHS) for node in seen] == [("", 0)]


def test_both_are_evaluated_on_the_test_set(toy_model, toy_cfg, tmp_path, capsys):
    options = [*SMALL, "MODEL.DN_DETR.NUM_CLASSES", 3, "MODEL.DN_DETR.CLASS_NAMES", []]
    torch.save({"model": toy_model("dn_deformable_detr", *options).state_dict()}, tmp_path / "model.pth")
    options += ["DATASETS.TEST", ("shapes_val",), "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    (tmp_path / "config.yaml").write_text(toy_cfg("dn_deformable_detr", *options).dump())
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").write_text("of the training")
    flags = ["--format", "torch_export", "--run-eval", "--output", str(tmp_path / "out")]
    command = [*flags, "--config-file", str(tmp_path / "config.yaml"), "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    assert export.main(command) == 0
    lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| bbox/")]
    rows = {name.strip(): (ours.strip(), theirs.strip()) for name, ours, theirs in lines}
    assert {"bbox/AP", "bbox/AP50", "bbox/AP-circle"} <= rows.keys()
    assert all(ours == theirs for ours, theirs in rows.values())  # the graph is exact
    assert float(rows["bbox/AP50"][0]) >= 0
    assert (tmp_path / "out" / "model.pt2").exists()
    assert (tmp_path / "inference" / "coco_instances_results.json").read_text() == "of the training"
    written = [tmp_path / "out" / f"evaluation_{name}" / "inference" for name in ("eager", "exported")]
    ours, theirs = (json.loads((folder / "coco_instances_results.json").read_text()) for folder in written)
    assert len(ours) == len(theirs) > 100  # the AP of random weights says little
    for a, b in zip(ours, theirs, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["bbox"] + [a["score"]] == pytest.approx(b["bbox"] + [b["score"]], abs=1e-3)
