"""The strength of box noise as a function of the iteration."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naming import naming
from ranks import on_ranks
from test_resume_training import stop_at
from torch import nn
from toy_training import differing, load, make_cfg, make_rcnn_cfg, train

from dn_detr_d2 import ConfigError, DenoisingGenerator, QueryDenoising
from dn_detr_d2.engine import NoiseSchedule, Trainer, noise_factor

KEY = "MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE."
LINEAR = [KEY + "NAME", "linear", KEY + "START", 2.0, KEY + "END", 0.0]
STARTS = st.floats(0, 5)


@pytest.mark.parametrize(("name", "expected"), [
    ("constant", [1.5, 1.5, 1.5, 1.5, 1.5]),
    ("linear", [1.5, 1.25, 1.0, 0.75, 0.5]),
    ("cosine", [1.5, 1 + math.sqrt(0.5) / 2, 1.0, 1 - math.sqrt(0.5) / 2, 0.5]),
])  # fmt: skip
def test_values_worked_by_hand(name, expected):
    """From 1.5 to 0.5 in five iterations: p = 0, 1/4, 1/2, 3/4, 1."""
    assert [noise_factor(name, 1.5, 0.5, i, 5) for i in range(5)] == pytest.approx(expected, abs=1e-12)


@given(st.sampled_from(["linear", "cosine"]), STARTS, STARTS, st.integers(1, 1000))
def test_it_begins_at_start_ends_at_end_and_goes_one_way(name, start, end, total):
    values = [noise_factor(name, start, end, i, total) for i in range(total)]
    assert values[0] == start
    assert noise_factor(name, start, end, max(total - 1, 1), total) == pytest.approx(end)
    assert values == sorted(values, reverse=end < start) or max(values) - min(values) < 1e-9
    assert min(start, end) - 1e-9 <= min(values) <= max(values) <= max(start, end) + 1e-9


class Hosts(nn.Module):
    """Two denoising parts, one of them a part of a part, and modules whose ``generator`` is something else."""

    def __init__(self):
        super().__init__()
        self.denoising = QueryDenoising(DenoisingGenerator(num_classes=3), dim=8)
        self.heads = nn.ModuleList([nn.Module(), nn.Module(), nn.Module()])
        self.heads[0].generator = DenoisingGenerator(num_classes=3)
        self.heads[1].generator = torch.Generator()
        self.heads[2].generator = None

    def factors(self):
        return [self.denoising.generator.noise_factor, self.heads[0].generator.noise_factor]


def test_every_generator_of_the_model_is_set():
    model = Hosts()
    hook = NoiseSchedule("linear", 1.0, 0.0)
    hook.trainer = SimpleNamespace(model=model, start_iter=0, iter=0, max_iter=5)
    hook.before_train()
    assert model.factors() == [1, 1]
    hook.trainer.iter = 1
    hook.before_step()
    assert model.factors() == [0.75, 0.75]
    hook.trainer.start_iter = 3  # what is measured again before a resumed training belongs to iteration 2
    hook.before_train()
    assert model.factors() == [0.5, 0.5]


def test_the_regions_of_faster_rcnn_are_noised_by_it_too(tmp_path, monkeypatch):
    seen, noise_boxes = [], DenoisingGenerator.noise_boxes
    monkeypatch.setattr(
        DenoisingGenerator, "noise_boxes",
        lambda self, boxes: (seen.append(self.noise_factor), noise_boxes(self, boxes))[1],
    )  # fmt: skip
    train(make_rcnn_cfg(tmp_path / "out", *LINEAR, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()))
    assert list(dict.fromkeys(seen)) == [2.0, 1.0, 0.0]


def spied(monkeypatch):
    """(iteration, factor) at each call of the generator."""
    seen, current = [], {}
    step, call = Trainer.run_step, DenoisingGenerator.__call__
    monkeypatch.setattr(Trainer, "run_step", lambda self: (current.update(i=self.iter), step(self))[1])
    monkeypatch.setattr(
        DenoisingGenerator, "__call__",
        lambda self, *given: (seen.append((current["i"], self.noise_factor)), call(self, *given))[1],
    )  # fmt: skip
    return seen


def test_a_training_follows_it_and_every_part_of_an_accumulated_step_has_the_same(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    train(make_cfg(tmp_path / "out", *LINEAR, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (), "SOLVER.ACCUMULATION_STEPS", 2))
    assert seen == [(i, factor) for i, factor in enumerate([2.0, 1.5, 1.0, 0.5, 0.0]) for _ in range(2)]


def test_without_a_schedule_the_factor_is_one(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()))
    assert seen == [(0, 1.0), (1, 1.0)]


def test_a_training_with_a_schedule_is_another_and_resumes_in_the_middle_bitwise(tmp_path):
    train(make_cfg(tmp_path / "whole", *LINEAR))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    train(make_cfg(tmp_path / "stopped", *LINEAR), resume=True, seed=99)
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "other")
    train(make_cfg(tmp_path / "other"), resume=True, seed=99)
    assert any(name.startswith(".model.") for name in differing(load(tmp_path / "whole"), load(tmp_path / "other")))


def test_two_processes_have_it_too(tmp_path):
    options = [*LINEAR, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", ()]
    on_ranks(train, make_cfg(tmp_path / "whole", *options))
    stop_at(tmp_path / "whole", "model_0000001", tmp_path / "stopped")
    on_ranks(train, make_cfg(tmp_path / "stopped", *options), True, 99)
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []


@pytest.mark.parametrize(("key", "value", "named"), [
    ("NAME", "step", ["'step'", "'linear'"]),
    ("START", -0.5, [-0.5]),
    ("END", math.inf, ["inf"]),
])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(toy_cfg, key, value, named):
    with pytest.raises(ConfigError, match=naming("NOISE_SCHEDULE." + key, *named)):
        toy_cfg("dn_detr", KEY + key, value)
