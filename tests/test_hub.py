"""A model pushed to a stand-in of the hub and loaded from it again, under the rule of the SHA-256."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, off_the_start
from detectron2.modeling import build_model
from hub_standin import COMMIT, hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from naming import naming
from safetensors import safe_open

from dn_detr_d2 import CheckpointError, setup_cfg
from dn_detr_d2.checkpoint import CheckpointFile, download, write_checkpoint
from dn_detr_d2.checkpoint import hub as hub_files
from dn_detr_d2.hub import model_card, portable, prepare_folder, results_of
from dn_detr_d2.predictor import Predictor
from dn_detr_d2.utils.files import sha256_of
from tools import push_to_hub

NAMES = ["a", "b_1", "<c>", "d", "e|f"]


@pytest.fixture
def trained(tmp_path, toy_cfg):
    """(cfg, folder) as a training leaves it: config.yaml with paths of this machine, weights, metrics.json."""
    folder = tmp_path / "trained"
    folder.mkdir()
    listed = [["test_hub", str(tmp_path / "secret" / "a.json"), str(tmp_path)]]
    cfg = toy_cfg(
        "dn_detr", "MODEL.DN_DETR.CLASS_NAMES", NAMES, "OUTPUT_DIR", str(folder), "DATASETS.COCO_JSON", listed
    )
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_hub",), ("test_hub_val",)
    cfg.DATASETS.UNLABELED = (str(tmp_path / "secret" / "pictures"),)
    state = off_the_start(build_model(cfg)).state_dict()
    write_checkpoint(folder / "model_final.pth", CheckpointFile(state, NAMES, cfg.dump()))
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [
        '{"iteration": 4, "total_loss": 2.0}',
        '{"iteration": 4, "bbox/AP": 11.0}',
        '{"iteration": 9, "total_loss": 1.0}',
    ]
    lines += ['{"iteration": 10, "bbox/AP": 41.257, "bbox/AP-a": 3.0, "bbox/APl": NaN, "ema/bbox/AP": 43.0}']
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    return cfg, folder


def arguments(folder, *more):
    return ["--config-file", str(folder / "config.yaml"), "--repo", "user/name", *more, "MODEL.WEIGHTS",
            str(folder / "model_final.pth")]  # fmt: skip


def test_a_dry_run_writes_what_would_be_pushed(trained, capsys):
    _, folder = trained
    assert push_to_hub.main(arguments(folder, "--dry-run")) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    pushed = folder / "hub"
    assert {x.name for x in pushed.iterdir()} == {
        "README.md", "config.yaml", "model.safetensors", "model.safetensors.sha256"}  # fmt: skip
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    with safe_open(pushed / "model.safetensors", "pt") as file:
        assert set(file.keys()) == state.keys()
        assert all(torch.equal(file.get_tensor(name), x) for name, x in state.items())
    everything = b"".join(x.read_bytes() for x in pushed.iterdir())
    assert str(folder.parent).encode() not in everything  # no path of this machine
    assert b"secret" not in everything


def test_the_card_says_data_metrics_and_what_is_to_be_filled_in(trained, tmp_path):
    cfg, _ = trained
    sha256 = prepare_folder(cfg, tmp_path / "out", "user/name")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "unknown", "dn_detr_d2", "object-detection")  # fmt: skip
    assert [(x.metric_type, x.metric_value, x.dataset_name) for x in card.data.eval_results] == [
        ("bbox/AP", 41.26, "test_hub_val")]  # fmt: skip
    assert sha256 == sha256_of(tmp_path / "out" / "model.safetensors")
    assert card.text.count(sha256) == 2
    assert "| bbox/AP | 41.3 |" in card.text
    assert re.search(r"## Licence\s+\*To be filled in\*", card.text)
    assert "test_hub" in card.text
    assert r"b\_1, \<c\>, d, e\|f" in card.text


@pytest.mark.parametrize(("name", "averaged", "expected"), [
    ("model_final", False, {"bbox/AP": 41.257}), ("model_final", True, {"bbox/AP": 43.0}),
    ("model_0000004", False, {"bbox/AP": 11.0}), ("model_0000005", False, {}),
    ("model_best", False, {"bbox/AP": 11.0}), ("other", False, {}),
])  # fmt: skip
def test_metrics_are_those_of_the_weights(trained, name, averaged, expected):
    cfg, folder = trained
    (folder / "best_metric.json").write_text('{"metric": "bbox/AP", "value": 11.0, "iteration": 4}')
    cfg.MODEL.WEIGHTS = str(folder / f"{name}.pth")
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = averaged
    assert results_of(cfg) == expected


def test_the_config_of_a_semi_supervised_training_is_one_without_its_images(trained):
    cfg, _ = trained
    cfg.merge_from_list(["SEMI_SUPERVISED.ENABLED", True, "DATASETS.UNLABELED", ["/data/not_annotated"]])
    assert "pseudo labels" in (card := model_card(cfg, "user/name", "0" * 64, {}))
    assert "not_annotated" not in card  # a path of this machine
    found = yaml.safe_load(portable(cfg))
    assert (found["SEMI_SUPERVISED"]["ENABLED"], found["DATASETS"]["UNLABELED"]) == (False, [])


def test_averaged_weights_are_those_of_the_pushed_model_wherever_it_runs(trained, tmp_path):
    """The file holds the average alone; a device of the machine that pushed is not one of the machine that loads."""
    cfg, _ = trained
    cfg.MODEL_EMA.ENABLED = cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = True
    cfg.MODEL.DEVICE = "cuda:1"
    (tmp_path / "pushed.yaml").write_text(portable(cfg))
    assert "DEVICE" not in yaml.safe_load(portable(cfg))["MODEL"]
    again = setup_cfg(str(tmp_path / "pushed.yaml"), splits=())
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert here == again.MODEL.DEVICE
    assert not again.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY


def test_weights_that_were_not_evaluated_have_a_card_that_says_so(trained):
    cfg, _ = trained
    text = model_card(cfg, "user/name", "0" * 64, {})
    assert "not evaluated" in text
    assert "model-index" not in text


@pytest.mark.long
@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_where_that_is_asked_for(trained, monkeypatch, private):
    made = []

    def create(api, repo, **options):
        made.append((repo, options["private"]))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **__: SimpleNamespace(oid=COMMIT))
    assert push_to_hub.main(arguments(trained[1], *(["--private"] if private else []))) == 0
    assert made == [("user/name", private)]


def test_a_pushed_model_is_loaded_by_its_name_with_the_same_detections(trained, tmp_path):
    """HF_ENDPOINT is read when huggingface_hub is imported, so both ends run in processes of their own."""
    cfg, folder = trained
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)
    expected = Predictor(cfg)(image)["instances"]
    with hub() as server:
        environment = {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_standin", "PATH": "/usr/bin:/bin",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        line = [sys.executable, str(ROOT / "tools" / "push_to_hub.py"), *arguments(folder)]
        ran = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert not server.made[0].get("private")
        weights = re.fullmatch(r"MODEL.WEIGHTS (\S+) MODEL.WEIGHTS_SHA256 ([0-9a-f]{64})", ran.stdout.splitlines()[-1])
        assert weights[1] == f"hf://user/name@{COMMIT}"
        assert yaml.safe_load(server.files["user/name", "config.yaml"])["DATASETS"]["COCO_JSON"] == []
        (tmp_path / "config.yaml").write_bytes(server.files["user/name", "config.yaml"])
        program = f"""
