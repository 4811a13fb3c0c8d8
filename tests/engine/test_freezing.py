"""MODEL.FREEZE: frozen parts keep every bit of their state, the others learn."""

import copy
from pathlib import Path

import pytest
import torch
from naming import naming
from ranks import on_ranks
from torch import nn
from toy_training import make_cfg, make_rcnn_cfg, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine.freezing import freeze_parts


def trained(cfg):
    """(state before, state after) of a training."""
    torch.set_num_threads(1)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    before = copy.deepcopy(trainer._trainer.model.state_dict())
    trainer.train()
    return before, trainer._trainer.model.state_dict()


def changed(before, after):
    """First parts of the names of what differs."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        (["backbone", "encoder"], {"backbone", "encoder"}),
        (["neck", "query_source", "decoder"], {"neck", "query_source", "decoder"}),
    ],
)
def test_frozen_parts_stay_and_the_others_learn(tmp_path, frozen, kept):
    norms = ["MODEL.RESNETS.NORM", "BN", "SOLVER.WEIGHT_DECAY", 0.1]
    before, after = trained(make_cfg(tmp_path, *norms, "MODEL.FREEZE", frozen, "SOLVER.MAX_ITER", 2))
    parts = {"backbone", "neck", "encoder", "query_source", "decoder"}
    assert changed(before, after) == parts - kept


def test_a_part_of_a_part(tmp_path):
    before, after = trained(make_cfg(tmp_path, "MODEL.FREEZE", ["decoder.layers.0"], "SOLVER.MAX_ITER", 2))
    of_layers = {name for name in before if name.startswith("decoder.layers.")}
    different = {name for name in of_layers if not torch.equal(before[name], after[name])}
    assert different
    assert different.isdisjoint(name for name in of_layers if name.startswith("decoder.layers.0."))


def test_other_meta_architectures(tmp_path):
    before, after = trained(make_rcnn_cfg(tmp_path, "MODEL.FREEZE", ["backbone"], "SOLVER.MAX_ITER", 2))
    assert changed(before, after) == {"proposal_generator", "roi_heads"}


def test_the_average_of_weights_and_a_resume_see_the_same(tmp_path):
    frozen = ["MODEL.FREEZE", ["backbone"], "MODEL_EMA.ENABLED", True, "MODEL.RESNETS.NORM", "BN"]
    whole = make_cfg(tmp_path / "whole", *frozen)
    train(whole)
    halves = [make_cfg(tmp_path / "halves", *frozen, "SOLVER.MAX_ITER", n) for n in (3, 6)]
    train(halves[0])
    train(halves[1], resume=True)
    first, second = (torch.load(Path(x.OUTPUT_DIR) / "model_final.pth", weights_only=True) for x in (whole, halves[1]))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def test_two_processes(tmp_path):
    on_ranks(_train_on_a_rank, str(tmp_path))


def _train_on_a_rank(folder):
    before, after = trained(make_cfg(folder, "MODEL.FREEZE", ["backbone", "encoder"], "SOLVER.MAX_ITER", 2))
    names = {name.removeprefix("module.") for name in before if not torch.equal(before[name], after[name])}
    assert names
    assert not any(name.startswith(("backbone.", "encoder.")) for name in names)


def test_batch_norms_of_a_frozen_part_use_their_statistics():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4)).train()
    freeze_parts(model, ["0"])
    model.train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    inner = model[0](x)
    expected = nn.functional.batch_norm(model[0][0](x), torch.zeros(4), torch.ones(4))
    assert torch.allclose(inner, expected, atol=1e-6)
    model(x)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


@pytest.mark.parametrize("name", ["encodr", "", "decoder.layers.9", "criterion"])
def test_a_part_that_is_not_there_is_named_with_those_that_are(toy_model, name):
    with pytest.raises(ConfigError, match=naming("MODEL.FREEZE", repr(name), "backbone", "decoder")):
        freeze_parts(toy_model("dn_detr"), [name])


def test_something_must_be_left():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=naming("MODEL.FREEZE", "'0'")):
        freeze_parts(model, ["0"])
