"""The gradient of a batch that passes in parts is the gradient of the batch."""

import pytest
import torch
from conftest import make_batch
from detectron2.utils.events import EventStorage
from gradients import COUNTS, HIDDEN, QUIET, distance, gradients, in_float64, of_this_rank
from naming import naming
from ranks import on_ranks
from toy_training import differing, load, make_cfg, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.engine import TrainStep, check_processes


@pytest.fixture
def float64():
    with in_float64():
        yield


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "detr"])
def test_parts_give_the_gradient_of_the_batch(float64, toy_model, system, counts):
    """Padding may be seen and groups may follow the fullest image: every part is laid out as the whole batch is."""
    dropout = [f"MODEL.DN_DETR.{role}.DROPOUT" for role in ("ENCODER", "DECODER")]
    model = toy_model(system, *QUIET, *(x for key in dropout for x in (key, 0.0)))
    batch = make_batch(*counts, sizes=((64, 64),))
    whole, terms = gradients(model, batch, 1)
    assert whole.dtype == torch.float64
    for accumulation in (2, 4):
        parts, part_terms = gradients(model, batch, accumulation)
        assert distance(parts, whole) < 1e-9
        assert part_terms == pytest.approx(terms, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("counts", COUNTS)
def test_in_float32_only_rounding_differs(toy_model, counts):
    model, batch = toy_model("dn_detr", *QUIET), make_batch(*counts, sizes=((64, 64),))
    whole, terms = gradients(model, batch, 1)
    parts, part_terms = gradients(model, batch, 2)
    assert distance(parts, whole) < 1e-6
    assert part_terms == pytest.approx(terms, rel=1e-6, abs=1e-6)


def test_bfloat16_parts_differ_by_the_rounding_of_one_sum(toy_model):
    """A weight's gradient is rounded once for each part, to 2^-9 of the part: the sum is off by that."""
    model, batch = toy_model("dn_detr", *QUIET), make_batch(*COUNTS[0], sizes=((64, 64),))
    whole, _ = gradients(model, batch, 1, torch.bfloat16)
    exact, _ = gradients(model, batch, 1)
    parts, _ = gradients(model, batch, 2, torch.bfloat16)
    assert 0 < distance(parts, whole) < 2**-6
    assert distance(parts, whole) < distance(whole, exact)  # less than what bfloat16 costs in any case


def test_parts_on_two_processes_give_the_gradient_of_the_batch_on_one(toy_cfg, tmp_path):
    """Padding is hidden, because each process pads to its own fullest image, see test_two_gloo_processes_equal_one."""
    cfg = toy_cfg("dn_detr", *QUIET, *HIDDEN)
    of_this_rank(cfg, str(tmp_path), 1)
    for accumulation in (1, 2):
        on_ranks(of_this_rank, cfg, str(tmp_path), accumulation)
    one, two, parts = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("1_1", "2_1", "2_2"))
    for a, b, c in zip(one, two, parts, strict=True):
        assert distance(c, b) < 1e-9
        assert distance(c, a) < 1e-9


def test_an_accumulating_training_resumes_to_the_bit(tmp_path):
    options = ["SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.STEPS", ()]
    train(make_cfg(tmp_path / "whole", *options))
    train(make_cfg(tmp_path / "parts", *options[:2], "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()))
    train(make_cfg(tmp_path / "parts", *options), resume=True, seed=99)
    assert differing(load(tmp_path / "whole"), load(tmp_path / "parts")) == []


class Steep(torch.nn.Module):
    """A gradient of as much as the first image says."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def step_normalizers(self, batched_inputs):
        return None

    def forward(self, batch, share):
        return {"main/l1": self.weight.sum() * batch[0]["factor"]}


@pytest.mark.parametrize(("factors", "stepped"), [((1.0, 2.0), True), ((1.0, 1e34), False), ((1e34, 1.0), False)])
def test_under_fp16_one_part_that_overflows_leaves_out_the_step(tmp_path, factors, stepped):
    model = Steep()
    batch = [{"image": torch.zeros(3), "instances": (), "factor": factor} for factor in factors]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(model, [batch], optimizer, torch.float16, str(tmp_path), accumulation=2)
    with EventStorage():
        step.run_step()
    assert (step.stepped, step.overflows) == (stepped, 1 - stepped)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 3 if stepped else 1.0)


def test_a_bad_part_is_named_by_its_own_images(tmp_path):
    model = Steep()
    batch = [{"image": torch.zeros(3), "instances": (), "factor": f, "file_name": f"{f}.png"} for f in (1.0, torch.nan)]
    step = TrainStep(model, [batch], torch.optim.SGD(model.parameters(), 0.1), None, str(tmp_path), accumulation=2)
    with EventStorage(), pytest.raises(FloatingPointError, match=naming("main/l1", "nan.png")):
        step.run_step()
    assert model.weight.item() == 1


def test_batches_that_cannot_be_divided_are_refused(toy_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    cfg = toy_cfg("dn_detr", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 4)
    check_processes(cfg, 1)
    with pytest.raises(ConfigError, match=naming("IMS_PER_BATCH", 4, 2, "SOLVER.ACCUMULATION_STEPS")):
        check_processes(cfg, 2, cpu_wanted=True)
    step = TrainStep(Steep(), [[{}] * 3], torch.optim.SGD([torch.zeros(1)], 0.1), None, str(tmp_path), accumulation=2)
    with EventStorage(), pytest.raises(ConfigError, match=naming(3, "ACCUMULATION_STEPS", 2)):
        step.run_step()
