"""Denoising as a part of somebody else's detector: the code of docs/plug_in.md, run and trained."""

import pytest
import torch
from plug_in_page import page_code, shapes

from dn_detr_d2 import LeakError

CLASSES = 3


@pytest.fixture(scope="module")
def page():
    return page_code()


@pytest.fixture(scope="module")
def data():
    return shapes(24)


def make(page, name):
    torch.manual_seed(0)
    return getattr(page, name)(CLASSES, dim=32, num_queries=8, num_layers=2)


def train(page, model, data, steps, batch=6):
    """Mean losses of the first and of the last steps."""
    images, targets = data
    optimizer, history = torch.optim.AdamW(model.parameters(), 5e-4), []
    for i in range(steps):
        part = [(i * batch + j) % len(images) for j in range(batch)]
        losses = page.training_step(model, optimizer, images[part], [targets[j] for j in part], CLASSES)
        history.append({name: value.item() for name, value in losses.items()})
    few = steps // 4
    first, last = history[:few], history[-few:]
    return [{k: sum(x[k] for x in part) / few for k in history[0]} for part in (first, last)]


def test_the_detector_of_the_page_learns_to_restore_noised_shapes(page, data):
    first, last = train(page, make(page, "SmallDNDETR"), data, 60)
    assert last["dn/l1"] < 0.8 * first["dn/l1"]
    assert last["dn/class"] < first["dn/class"]
    assert last["l1"] < first["l1"]


def test_the_detector_without_denoising_trains_with_the_same_matching_losses(page, data):
    class Before(page.SmallDETR):
        def forward(self, images, targets=None):
            return super().forward(images), {}

    torch.manual_seed(0)
    first, last = train(page, Before(CLASSES, dim=32, num_queries=8, num_layers=2), data, 24)
    assert first.keys() == {"class", "l1", "giou"}
    assert sum(last.values()) < sum(first.values())


@pytest.mark.parametrize("empty", [False, True])
def test_no_parameter_is_left_without_gradient(page, data, empty):
    images, targets = data[0][:2], data[1][:2]
    if empty:
        targets = [{"labels": x["labels"][:0], "boxes": x["boxes"][:0]} for x in targets]
    model = make(page, "SmallDNDETR")
    outputs, losses = model(images, targets)
    assert all(name.startswith("dn/") for name in losses)
    sum((losses | page.matching_losses(outputs, targets, CLASSES)).values()).backward()
    assert [name for name, x in model.named_parameters() if x.grad is None] == []


def test_evaluation_has_no_denoising_queries_whatever_it_is_given(page, data):
    model = make(page, "SmallDNDETR").eval()
    images, targets = data[0][:2], data[1][:2]
    with torch.no_grad():
        outputs, losses = model(images, targets)
        alone, _ = model(images)
    assert losses == {}
    assert outputs["pred_logits"].shape == (2, 8, CLASSES + 1)
    assert all(torch.equal(outputs[key], alone[key]) for key in alone)


def test_matching_queries_of_the_page_predict_what_they_predict_alone(page, data):
    model = make(page, "SmallDNDETR")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, targets = data[0][:3], data[1][:3]
    with torch.no_grad():
        together, _ = model(images, targets)
        alone, _ = model.eval()(images)
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], atol=1e-5, rtol=0)


def test_the_check_of_the_page_finds_a_decoder_that_forgets_the_mask(page, data):
    model = make(page, "SmallDNDETR")
    images, targets = data[0][:2], data[1][:2]
    page.check_small_detr(model, images, targets)
    forward = model.decoder.forward
    model.decoder.forward = lambda queries, memory, tgt_mask: forward(queries, memory)
    with pytest.raises(LeakError, match="8 of 8 matching"):
        page.check_small_detr(model, images, targets)
