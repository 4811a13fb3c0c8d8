"""Activation checkpointing gives the gradients of a training without it, out of less memory."""

import pytest
import torch
from conftest import SYSTEMS, make_batch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from ranks import on_ranks

from dn_detr_d2.layers import attention

NODES = [f"MODEL.DN_DETR.{part}" for part in ("ENCODER", "DECODER")]
ON = [x for node in NODES for x in (f"{node}.ACTIVATION_CHECKPOINTING", True)]
DROPOUT = [x for node in NODES for x in (f"{node}.DROPOUT", 0.1)]


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """Each decoder layer projects its own values, as with checkpointing: one product for all would round otherwise."""
    monkeypatch.setattr(attention, "TOGETHER", 0)


def gradients(model, batch, autocast=None):
    """Gradients by name, and the losses, of one pass under a fixed seed."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        losses = model(batch)
    sum(losses.values()).backward()
    found = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, {name: x.item() for name, x in losses.items()}, torch.get_rng_state()


def switch(model, on):
    for part in (model.encoder, model.decoder):
        assert part.activation_checkpointing is not on
        part.activation_checkpointing = on


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_are_equal_to_the_bit_with_dropout(toy_model, system, autocast):
    torch.set_num_threads(1)
    model, batch = toy_model(system, *ON, *DROPOUT), make_batch(2, 0)
    found, losses, stream = gradients(model, batch, autocast)
    switch(model, False)
    expected, expected_losses, expected_stream = gradients(model, batch, autocast)
    assert losses == expected_losses
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert torch.equal(stream, expected_stream)  # the repetition leaves the random numbers of the next step alone


@pytest.mark.parametrize("system", ["dn_deformable_detr", "dino"])
def test_values_projected_together_change_the_rounding_alone(toy_model, system, monkeypatch):
    model, batch = toy_model(system).train(), make_batch(2, 0)
    expected, *_ = gradients(model, batch)
    monkeypatch.setattr(attention, "TOGETHER", 2**27)
    found, *_ = gradients(model, batch)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def layer_calls(model, batch, backward):
    calls = []
    for part in (model.encoder, model.decoder):
        part.layers[0].register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    found = model(batch)
    if backward:
        sum(found.values()).backward()
    return len(calls)


@pytest.mark.parametrize("system", ["dn_detr", "dino"])
def test_layers_run_twice_in_training_only(toy_model, system):
    batch = make_batch(2, 1, sizes=((64, 64),))  # images of two sizes pass one after the other in evaluation
    assert layer_calls(toy_model(system, *ON).train(), batch, True) == 4
    assert layer_calls(toy_model(system).train(), batch, True) == 2
    assert layer_calls(toy_model(system, *ON).eval(), batch, False) == 2
    with torch.no_grad():
        assert layer_calls(toy_model(system, *ON).train(), batch, False) == 2


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr"])
def test_autograd_keeps_less(toy_cfg, system):
    """Of three layers each, on a small image, with the backbone; docs/performance.md has the figures of real models."""
    from dn_detr_d2.diagnostics.model_analysis import measure_memory

    layers = [x for node in NODES for x in (f"{node}.NUM_LAYERS", 3, f"{node}.FFN_DIM", 512)]
    whole, encoder, decoder, both = (
        measure_memory(toy_cfg(system, *layers, *overrides), 96, 96) for overrides in ([], ON[:2], ON[2:], ON)
    )
    assert both < min(encoder, decoder) < max(encoder, decoder) < whole
    assert both < 0.75 * whole


def gradients_of_two(cfg, folder, name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    attention.TOGETHER = 0  # in a process of its own
    model = create_ddp_model(build_model(cfg), device_ids=None, broadcast_buffers=False).train()
    found, *_ = gradients(model, make_batch(*((3, 1), (0, 2))[comm.get_rank()]))
    if comm.is_main_process():
        torch.save(found, f"{folder}/{name}.pth")


def test_two_processes_have_the_gradients_that_they_have_without(toy_cfg, tmp_path):
    for name, overrides in (("with", ON), ("without", ())):
        on_ranks(gradients_of_two, toy_cfg("dino", *DROPOUT, *overrides), str(tmp_path), name)
    found, expected = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("with", "without"))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
