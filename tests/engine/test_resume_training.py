"""A resumed training is bitwise identical to one that was not stopped."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from naming import naming
from ranks import on_ranks
from toy_training import differing, load, make_cfg, stop_at, train

from dn_detr_d2 import CheckpointError
from dn_detr_d2.engine import BestCheckpointer, EarlyStopping, EvaluationRecord, RepeatEvaluation


@pytest.mark.parametrize("options", [
    pytest.param([], id="one process"),
    pytest.param(["DATALOADER.NUM_WORKERS", 2], id="two loader workers"),
    pytest.param(["DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 3], id="evaluation at the checkpoint"),
    pytest.param(["SEED", -1], id="no seed"),
    pytest.param(["MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.9], id="averaged weights"),
])  # fmt: skip
def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, options):
    train(make_cfg(tmp_path / "whole", *options))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    resumed = train(make_cfg(tmp_path / "stopped", *options), resume=True, seed=99)
    assert resumed.start_iter == 3
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []


def test_a_finished_training_that_is_resumed_is_evaluated_at_its_last_iteration(tmp_path):
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 2]
    for resume in (False, True):
        assert train(make_cfg(tmp_path, *options), resume=resume).iter == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    evaluated = {line["iteration"]: line["bbox/AP"] for line in lines if "bbox/AP" in line}
    assert list(evaluated) == [2]
    assert json.loads((tmp_path / "last_evaluation.json").read_text()) == {"iteration": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_resumed_equal_two_that_were_not_stopped(tmp_path, workers):
    options = ["DATALOADER.NUM_WORKERS", workers]
    on_ranks(train, make_cfg(tmp_path / "whole", *options))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    on_ranks(train, make_cfg(tmp_path / "stopped", *options), True, 99)
    assert len(load(tmp_path / "whole")["random_states"]) == 2
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []


def test_the_comparison_sees_another_seed(tmp_path):
    for name in ("a", "b"):
        train(make_cfg(tmp_path / name, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()), seed=ord(name))
    found = differing(load(tmp_path / "a"), load(tmp_path / "b"))
    assert any(name.startswith(".model.") for name in found)
    assert any(name.startswith(".random_states.") for name in found)


def test_random_states_of_another_number_of_processes_are_not_used_silently(tmp_path, caplog):
    train(make_cfg(tmp_path / "whole", "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()))
    state = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    state["random_states"] *= 2
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other" / "model_final.pth")
    (tmp_path / "other" / "last_checkpoint").write_text("model_final.pth")
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        train(make_cfg(tmp_path / "other", "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()), resume=True)
    assert any(naming(2, 1).search(text) and "random states" in text for text in caplog.messages)


def test_random_states_that_cannot_be_set_are_refused_in_one_sentence(tmp_path):
    train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()))
    path = tmp_path / "out" / "model_final.pth"
    state = torch.load(path, weights_only=True)
    state["random_states"][0] = {"torch": torch.zeros(3)}
    torch.save(state, path)
    path.with_name("model_final.pth.sha256").unlink()
    with pytest.raises(CheckpointError, match=naming("model_final.pth")):
        train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()), resume=True)


def hook_of(record, folder):
    """A hook that reads the file, in a training that is resumed."""
    if record == "early_stopping.json":
        hook = EarlyStopping(SimpleNamespace(save_dir=folder), 1, ["bbox/AP"], 3)
    else:
        hook = BestCheckpointer(1, SimpleNamespace(save_dir=folder), "ema/bbox/AP" if "ema" in record else "bbox/AP")
    hook.trainer = SimpleNamespace(start_iter=3)
    return hook


WRONG = ["", "{", "[]", "[1, 2]", "7", "null", "{}", "\xff", "[" * 100_000, "9" * 5000]
VALUES = ["null", '"5"', "[5]", "true", "{}", "1" + "0" * 400]


@pytest.mark.parametrize("text", [
    *WRONG,
    *(f'{{"value": {x}, "iteration": 2, "history": [[2, {x}]]}}' for x in VALUES),
    *(f'{{"value": 5.0, "iteration": {x}, "history": [[{x}, 5.0]]}}' for x in (*VALUES, "NaN", "Infinity")),
    '{"value": NaN, "iteration": 2, "history": [2, 5.0]}',
])  # fmt: skip
@pytest.mark.parametrize("record", ["best_metric.json", "best_metric_ema.json", "early_stopping.json"])
def test_a_damaged_record_of_a_hook_is_refused_in_one_sentence(tmp_path, record, text):
    (tmp_path / record).write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError, match=rf"^\S+/{record} ") as caught:
        hook_of(record, tmp_path).before_train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [*WRONG, *(f'{{"iteration": {x}}}' for x in (*VALUES, "NaN", "Infinity"))])
def test_a_damaged_record_of_evaluations_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "last_evaluation.json").write_text(text, encoding="latin1")
    record = RepeatEvaluation(EvaluationRecord(str(tmp_path), 1), [])
    record.trainer = SimpleNamespace(start_iter=3, max_iter=9)
    with pytest.raises(CheckpointError, match=naming("last_evaluation.json")) as caught:
        record.before_train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("last", "period", "start", "repeated"), [
    (2, 2, 4, True), (4, 2, 4, False), (6, 2, 4, False), (2, 3, 4, False), (None, 2, 4, False), (0, 0, 4, False),
    (2, 2, 8, False),
])  # fmt: skip
def test_only_an_evaluation_that_was_due_and_cut_off_is_repeated(tmp_path, last, period, start, repeated):
    """The hooks see the iteration before the start, and the last iteration's evaluation comes after the training anyway."""
    if last is not None:
        (tmp_path / "last_evaluation.json").write_text(json.dumps({"iteration": last}))
    seen = []
    storage = SimpleNamespace(iter=start)
    trainer = SimpleNamespace(start_iter=start, max_iter=8, iter=start, storage=storage)
    hook = SimpleNamespace(after_step=lambda: seen.append((trainer.iter, trainer.storage.iter)))
    record = EvaluationRecord(str(tmp_path), period)
    again = RepeatEvaluation(record, [hook, record])
    record.trainer = again.trainer = trainer
    again.before_train()
    assert seen == [(start - 1, start - 1)] * repeated
    assert (trainer.iter, storage.iter) == (start, start)
    if repeated:
        assert json.loads((tmp_path / "last_evaluation.json").read_text()) == {"iteration": start}


def test_a_record_that_is_whole_is_taken_up_and_none_is_none(tmp_path):
    best, early = (hook_of(name, tmp_path) for name in ("best_metric.json", "early_stopping.json"))
    best.before_train()
    early.before_train()
    assert (best.best_metric, early.history) == (None, [])
    (tmp_path / "best_metric.json").write_text('{"metric": "bbox/AP", "value": 40, "iteration": 2}')
    (tmp_path / "early_stopping.json").write_text('{"history": [[1, 5.0], [2, NaN], [4, 6.0]]}')
    best.before_train()
    early.before_train()
    assert (best.best_metric, best.best_iter) == (40.0, 2)
    assert str(early.history) == "[(1, 5.0), (2, nan)]"