import sys, numpy as np
from dn_detr_d2 import CheckpointError, setup_cfg
from dn_detr_d2.predictor import Predictor
sums = [{weights[2]!r}, "", "f" * 64]
for i, known in enumerate(sums):
    opts = ["MODEL.WEIGHTS", {weights[1]!r}, "MODEL.WEIGHTS_SHA256", known]
    try:
        cfg = setup_cfg({str(tmp_path / "config.yaml")!r}, opts, splits=())
        found = Predictor(cfg)(np.load({str(tmp_path / "image.npy")!r}))
        np.save({str(tmp_path)!r} + f"/found_{{i}}.npy", found["instances"].scores.numpy())
    except CheckpointError as error:
        print(error)
"""
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert any(f"/resolve/{COMMIT}/model.safetensors" in x for x in server.asked)
    np.testing.assert_array_equal(np.load(tmp_path / "found_0.npy"), expected.scores.numpy())
    refused = ran.stdout.splitlines()
    assert naming("MODEL.WEIGHTS_SHA256").search(refused[0])
    assert naming(weights[2]).search(refused[1])
    assert len(refused) == 2


@pytest.mark.parametrize("weights", ["hf://name", "hf://", "hf://a/b@", "hf://a/b@c@d", "hf://a//b", "hf://a/b@c/"])
def test_another_form_is_refused(weights):
    with pytest.raises(CheckpointError, match=naming(f"'{weights}'", "hf://user/name@revision")):
        download.fetch(weights, "12345678")


@pytest.mark.parametrize(("weights", "asked"), [
    ("hf://u/n", ("u/n", "model.safetensors", None)), ("hf://u/n@v1", ("u/n", "model.safetensors", "v1")),
    ("hf://u/n@refs%2Fpr%2F1/sub/x.pth", ("u/n", "sub/x.pth", "refs/pr/1")), ("hf://u/n/x.pth", ("u/n", "x.pth", None)),
])  # fmt: skip
def test_what_a_name_asks_for(monkeypatch, weights, asked):
    seen = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, file, *, revision: seen.append((repo, file, revision)) or "x"
    )
    assert hub_files.download(weights) == "x"
    assert seen == [asked]


def test_without_a_sum_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(hub_files, "download", lambda weights: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match=naming("MODEL.WEIGHTS_SHA256", "'hf://u/n@v1'")):
        download.fetch("hf://u/n@v1")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, trained, capsys):
    monkeypatch.setattr(hub_files, "is_installed", lambda name: False)
    with pytest.raises(CheckpointError, match="huggingface_hub") as caught:
        download.fetch("hf://u/n@v1", "12345678")
    assert "[hub]" in str(caught.value)
    monkeypatch.setattr(push_to_hub, "is_installed", lambda name: False)
    assert push_to_hub.main(arguments(trained[1], "--dry-run")) == 2
    assert "[hub]" in capsys.readouterr().err


def test_a_hub_that_refuses_is_told_and_the_folder_stays(trained, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("401 Unauthorized\nfor url")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    assert push_to_hub.main(arguments(trained[1])) == 2
    said = capsys.readouterr().err
    assert naming("user/name", "401 Unauthorized for url").search(said)
    assert (trained[1] / "hub" / "model.safetensors").is_file()


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", ""])
def test_a_name_that_no_repository_can_have_is_refused(trained, capsys, repo):
    line = arguments(trained[1], "--dry-run")
    line[line.index("user/name")] = repo
    assert push_to_hub.main(line) == 2
    assert naming("--repo", f"'{repo}'").search(capsys.readouterr().err)


def test_the_config_of_a_repository_is_complete(trained):
    cfg, folder = trained
    prepare_folder(cfg, folder / "hub", "user/name")
    opts = ["MODEL.WEIGHTS", str(folder / "hub" / "model.safetensors")]
    again = setup_cfg(str(folder / "hub" / "config.yaml"), opts, splits=())
    assert list(again.MODEL.DN_DETR.CLASS_NAMES) == NAMES
    assert again.MODEL.DN_DETR.NUM_QUERIES == cfg.MODEL.DN_DETR.NUM_QUERIES


def test_a_card_that_was_completed_is_kept(trained, capsys):
    _, folder = trained
    assert push_to_hub.main(arguments(folder, "--dry-run")) == 0
    card = folder / "hub" / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit") + "Mine: é\n", encoding="utf-8")
    assert push_to_hub.main(arguments(folder, "--dry-run")) == 0
    assert "license: mit" in card.read_text(encoding="utf-8")
    assert "Mine: é" in card.read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["repository", "weights"])
def test_the_card_of_another_model_is_neither_kept_nor_overwritten(trained, capsys, change):
    cfg, folder = trained
    assert push_to_hub.main(arguments(folder, "--dry-run")) == 0
    before = {path.name: path.read_bytes() for path in (folder / "hub").iterdir()}
    line = arguments(folder, "--dry-run")
    if change == "repository":
        line[line.index("user/name")] = "user/name2"
    else:
        state = {name: x + 1 for name, x in torch.load(folder / "model_final.pth", weights_only=True)["model"].items()}
        write_checkpoint(folder / "model_final.pth", CheckpointFile(state, NAMES, cfg.dump()))
    assert push_to_hub.main(line) == 2
    assert naming("README.md", "--output").search(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in (folder / "hub").iterdir()} == before


def test_the_folder_of_a_training_is_not_written_into(trained, capsys):
    _, folder = trained
    before = (folder / "config.yaml").read_bytes()
    assert push_to_hub.main(arguments(folder, "--dry-run", "--output", str(folder))) == 2
    assert naming("config.yaml", "--output").search(capsys.readouterr().err)
    assert (folder / "config.yaml").read_bytes() == before


def test_only_what_was_written_is_uploaded(trained, monkeypatch):
    _, folder = trained
    seen = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **options: seen.update(options) or SimpleNamespace(oid="0")
    )
    (folder / "hub").mkdir()
    (folder / "hub" / "secret.pth").write_bytes(b"x")
    assert push_to_hub.main(arguments(folder)) == 0
    written = {"README.md", "config.yaml", "model.safetensors", "model.safetensors.sha256"}
    assert set(filter_repo_objects(os.listdir(folder / "hub"), allow_patterns=seen["allow_patterns"])) == written


def test_classes_of_auto_and_a_confusion_matrix_leave_no_trace(trained, tmp_path):
    cfg, _ = trained
    cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.CLASS_NAMES = None, []
    cfg.MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX = str(tmp_path / "secret" / "confusion_matrix.json")
    prepare_folder(cfg, tmp_path / "out", "user/name")
    assert "secret" not in (tmp_path / "out" / "config.yaml").read_text()
    assert "5 classes" in (tmp_path / "out" / "README.md").read_text()
    pushed = setup_cfg(str(tmp_path / "out" / "config.yaml"), splits=())
    assert (pushed.MODEL.DN_DETR.NUM_CLASSES, list(pushed.MODEL.DN_DETR.CLASS_NAMES)) == (5, NAMES)
