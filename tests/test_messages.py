"""The form of every message: one sentence in one line, which names the value and a way out that exists.

The other tests ask for the kind of an error and the values it names; its words stand here, one row for each place where
input comes in.
"""

import ast
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, valid_coco
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image

import demo
from dn_detr_d2 import CheckpointError, ConfigError, DatasetError, add_dn_detr_config, setup_cfg
from dn_detr_d2.commands import convert_dataset, train
from dn_detr_d2.data import load_coco_json, read_image, register_coco_json
from dn_detr_d2.predictor import Predictor
from tools import plot_runs

QUICK = ["--config-file", str(ROOT / "configs" / "quickstart.yaml")]
CLASSES = ["MODEL.DN_DETR.NUM_CLASSES", 3]


def config(*opts, file=""):
    return lambda bench: setup_cfg(file, [*opts, *(CLASSES if "DATASETS.TRAIN" not in opts else ())])


def annotations(**changes):
    def read(bench):
        content = valid_coco()
        content["annotations"][0] |= changes
        for name in ("a.png", "b.png"):
            Image.new("RGB", (30, 20)).save(bench.folder / name)
        (bench.folder / "set.json").write_text(json.dumps(content))
        load_coco_json(bench.folder / "set.json", bench.folder)

    return read


def image(content):
    def read(bench):
        (bench.folder / "x.png").write_bytes(content)
        read_image(str(bench.folder / "x.png"), "RGB")

    return read


def weights(content, name="w.pth"):
    """A predictor with this file, or without any if ``content`` is None."""

    def load(bench):
        if isinstance(content, bytes):
            (bench.folder / name).write_bytes(content)
        elif content is not None:
            torch.save({"model": content(bench)}, bench.folder / name)
        Predictor(bench.cfg("dn_detr", "MODEL.WEIGHTS", str(bench.folder / name)))

    return load


def model(*overrides, system="dn_detr"):
    return lambda bench: bench.model(system, *overrides)


def launcher(*arguments):
    return lambda bench: train.check(default_argument_parser().parse_args([*QUICK, *arguments]))


def predictor(given):
    return lambda bench: Predictor.__new__(Predictor)(given)


def prompt(system="dn_detr", **prompts):
    def ask(bench):
        torch.save({"model": bench.model(system).state_dict()}, bench.folder / "w.pth")
        cfg = bench.cfg(
            system, "MODEL.WEIGHTS", str(bench.folder / "w.pth"), "MODEL.DN_DETR.CLASS_NAMES", list("abcde")
        )
        Predictor(cfg)(torch.zeros(20, 30, 3, dtype=torch.uint8).numpy(), **prompts)

    return ask


def command(main, *arguments):
    """What a command prints to stderr, as an exception; its exit code must not be 0."""

    def run(bench):
        given = [x.replace("{folder}", str(bench.folder)) for x in arguments]
        assert main([*QUICK, *given] if main is demo.main else given) != 0
        raise RuntimeError(bench.said().removesuffix("\n").removeprefix("error: "))

    return run


