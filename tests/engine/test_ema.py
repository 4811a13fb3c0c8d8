"""The moving average of the weights: its arithmetic, its checkpoints, its evaluation."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from naming import naming
from toy_training import load, make_cfg, train

from dn_detr_d2 import CheckpointError, ConfigError
from dn_detr_d2.commands.convert_checkpoint import run as convert_tool
from dn_detr_d2.engine import AverageHook, Trainer, average_weights, evaluate, load_for_evaluation

ON = ["MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.75]
SHORT = ["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,)]


class Part(torch.nn.Module):
    """A weight, a running statistic, and a table of indices."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("index", torch.arange(50))


def test_three_steps_by_hand_and_a_skipped_one():
    """1; 0.9 * 1 + 0.1 * 2 = 1.1; 0.9 * 1.1 + 0.1 * 4 = 1.39. The weights before the first step do not count."""
    model, inner = Part(), SimpleNamespace(stepped=True)
    inner.when_settled = lambda callback: callback(inner.stepped)
    hook = AverageHook(average_weights(model, 0.9), model)
    hook.trainer = SimpleNamespace(_trainer=inner, start_iter=0, iter=0)
    hook.before_train()
    seen = []
    for weight, skipped in ((1.0, False), (2.0, False), (100.0, True), (4.0, False)):
        inner.stepped = not skipped
        model.weight.data.fill_(weight)
        model.mean.fill_(weight)
        hook.after_step()
        seen.append(hook.averaged.module.weight.item())
    assert seen == pytest.approx([1, 1.1, 1.1, 1.39])
    assert hook.averaged.module.mean.item() == 4  # copied
    assert hook.averaged.module.index.equal(torch.arange(50))  # 0.9 i + 0.1 i may be rounded below i
    assert not hook.averaged.module.training
    assert not hook.averaged.module.weight.requires_grad


@pytest.mark.parametrize(("restart", "skipped", "expected"), [
    (0, None, [1, 1.1, 1.39, 2.051]),
    (3, None, [1, 1.1, 4, 4.4]),
    (3, 2, [1, 1.1, 4, 8]),
])  # fmt: skip
def test_an_average_begins_anew_from_the_weights(restart, skipped, expected):
    """After the third of four steps, from the weights as they are, whether or not that step has changed them.

    The teacher labels with them, and a checkpoint of that moment is resumed with them.
    """
    model, inner = Part(), SimpleNamespace(stepped=True)
    inner.when_settled = lambda callback: callback(inner.stepped)
    hook, seen = AverageHook(average_weights(model, 0.9), model, restart), []
    for i, weight in enumerate((1.0, 2.0, 4.0, 8.0)):
        hook.trainer = SimpleNamespace(_trainer=inner, start_iter=0, iter=i)
        inner.stepped = i != skipped
        model.weight.data.fill_(weight)
        hook.after_step()
        seen.append(hook.averaged.module.weight.item())
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(("decay", "expected"), [(0.9, [1, 20 / 11, 38 / 11]), (0.2, [1, 20 / 11, 39.2 / 11])])
def test_a_decay_that_warms_up(decay, expected):
    """Of 1, 2, 4: 2/11 and 3/12 of what was, where DECAY is not smaller. After a restart it warms up anew."""
    model = Part()
    average = average_weights(model, decay, warmup=True)
    for _ in range(2):
        seen = []
        for weight in (1.0, 2.0, 4.0):
            model.weight.data.fill_(weight)
            average.update_parameters(model)
            seen.append(average.module.weight.item())
        assert seen == pytest.approx(expected)
        average.n_averaged.zero_()


