"""A training ends when evaluations have stopped getting better: all ranks together, also after a resume."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from naming import naming
from ranks import on_ranks
from toy_training import differing, load, make_cfg, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine.hooks.early_stopping import without_improvement

SCORES = (1.0, 3.0, 2.0, 3.0, 2.5, 9.0, 9.5, 9.0)  # AP after 1, 2, ... iterations
DATA = ["DATASETS.TEST", ("shapes_val",), "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1]
PATIENT = [*DATA, "SOLVER.EARLY_STOPPING.PATIENCE", 3, "SOLVER.MAX_ITER", 8]


class Scored(Trainer):
    """A trainer whose evaluations say what SCORES say."""

    def __init__(self, *args):
        super().__init__(*args)
        type(self).last = self

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Nothing on other ranks, as Detectron2's."""
        return {"bbox": {"AP": SCORES[min(cls.last.iter, 7)]}} if comm.is_main_process() else {}


@pytest.fixture
def _scored(monkeypatch):
    monkeypatch.setattr("toy_training.Trainer", Scored)


@pytest.mark.parametrize(("values", "min_delta", "expected"), [
    ([], 0, 0),
    ([5], 0, 0),
    ([5, 4, 4.5], 0, 2),
    ([5, 4, 5], 0, 2),  # as good is not better
    ([5, 4, 5.1], 0, 0),
    ([5, 5.4, 5.8], 0.5, 0),  # 5.8 is measured against 5, the last that counted
    ([5, 5.4, 5.4], 0.5, 2),
    ([math.nan, math.nan], 0, 0),  # there is nothing to improve on
    ([math.nan, 1, math.nan, 1], 0, 2),
    ([math.nan, 1], 0, 0),
])  # fmt: skip
def test_evaluations_without_improvement(values, min_delta, expected):
    assert without_improvement(list(enumerate(values, 1)), min_delta) == expected


@pytest.mark.parametrize(("start", "expected"), [(0, 4), (1, 4), (3, 2), (4, 1), (5, 0), (9, 0)])
def test_evaluations_before_the_start_do_not_count_but_are_what_is_improved_on(start, expected):
    assert without_improvement(list(enumerate([5, 4, 4, 4.5, 4.9], 1)), start=start) == expected


@pytest.mark.usefixtures("_scored")
def test_patience_does_not_run_out_before_pseudo_labels_are_used(tmp_path):
    """It would after iteration 4, as above: with the burn-in, 2.5 after it is the only one that counts before 9."""
    semi = ["SEMI_SUPERVISED.ENABLED", True, "SEMI_SUPERVISED.BURN_IN", 5, "DATASETS.UNLABELED", ("shapes_val",)]
    train(make_cfg(tmp_path, *PATIENT, *semi, "MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5))
    assert load(tmp_path)["iteration"] == 7


@pytest.mark.usefixtures("_scored")
def test_it_ends_after_three_that_are_not_better_and_is_resumed_with_its_count(tmp_path, caplog, monkeypatch):
    """3 after iteration 2 is the best; 2, 3 and 2.5 follow."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        trainer = train(make_cfg(whole, *PATIENT))
    assert any(naming("bbox/AP", 3, 4, 8).search(text) for text in caplog.messages)
    assert (trainer.iter, load(whole)["iteration"]) == (4, 4)
    assert (whole / "last_checkpoint").read_text() == "model_final.pth"
    last = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert (last["bbox/AP"], last["iteration"]) == (2.5, 4)

    with monkeypatch.context() as patch:
        step = Trainer.run_step
        patch.setattr(Trainer, "run_step", lambda self: step(self) if self.iter < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_cfg(stopped, *PATIENT))
    assert train(make_cfg(stopped, *PATIENT), resume=True, seed=99).iter == 4
    assert differing(load(whole), load(stopped)) == []

    caplog.clear()
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        assert train(make_cfg(whole, *PATIENT), resume=True).iter == 5
    assert naming(5).search(caplog.text)
    longer = train(make_cfg(whole, *PATIENT, "SOLVER.EARLY_STOPPING.PATIENCE", 4), resume=True)
    assert longer.iter == 8  # 9 and 9.5 are better


@pytest.mark.usefixtures("_scored")
def test_a_later_evaluation_does_not_count_for_an_earlier_checkpoint(tmp_path):
    folder = tmp_path / "out"
    train(make_cfg(folder, *PATIENT))
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    trainer = train(make_cfg(folder, *PATIENT), resume=True)
    assert trainer.start_iter == 2
    history = json.loads((folder / "early_stopping.json").read_text())["history"]
    assert history == [[i, score] for i, score in enumerate(SCORES[:5], 1)]


@pytest.mark.usefixtures("_scored")
def test_a_smaller_gain_than_asked_for_is_none(tmp_path):
    cfg = make_cfg(tmp_path / "out", *PATIENT, "SOLVER.EARLY_STOPPING.MIN_DELTA", 2.5)
    assert train(cfg).iter == 3  # 1, then 3, 2 and 3


def two_processes(cfg, folder):
    """What a rank does; writes down after which iteration it has left."""
    import toy_training

    toy_training.Trainer = Scored
    trainer = train(cfg)
    (Path(folder) / f"{comm.get_rank()}.txt").write_text(str(trainer.iter))


def test_two_processes_end_together(tmp_path):
    cfg = make_cfg(tmp_path / "out", *PATIENT, "SOLVER.EARLY_STOPPING.PATIENCE", 1)
    on_ranks(two_processes, cfg, str(tmp_path))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2", "2"]
    assert len(torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["random_states"]) == 2


@pytest.mark.parametrize("missing", [("TEST.EVAL_PERIOD", 0), ("DATASETS.TEST", ())])
def test_patience_without_evaluations_is_refused(tmp_path, missing):
    with pytest.raises(ConfigError, match=naming("EARLY_STOPPING.PATIENCE", 3, "TEST.EVAL_PERIOD")):
        Trainer(make_cfg(tmp_path / "out", *PATIENT, *missing))
