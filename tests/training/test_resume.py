"""A training that is stopped and resumed is, to the bit, the training that was not stopped."""

import logging
import shutil

import pytest
import torch
from detectron2.engine import launch
from toy_training import differing, load, make_cfg, train


def stop_at(folder, name, target):
    """A folder as a stop after the checkpoint ``name`` leaves it."""
    target.mkdir()
    for file in folder.glob(f"{name}.pth*"):
        shutil.copy(file, target)
    (target / "last_checkpoint").write_text(f"{name}.pth")


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


def test_two_processes_resumed_equal_two_that_were_not_stopped(tmp_path):
    launch(train, 2, dist_url="auto", args=(make_cfg(tmp_path / "whole"),))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    launch(train, 2, dist_url="auto", args=(make_cfg(tmp_path / "stopped"), True, 99))
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
    assert "has the random states of 2 processes, this training has 1" in caplog.text
