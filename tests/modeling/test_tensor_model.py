"""The detector as a function of tensors against the detector itself."""

import pytest
import torch
from conftest import make_batch

from dn_detr_d2.modeling.tensor_model import TensorModel


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino"])
def test_the_wrapper_predicts_what_the_model_predicts(toy_model, system):
    model, seen = toy_model(system).eval(), []
    model.decoder.register_forward_hook(lambda module, arguments, output: seen.append(output))
    (record,) = make_batch(2)  # 64 x 96 pixels: no padding
    with torch.no_grad():
        model([record])
        logits, boxes = TensorModel(model)(record["image"][None].float())
    assert logits.equal(seen[0].logits[-1])
    assert boxes.equal(seen[0].boxes[-1])


@pytest.mark.parametrize("system", ["mask2former", "mask_dino"])
def test_masks_come_last(toy_model, system):
    model, seen = toy_model(system).eval(), []
    model.decoder.register_forward_hook(lambda module, arguments, output: seen.append(output))
    (record,) = make_batch(2)
    with torch.no_grad():
        model([record])
        found = TensorModel(model)(record["image"][None].float())
    assert len(found) == (2 if system == "mask2former" else 3)
    assert found[0].equal(seen[0].logits[-1])
    assert found[-1].equal(seen[0].mask_logits())
