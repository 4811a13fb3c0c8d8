"""A training that begins in the folder of another, is resumed there, or evaluated from there: nothing is mixed or lost."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from naming import naming
from toy_training import OPTIONS, command, load, make_cfg, train

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.checkpoint.resume import has_checkpoints, moved_path, set_aside
from dn_detr_d2.commands import convert_checkpoint
from dn_detr_d2.commands import train as program
from dn_detr_d2.engine import Trainer, check_processes
from dn_detr_d2.engine.trainer import scaled_to_workers

SEMI = ("SEMI_SUPERVISED.ENABLED", True, "MODEL_EMA.ENABLED", True, "SEMI_SUPERVISED.BURN_IN", 1)
SHORT = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 1)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(options, *overrides) -> (exit code, stderr) of the program in tmp_path/out."""
    monkeypatch.setattr(program, "launch", lambda work, *_: (work(_[-1][0]), 0)[1])

    def call(options=(), *overrides):
        code = program.main(command(tmp_path / "out", *options, overrides=(*SHORT, *overrides))[1:])
        return code, capsys.readouterr().err

    return call


def test_a_refused_resume_leaves_the_config_that_it_names(run, tmp_path):
    assert run()[0] == 0
    before = (tmp_path / "out" / "config.yaml").read_bytes()
    code, said = run(["--resume"], "MODEL.DN_DETR.HIDDEN_DIM", 32, "SOLVER.MAX_ITER", 3)
    assert code
    assert naming("config.yaml").search(said.splitlines()[-1])
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before
    assert not list((tmp_path / "out").glob("earlier_*"))
    assert run(["--resume", "--config-file", str(tmp_path / "out" / "config.yaml")], "SOLVER.MAX_ITER", 3)[0] == 0