HOSTILE = pickle.dumps({"model": {"a": print}})
# (input, kind of error, values that the message names, the way out that it says)
ROWS = {
    "config: a value out of range": (config("SOLVER.BASE_LR", -1.0), ConfigError, ["SOLVER.BASE_LR", -1.0], "positive"),
    "config: a choice": (config("SOLVER.AMP.DTYPE", "fp8"), ConfigError, ["SOLVER.AMP.DTYPE", "'fp8'"], "'bf16'"),
    "config: a misspelt key": (
        config("MODEL.DN_DETR.NUM_QUERY", 3), ConfigError, ["MODEL.DN_DETR.NUM_QUERY"], "MODEL.DN_DETR.NUM_QUERIES"),
    "config: no such file": (config(file="nowhere.yaml"), ConfigError, ["'nowhere.yaml'"], Path.cwd().name),
    "config: no such data set": (
        config("DATASETS.TRAIN", ("shape_train",)), ConfigError, ["DATASETS", "'shape_train'"], "'shapes_train'"),
    "config: another number of classes": (
        config("DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", 2), ConfigError,
        ["MODEL.DN_DETR.NUM_CLASSES", 2, "shapes_train"], 3),
    "data set: a category": (annotations(category_id=9), DatasetError, ["set.json", "category_id", 9], "--drop-bad"),
    "data set: an id as text": (annotations(image_id="1"), DatasetError, ["set.json", "image_id", "'1'"], "--fix"),
    "data set: a box": (annotations(bbox=[1, 2]), DatasetError, ["set.json", "bbox", "[1, 2]"], "--drop-bad"),
    "data set: no file": (
        lambda bench: register_coco_json("test_messages", str(bench.folder / "gone.json"), str(bench.folder)), DatasetError,
        ["'test_messages'", "gone.json"], "DETECTRON2_DATASETS"),
    "data set: an image": (image(b"not a picture"), DatasetError, ["x.png"], "PNG"),
    "checkpoint: no file": (weights(None), CheckpointError, ["w.pth"], None),
    "checkpoint: damaged": (weights(b"\x80\x04garbage"), CheckpointError, ["w.pth"], None),
    "checkpoint: a pickle that calls": (weights(HOSTILE, "w.pkl"), CheckpointError, ["w.pkl", "builtins.print"], None),
    "checkpoint: another number of classes": (
        weights(lambda bench: bench.model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 7).state_dict()), CheckpointError,
        ["w.pth", 5, "class 0"], "training"),
    "checkpoint: another system": (
        weights(lambda bench: bench.model("dino").state_dict()), CheckpointError, ["w.pth", "missing"], None),
    "model: a name": (
        model("MODEL.DN_DETR.DECODER.NAME", "X"), ConfigError, ["DECODER.NAME", "'X'"], "LookForwardTwiceDecoder"),
    "model: two keys": (
        model("MODEL.DN_DETR.HIDDEN_DIM", 36, "MODEL.DN_DETR.ENCODER.NUM_HEADS", 8), ConfigError,
        ["MODEL.DN_DETR.HIDDEN_DIM", 36], "ENCODER.NUM_HEADS"),
    "model: a source without denoising": (
        model("MODEL.DN_DETR.QUERY_SOURCE.CONTENT", "zero"), ConfigError, ["DENOISING.NAME"], "QUERY_SOURCE.CONTENT"),
    "model: a kind of noise": (
        model("MODEL.DN_DETR.DENOISING.BOX_NOISE.NAME", "normal"), ConfigError, ["BOX_NOISE.NAME", "'normal'"], "gaussian"),
    "model: a kind of label noise": (
        model("MODEL.DN_DETR.DENOISING.LABEL_NOISE.NAME", "x"), ConfigError, ["LABEL_NOISE.NAME", "'x'"], "confusion"),
    "model: box noise of contrastive denoising": (
        model("MODEL.DN_DETR.DENOISING.BOX_NOISE.NAME", "gaussian", system="dino"), ConfigError, ["BOX_NOISE.NAME"],
        "DenoisingGenerator"),
    "config: no confusion matrix": (
        config("MODEL.DN_DETR.DENOISING.LABEL_NOISE.NAME", "confusion"), ConfigError, ["LABEL_NOISE.CONFUSION_MATRIX", "''"],
        "confusion_matrix.json"),
    "launcher: no process": (launcher("--num-gpus", "0"), ConfigError, ["--num-gpus", 0], 1),
    "launcher: more processes than GPUs": (launcher("--num-gpus", "2"), ConfigError, ["--num-gpus", 2], "MODEL.DEVICE cpu"),
    "launcher: an uneven batch": (
        launcher("--num-gpus", "2", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "3"), ConfigError,
        ["SOLVER.IMS_PER_BATCH", 3], 2),
    "predictor: no image": (predictor(None), ValueError, ["NoneType"], "cv2.imread"),
    "predictor: an array of another form": (predictor(torch.zeros(2, 2).numpy()), ValueError, ["float32", "(2, 2)"], "BGR"),
    "prompts: a config that cannot": (
        model("MODEL.DN_DETR.DENOISING.KNOWN_FRACTION", 0.5), ConfigError, ["KNOWN_FRACTION", 0.5, 5], "NUM_GROUPS 1"),
    "prompts: a host that cannot": (
        prompt(labels=["a"], system="dn_deformable_detr"), ConfigError, ["'labels'"], "QUERY_SOURCE.CONTENT 'unknown'"),
    "prompts: a model without denoising": (
        prompt(labels=["a"], system="dab_detr"), ConfigError, ["'labels'", "DENOISING.NAME"], "trained with denoising"),
    "prompts: a class that is not there": (prompt(labels=["z"]), ValueError, ["'z'"], "['a', 'b', 'c', 'd', 'e']"),
    "prompts: a box outside": (
        prompt(known=Instances((20, 30), gt_boxes=Boxes(torch.tensor([[1.0, 1, 31, 9]])), gt_classes=torch.tensor([1]))),
        ValueError, [31.0], "(20, 30)"),
    "tool: plot_runs": (command(plot_runs.main, "nowhere"), RuntimeError, ["nowhere"], "metrics.json"),
    "tool: convert_dataset": (
        command(convert_dataset.main, "yolo", "{folder}/gone", "{folder}", "out.json"), RuntimeError, ["gone"], None),
    "tool: demo": (
        command(demo.main, "--input", "nowhere.jpg", "--output", "{folder}/out"), RuntimeError, ["--input", "nowhere.jpg"],
        None),
}  # fmt: skip


