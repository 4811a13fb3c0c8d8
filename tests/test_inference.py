"""Evaluation as TEST.* wants it; tests/test_predictor.py has the predictor."""

import pytest
import torch
from conftest import make_batch


@pytest.mark.parametrize(("amp", "dtype"), [("", torch.float32), ("bf16", torch.bfloat16)])
def test_evaluation_is_in_the_wanted_precision_and_keeps_a_training_as_it_is(toy_model, monkeypatch, amp, dtype):
    """Nothing that is made in inference mode may stay in the model, where the next step of a training would find it."""
    monkeypatch.setattr("dn_detr_d2.config.validation.slow_bfloat16", lambda: "")
    model, seen = toy_model("dn_deformable_detr", "TEST.AMP", amp), set()
    model.backbone.register_forward_hook(
        lambda *given: seen.add((given[2]["res5"].dtype, torch.is_inference_mode_enabled()))
    )
    model.eval()
    with torch.no_grad():
        (found,) = model(make_batch(0))
    assert seen == {(dtype, True)}
    assert found["instances"].scores.dtype == torch.float32
    seen.clear()
    losses = model.train()(make_batch(2))
    sum(losses.values()).backward()
    assert seen == {(torch.float32, False)}


def test_gradients_through_a_detection_are_there_where_they_are_wanted(toy_model):
    (found,) = toy_model("dn_detr").eval()(make_batch(0))
    assert found["instances"].scores.requires_grad
