"""What only a CUDA device can show: the same numbers there as here, and mixed precision."""

import copy

import pytest
import torch
from conftest import SYSTEMS, make_batch
from detectron2.utils.events import EventStorage

from dn_detr_d2.engine import TrainStep
from dn_detr_d2.layers import ms_deform_attn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_operator_equals_the_cpu():
    value, loc, weights = torch.randn(2, 30, 2, 4), torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    shapes = [(6, 4), (3, 2)]
    there = ms_deform_attn(value.cuda(), shapes, loc.cuda(), weights.cuda())
    torch.testing.assert_close(there.cpu(), ms_deform_attn(value, shapes, loc, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_evaluation_equals_the_cpu(toy_model, system):
    model = toy_model(system).eval()
    batch = make_batch(0, 0)
    with torch.no_grad():
        here, there = model(batch), copy.deepcopy(model).cuda()(batch)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b["instances"].scores.cpu(), a["instances"].scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step(toy_model, tmp_path, system, counts, dtype):
    model = toy_model(system).cuda()
    step = TrainStep(
        model, iter([make_batch(*counts)]), torch.optim.SGD(model.parameters(), 1e-3), dtype, str(tmp_path)
    )
    step.iter = 0
    with EventStorage() as storage:
        step.run_step()
        assert storage.latest()["total_loss"][0] > 0