def test_an_earlier_training_is_moved_and_none_of_it_is_mixed(run, tmp_path, caplog):
    assert run()[0] == 0
    out = tmp_path / "out"
    (out / "best_metric.json").write_text('{"metric": "bbox/AP", "value": 50.0, "iteration": 0}')
    (out / "notes.txt").write_text("mine")
    first = torch.load(out / "model_final.pth", weights_only=True)["model"]
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        assert run([], "SEED", 9)[0] == 0
    assert naming(out / "earlier_1").search(caplog.text)
    moved = {path.name for path in (out / "earlier_1").iterdir()}
    assert {"model_final.pth", "model_final.pth.sha256", "metrics.json", "best_metric.json", "config.yaml",
            "last_checkpoint"} <= moved  # fmt: skip
    assert all(torch.equal(x, first[name]) for name, x in load(out / "earlier_1")["model"].items())
    assert not (out / "best_metric.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert len({line["iteration"] for line in lines}) == len(lines)
    assert run(["--resume"], "SOLVER.MAX_ITER", 3)[0] == 0
    assert not (out / "earlier_2").exists()


@pytest.mark.parametrize("name", ["model_0000000.pth", "model_final.pth"])
def test_a_training_begins_with_a_checkpoint_of_its_own_folder_and_does_not_lose_it(run, tmp_path, name):
    """It moves with the others: the new model_final.pth would overwrite it."""
    assert run()[0] == 0
    out = tmp_path / "out"
    before = (out / name).read_bytes()
    assert run(["--config-file", str(out / "config.yaml")], "MODEL.WEIGHTS", out / name)[0] == 0
    assert (out / "earlier_1" / name).read_bytes() == before
    assert (out / name).read_bytes() != before
    assert yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["WEIGHTS"] == str(out / "earlier_1" / name)


def test_a_training_that_has_written_nothing_is_not_resumed_from_what_it_began_with(run, tmp_path, monkeypatch):
    """Interrupted before its first checkpoint, it would seem to be the earlier training, which is complete."""
    assert run()[0] == 0
    out = tmp_path / "out"
    start = ("MODEL.WEIGHTS", out / "model_final.pth")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run([], *start)[0] == 1
    assert not has_checkpoints(out)
    code, said = run(["--resume"], *start)
    assert code == 2
    assert naming("MODEL.WEIGHTS", out / "earlier_1" / "model_final.pth").search(said)
    assert run(["--resume"], "MODEL.WEIGHTS", out / "earlier_1" / "model_final.pth")[0] == 0


def contents(folder):
    """{path: bytes} below a folder, without what the writers of this process have still open."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("events.out", "log.txt"))
    ]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["MODEL.FREEZE", "['backbon']"], ["MODEL.FREEZE", "backbon"]),
        (["MODEL.FREEZE", "[['backbone']]"], ["MODEL.FREEZE"]),
        (["SOLVER.EARLY_STOPPING.PATIENCE", 5], ["SOLVER.EARLY_STOPPING.PATIENCE", "TEST.EVAL_PERIOD"]),
        (["TEST.INSTABILITY.NUM_IMAGES", 5], ["TEST.INSTABILITY.NUM_IMAGES", "DATASETS.TEST"]),
        (["TEST.VALIDATION_LOSS", 5], ["TEST.VALIDATION_LOSS", "DATASETS.TEST"]),
        (
            [
                *("TEST.INSTABILITY.HEALTH_SCALES", "[0.4]", "TEST.INSTABILITY.NUM_IMAGES", 5),
                *("MODEL.DN_DETR.DENOISING.NAME", "", "DATASETS.TEST", "('shapes_val',)"),
            ],
            ["TEST.INSTABILITY.HEALTH_SCALES", "MODEL.DN_DETR.DENOISING.NAME"],
        ),
        ([*SEMI, "DATASETS.UNLABELED", "('coco_2017_val',)"], ["coco_2017_val", "does not exist"]),
        ([*SEMI, "SEMI_SUPERVISED.LOSSES", "[['matching']]"], ["SEMI_SUPERVISED.LOSSES"]),
    ],
)
def test_what_is_refused_leaves_the_training_of_the_folder_alone(run, tmp_path, overrides, named):
    assert run()[0] == 0
    before = contents(tmp_path / "out")
    code, said = run([], *overrides)
    assert code == 2
    assert naming(*named).search(said.splitlines()[-1])
    assert contents(tmp_path / "out") == before


def test_a_training_that_cannot_begin_puts_back_what_it_has_moved(run, tmp_path, monkeypatch):
    """What is wrong is found where the images are looked at, after the folder has been made ready."""
    assert run()[0] == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr(Trainer, "build_train_loader", lambda *_: refuse())
    code, said = run()
    assert (code, said.splitlines()[-1]) == (1, "error: no box")
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("earlier_*"))


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resumed"])
def test_what_a_hook_refuses_before_the_first_step_leaves_the_training_as_it_was(run, tmp_path, monkeypatch, resume):
    """Such as a record of other images than those that the diagnostics are to look at."""
    assert run([], "SOLVER.MAX_ITER", 2)[0] == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr("dn_detr_d2.engine.hooks.settle.SettleHook.before_train", lambda *_: refuse(), raising=False)
    code, said = run(resume, "SOLVER.MAX_ITER", 3)
    assert (code, said.splitlines()[-1]) == (1, "error: no box")
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("earlier_*"))


def test_predictions_and_reports_of_the_earlier_training_move_with_it(run, tmp_path):
    """A confusion matrix of theirs, with which the new training noises labels, too."""
    out = tmp_path / "out"
    assert run()[0] == 0
    kept = {out / folder / "a.json" for folder in ("inference", "ema", "report", "nan_report")}
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    matrix = out / "inference" / "confusion_matrix.json"
    matrix.write_text("{}")
    assert moved_path(str(matrix), out / "earlier_1") == str(matrix)  # as long as it is there
    key = "MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX"
    assert run([], key, matrix)[0] == 0
    moved = out / "earlier_1" / "inference" / "confusion_matrix.json"
    assert all((out / "earlier_1" / path.relative_to(out)).is_file() for path in kept)
    assert not any(path.exists() for path in kept)
    noise = yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["DN_DETR"]["DENOISING"]["LABEL_NOISE"]
    assert noise["CONFUSION_MATRIX"] == str(moved)


def refuse():
    raise DatasetError("no box")


def test_a_folder_without_a_training_is_left_alone(tmp_path):
    for name in ("config.yaml", "log.txt", "events.out.tfevents.1"):
        (tmp_path / name).write_text("x")
    assert set_aside(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("options", ["", "?matching_heuristics=True"])
def test_weights_are_found_where_they_were_moved_to(tmp_path, options):
    """Options may follow the name, as in Detectron2. What is elsewhere, or is a link to elsewhere, stays what it was."""
    for name in ("model_final.pth", "model_final.pth.sha256"):
        (tmp_path / name).write_text("x")
    target = set_aside(tmp_path)
    assert len(list(target.iterdir())) == 2
    assert moved_path(f"{tmp_path}/model_final.pth{options}", target) == f"{target}/model_final.pth{options}"
    (tmp_path / "start.pth").symlink_to(tmp_path / "model_final.pth")
    assert moved_path(f"{tmp_path}/start.pth{options}", target) == f"{target}/model_final.pth{options}"
    for other in ("", "pypi://x", f"{tmp_path}/other/model_final.pth{options}"):
        assert moved_path(other, target) == other


def test_a_resume_does_not_need_the_weights_that_its_training_began_with(run, tmp_path):
    assert run()[0] == 0
    (tmp_path / "out" / "model_0000000.pth").rename(tmp_path / "start.pth")
    started = ("MODEL.WEIGHTS", tmp_path / "start.pth")
    assert run([], *started)[0] == 0
    (tmp_path / "start.pth").unlink()
    assert run(["--resume"], *started, "SOLVER.MAX_ITER", 3)[0] == 0
    assert run([], *started)[0] == 2  # a new training does


def test_an_evaluation_of_a_trainings_config_asks_for_the_weights(run, tmp_path, capsys):
    """Those of its config.yaml are what it began with."""
    assert run()[0] == 0
    (tmp_path / "out" / "model_0000000.pth").rename(tmp_path / "start.pth")
    assert run([], "MODEL.WEIGHTS", tmp_path / "start.pth")[0] == 0
    line = ["--eval-only", "--config-file", str(tmp_path / "out" / "config.yaml"), "DATASETS.TEST", "('shapes_val',)"]
    assert program.main(line) == 2
    assert naming("MODEL.WEIGHTS", "start.pth", "model_final.pth").search(capsys.readouterr().err)


def test_an_evaluation_takes_the_weights_of_a_users_own_file_beside_a_training(run, tmp_path):
    """Only config.yaml is the training's."""
    assert run()[0] == 0
    out = tmp_path / "out"
    content = yaml.safe_load((out / "config.yaml").read_text())
    content["MODEL"]["WEIGHTS"], content["DATASETS"]["TEST"] = str(out / "model_final.pth"), ["shapes_val"]
    (out / "mine.yaml").write_text(yaml.safe_dump(content))
    assert program.main(["--eval-only", "--config-file", str(out / "mine.yaml")]) == 0


@pytest.mark.parametrize(("key", "value"), [("SOLVER.BASE_LR", 0.5), ("SOLVER.WEIGHT_DECAY", 0.25)])
def test_rates_of_a_checkpoint_are_said(tmp_path, caplog, key, value):
    short = (*SHORT, "SOLVER.WEIGHT_DECAY", 0.125)
    train(make_cfg(tmp_path, *short))
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        train(make_cfg(tmp_path, *short, "SOLVER.MAX_ITER", 3), resume=True)
        assert key not in caplog.text
        train(make_cfg(tmp_path, *short, "SOLVER.MAX_ITER", 4, key, value), resume=True)
    assert naming(key).search(caplog.text)


def test_samplers_go_on_with_another_order_after_each_checkpoint(tmp_path):
    cfg = make_cfg(
        tmp_path, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.5
    )

    def order():
        np.random.seed(cfg.SEED)  # as each start of a training does
        return [
            x["image_id"] for _, batch in zip(range(4), Trainer.build_train_loader(cfg), strict=False) for x in batch
        ]

    fresh = order()
    assert order() == fresh
    orders = [fresh]
    for name in ("model_0000009.pth", "model_0000019.pth"):
        (tmp_path / name).touch()
        (tmp_path / "last_checkpoint").write_text(name)
        orders.append(order())
    assert len(set(map(tuple, orders))) == 3


def test_a_checkpoint_is_not_converted_over_itself(run, tmp_path, capsys):
    assert run()[0] == 0
    final = tmp_path / "out" / "model_final.pth"
    before = final.read_bytes()
    line = [str(final), str(final), "--config-file", str(tmp_path / "out" / "config.yaml")]
    assert convert_checkpoint.main(line) == 2
    assert naming(final).search(capsys.readouterr().err)
    assert final.read_bytes() == before


@pytest.mark.parametrize(("images", "reference", "processes", "steps", "fits"), [
    (16, 8, 3, 1, True), (8, 8, 16, 1, True), (16, 8, 1, 4, False), (16, 0, 3, 1, False),
])  # fmt: skip
def test_the_batch_that_is_divided_is_the_scaled_one(tmp_path, images, reference, processes, steps, fits):
    cfg = make_cfg(tmp_path, *OPTIONS, "SOLVER.IMS_PER_BATCH", images, "SOLVER.ACCUMULATION_STEPS", steps,
                   "SOLVER.REFERENCE_WORLD_SIZE", reference)  # fmt: skip
    cfg = scaled_to_workers(cfg, processes)
    if fits:
        check_processes(cfg, processes, cpu_wanted=True)
    else:
        with pytest.raises(ConfigError, match=naming("SOLVER.IMS_PER_BATCH")):
            check_processes(cfg, processes, cpu_wanted=True)
