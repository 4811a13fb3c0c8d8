import os
import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from naming import naming

from dn_detr_d2 import CheckpointError
from dn_detr_d2.engine import load_for_evaluation
from dn_detr_d2.predictor import Predictor


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def hostile_cfg(toy_cfg, tmp_path):
    """A config whose weights are a pickle that makes a folder when it is read."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Payload(tmp_path / "canary")}, "__author__": "x"}))
    return toy_cfg("dn_detr", "MODEL.WEIGHTS", str(path))


@pytest.mark.parametrize("predictor", [Predictor, DefaultPredictor])
@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_a_hostile_pickle_is_refused_before_anybody_runs_it(hostile_cfg, predictor, query, tmp_path):
    hostile_cfg.MODEL.WEIGHTS += query
    with pytest.raises(CheckpointError, match=naming("posix.mkdir")):
        predictor(hostile_cfg)
    assert not (tmp_path / "canary").exists()


def test_it_predicts_what_detectron2s_predictor_predicts(toy_cfg, toy_model, tmp_path):
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    cfg = toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64)
    cfg.freeze()
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    ours, theirs = (predictor(cfg)(image)["instances"] for predictor in (Predictor, DefaultPredictor))
    assert len(ours) > 0
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(ours.scores, theirs.scores)


def test_weights_that_lack_a_tensor_are_refused(toy_cfg, toy_model, tmp_path):
    state = toy_model("dn_detr").state_dict()
    gone, _ = state.popitem()
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=naming("model.pth", gone)):
        Predictor(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "model.pth")))


def other_classes(toy_model):
    return {"model": toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 7).state_dict()}


FILES = {
    "another number of classes": other_classes,
    "another system": lambda toy_model: {"model": toy_model("dab_deformable_detr").state_dict()},
    "not a detector": lambda toy_model: torch.nn.Linear(2, 2).state_dict(),
    "a backbone alone": lambda toy_model: {
        name: x for name, x in toy_model("dn_detr").state_dict().items() if name.startswith("backbone.")
    },
    "nothing": lambda toy_model: {},
    "no weights": lambda toy_model: {"model": {}},
    "an optimizer alone": lambda toy_model: {"optimizer": {"state": {}, "param_groups": []}, "iteration": 3},
}


@pytest.mark.parametrize("load", [Predictor, load_for_evaluation])
@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_not_of_this_model_is_refused_by_name(toy_cfg, toy_model, tmp_path, load, content):
    torch.save(FILES[content](toy_model), tmp_path / "given.pth")
    with pytest.raises(CheckpointError, match=r"given\.pth") as caught:
        load(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "given.pth")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [Predictor, load_for_evaluation])
@pytest.mark.parametrize(
    "weights", ["", "missing.pth", ".", "https://127.0.0.1:9/x.pth", "https://127.0.0.1:9/x-01234567.pth"]
)
def test_weights_that_are_no_file_are_refused_by_name(toy_cfg, load, weights):
    with pytest.raises(CheckpointError, match=re.escape(repr(weights))) as caught:
        load(toy_cfg("dn_detr", "MODEL.WEIGHTS", weights))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [name for name in FILES if name not in ("nothing", "an optimizer alone")])
def test_detectron2s_predictor_refuses_them_too(toy_cfg, toy_model, tmp_path, content):
    torch.save(FILES[content](toy_model), tmp_path / "given.pth")
    with pytest.raises(CheckpointError):
        DefaultPredictor(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "given.pth")))