def test_a_warm_up_looks_back_over_a_ninth_of_the_steps():
    """Weights are the number of the step. A mean of the last m has the age m / 2, one that decays by 1 - 1 / m has m."""
    model = Part()
    average = average_weights(model, 0.9999, warmup=True)
    for step in range(1, 901):
        model.weight.data.fill_(step)
        average.update_parameters(model)
    assert 80 < 900 - average.module.weight.item() < 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and trainer of three steps with a checkpoint each, and a real evaluation at the end."""
    folder = tmp_path_factory.mktemp("trained")
    data = ["DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 1]
    return folder, train(make_cfg(folder, *ON, *SHORT, *data))


def test_the_average_of_a_training_is_that_of_its_checkpoints(trained):
    """1/4 (2/11 w1 + 9/11 w2) + 3/4 w3 of every weight, in float64: DECAY = 0.75 is not reached yet."""
    folder, _ = trained
    states = [load(folder, f"model_{i:07d}")["model"] for i in range(3)]
    average = load(folder)["model_ema"]
    assert average.pop("n_averaged") == 3
    moved = 0
    for name, x in average.items():
        first, second, third = (state[name.removeprefix("module.")].double() for state in states)
        expected = (2 / 11 * first + 9 / 11 * second) / 4 + 0.75 * third
        torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=1e-6, msg=name)
        moved += not x.equal(states[2][name.removeprefix("module.")])
    assert len(average) == len(states[0])
    assert moved > 50


def test_the_weights_are_those_of_a_training_without_average(trained, tmp_path):
    train(make_cfg(tmp_path / "plain", *SHORT))
    plain, averaged = load(tmp_path / "plain")["model"], load(trained[0])["model"]
    assert [name for name in plain if not plain[name].equal(averaged[name])] == []


def test_eval_only_finds_what_the_training_found_with_the_average(trained, tmp_path):
    folder, trainer = trained
    cfg = make_cfg(
        tmp_path / "out", "DATASETS.TEST", ("shapes_val",), "MODEL.WEIGHTS", str(folder / "model_best_ema.pth")
    )
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = True
    results = evaluate(cfg)["bbox"]
    assert results["AP"] == pytest.approx(trainer.storage.latest()["ema/bbox/AP"][0])
    found = Path("inference") / "coco_instances_results.json"
    detections, of_training, of_weights = (
        json.loads((base / found).read_text()) for base in (tmp_path / "out", folder / "ema", folder)
    )
    assert len(detections) == len(of_training)
    for found, expected in zip(detections, of_training, strict=True):  # with folded norms: the same but for rounding
        assert found["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=1e-3)
    assert max(abs(x["score"] - y["score"]) for x, y in zip(detections, of_weights, strict=True)) > 1e-5
    assert {"metric", "value"} < json.loads((folder / "best_metric_ema.json").read_text()).keys()


def test_the_tool_makes_a_file_of_the_average(trained, tmp_path):
    folder, trainer = trained
    cfg = make_cfg(tmp_path)
    (tmp_path / "toy.yaml").write_text(cfg.dump())
    arguments = {"source": folder / "model_final.pth", "target": tmp_path / "ema.pth", "ema": True, "classes": None}
    convert_tool(SimpleNamespace(**arguments, config_file=str(tmp_path / "toy.yaml"), safetensors=False, opts=[]))
    cfg.MODEL.WEIGHTS = str(tmp_path / "ema.pth")
    state = load_for_evaluation(cfg).state_dict()
    expected = trainer.averaged.module.state_dict()
    assert [name for name in state if not state[name].equal(expected[name])] == []


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors"])
def test_a_file_without_average_is_refused_where_one_is_asked_for(trained, tmp_path, name):
    from dn_detr_d2.checkpoint import CheckpointFile, write_checkpoint

    write_checkpoint(tmp_path / name, CheckpointFile({"x": torch.ones(1)}))
    cfg = make_cfg(tmp_path, "MODEL.WEIGHTS", str(tmp_path / name), "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY", True)
    with pytest.raises(CheckpointError, match=naming("model_ema", "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY")):
        load_for_evaluation(cfg)


def test_an_average_that_begins_with_a_resume_says_so(tmp_path, caplog):
    train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        trainer = train(make_cfg(tmp_path / "out", *SHORT, *ON), resume=True)
    assert any(naming(2).search(text) and "averag" in text for text in caplog.messages)
    weights, average = trainer.model.state_dict(), trainer.averaged.module.state_dict()
    assert all(weights[name].equal(average[name]) for name in weights)  # after its first step


def test_an_average_that_begins_with_a_resume_is_the_model_before_its_first_step(tmp_path):
    """A teacher of pseudo labels, or an evaluation that is repeated, uses it before that."""
    train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    trainer = Trainer(make_cfg(tmp_path / "out", *SHORT, *ON))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    average, saved = trainer.averaged.module.state_dict(), load(tmp_path / "out")["model"]
    assert all(x.equal(average[name]) for name, x in saved.items())


def test_both_have_a_best_checkpoint_of_their_own(tmp_path, monkeypatch):
    values = {"weights": iter([3.0, 2.0, 1.0]), "average": iter([1.0, 2.0, 1.5])}

    def test(cls, cfg, model):
        return {"bbox": {"AP": next(values["average" if cfg.OUTPUT_DIR.endswith("ema") else "weights"])}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    train(make_cfg(tmp_path / "out", *ON, *SHORT, "DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 1))
    assert load(tmp_path / "out", "model_best")["iteration"] == 0
    assert load(tmp_path / "out", "model_best_ema")["iteration"] == 1
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(tmp_path, decay):
    with pytest.raises(ConfigError, match=naming("MODEL_EMA.DECAY", decay)):
        make_cfg(tmp_path, "MODEL_EMA.DECAY", decay)