@pytest.fixture
def bench(tmp_path, toy_cfg, toy_model, capsys, monkeypatch):
    """What the rows work with: a folder, small models, and what was printed to stderr."""

    class Bench:
        folder, cfg, model, patch = tmp_path, staticmethod(toy_cfg), staticmethod(toy_model), monkeypatch

        def said(self):
            return capsys.readouterr().err

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return Bench()


def known_keys():
    """Every config key, nodes too."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    found = set()

    def walk(node, above):
        for name, value in node.items():
            found.add(".".join([*above, name]))
            if hasattr(value, "items"):
                walk(value, [*above, name])

    walk(cfg, [])
    return found


def missing_ways_out(text, values):
    """The config keys and command line options in a message that do not exist; ``values`` are the user's own words."""
    keys = known_keys()
    ends = {".".join(key.split(".")[i:]) for key in keys for i in range(key.count(".") + 1)}
    own = " ".join(map(str, values))
    named = [key for key in re.findall(r"\b[A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+\b", text) if key not in own]
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("dn_detr_d2/commands/*.py")]
    )
    sources += default_argument_parser().format_help()
    options = [
        option
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        if not re.search(rf"{option}(?![\w-])", sources)
    ]
    return [key for key in named if key not in ends] + options


def faults_of_form(text):
    """What is wrong with the form of a message; what stands in brackets is quoted from another library."""
    if not text or text != text.strip() or "\n" in text:
        yield "it is not one line"
    own = re.sub(r"\(.*\)", "", text)
    if own.endswith(".") or re.search(r"[a-z]\.\s+[A-Z]", own):
        yield "it is not one sentence"
    if len(own) > 700:
        yield "it is long"


@pytest.mark.parametrize("row", ROWS)
def test_a_message_is_one_sentence_with_the_value_and_a_way_out_that_exists(row, bench):
    make, kind, values, way = ROWS[row]
    with pytest.raises(kind, match=naming(*values, *([] if way is None else [way]))) as caught:
        make(bench)
    text = str(caught.value)
    assert list(faults_of_form(text)) == []
    assert missing_ways_out(text, values) == []


def test_a_way_out_that_does_not_exist_would_be_found():
    assert missing_ways_out("set MODEL.DN_DETR.NUM_QUERRIES or add --no-such-option", []) == [
        "MODEL.DN_DETR.NUM_QUERRIES", "--no-such-option"
    ]  # fmt: skip
    assert missing_ways_out("set DN_DETR.NUM_QUERIES, or use --num-gpus and --drop-bad", []) == []
    assert list(faults_of_form("It is wrong. Do it again.\n")) == ["it is not one line", "it is not one sentence"]


# Words that have a term in the field: stress test, fault injection, bitwise identical, diagnostics, runs, import rules.
WORDS = r"tortur\w*|ordeals?|maltreat\w*|undergo\w*|in peace|to the bit|instruments?|contestants?|wrong doors?"
OTHER_WORDS = re.compile(rf"\b({WORDS})\b", re.IGNORECASE)
PYTHON = [
    *ROOT.glob("*.py"),
    *(path for part in ("dn_detr_d2", "tools", "dev") for path in (ROOT / part).rglob("*.py")),
]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES.remove(ROOT / "CHANGELOG.md")  # names what has another name now


def strings(text):
    """String literals and docstrings of a program."""
    nodes = ast.walk(ast.parse(text))
    return [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]


def other_words(text):
    """What a text calls by another name than the field does."""
    return [match[0].lower() for match in OTHER_WORDS.finditer(" ".join(text.split()))]


def test_programs_and_pages_use_the_words_of_the_field():
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES}
    texts |= {path: "\n".join(strings(path.read_text(encoding="utf-8"))) for path in PYTHON}
    assert {str(path): found for path, text in texts.items() if (found := other_words(text))} == {}


def test_another_word_would_be_found():
    planted = '"""Equal to the\n bit."""\nx = f"the ordeal {1} is over"\nundergo = 1'
    assert [word for text in strings(planted) for word in other_words(text)] == ["to the bit", "ordeal"]
    assert other_words("An instrumental doorway, tortoises.") == []
