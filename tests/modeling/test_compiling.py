"""Compiled layers give the losses and gradients of those that are not, from one compilation for many sizes of images."""

import copy

import pytest
import torch
from conftest import make_batch
from torch._dynamo.utils import counters
from toy_training import make_cfg, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.modeling.compiling import COMPILED, compile_parts, missing_compiler

SIZES = ((160, 192), (192, 160), (224, 130))


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(3)
    losses = model(batch)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fresh_dynamo():
    """Forgets what was compiled, before and after."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_encoder_is_the_encoder(toy_model, fresh_dynamo):
    """Two layers, three sizes of images: one graph, no break, and the numbers of a model that is not compiled."""
    plain = toy_model("dn_deformable_detr", "MODEL.DN_DETR.ENCODER.NUM_LAYERS", 2).train()
    compiled = copy.deepcopy(plain)
    compile_parts(compiled, "encoder", backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for size in SIZES:
        batch = make_batch(2, 1, sizes=(size,))
        (expected, theirs), (found, ours) = (losses_and_gradients(x, batch) for x in (plain, compiled))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():  # evaluation, and what copies do, is not compiled
        plain.eval(), compiled.eval()
        assert torch.equal(compiled.encode(batch).tokens, plain.encode(batch).tokens)
    losses_and_gradients(copy.deepcopy(compiled).train(), batch)
    assert counters["stats"]["unique_graphs"] == 1


def test_all_compiles_backbone_and_every_layer(toy_model):
    model = toy_model("dn_deformable_detr")
    compile_parts(model, "all")
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"backbone", "encoder.layers.0", *(f"decoder.layers.{i}" for i in range(3))}
    assert COMPILED.keys() == {"", "encoder", "all"}


@pytest.mark.long
def test_a_training_with_a_compiled_encoder(tmp_path):
    """By the compiler of the machine, as train_net.py trains."""
    overrides = ["MODEL.DN_DETR.COMPILE", "encoder", "MODEL.DN_DETR.ENCODER.NUM_LAYERS", 1, "SOLVER.MAX_ITER", 2]
    train(make_cfg(tmp_path, *overrides, config="dn_dab_deformable"))
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["COMPILE", "layers"], "must be one of"),
        (["COMPILE", "encoder", "ENCODER.ACTIVATION_CHECKPOINTING", True], "set one of them off"),
        (["COMPILE", "all", "DECODER.ACTIVATION_CHECKPOINTING", True], "the layers of DECODER"),
    ],
)
def test_what_does_not_go_together_is_refused(toy_model, overrides, text):
    keys = [f"MODEL.DN_DETR.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)]
    with pytest.raises(ConfigError, match=text):
        toy_model("dn_deformable_detr", *keys)


def test_checkpointing_of_layers_that_are_not_compiled_is_fine(toy_model):
    keys = ["MODEL.DN_DETR.COMPILE", "encoder", "MODEL.DN_DETR.DECODER.ACTIVATION_CHECKPOINTING", True]
    assert toy_model("dn_deformable_detr", *keys).encoder.layers[0]._compiled_call_impl is not None


def test_a_machine_without_a_compiler_is_told(toy_model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in missing_compiler("cpu")
    with pytest.raises(ConfigError, match="needs a C"):
        toy_model("dn_deformable_detr", "MODEL.DN_DETR.COMPILE", "all")
