"""What the mask promises, checked on whole models: denoising queries change nothing that they must not change."""

import dataclasses

import pytest
import torch
from conftest import DENOISING_SYSTEMS, make_batch

from dn_detr_d2.denoising import NoisedTargets
from dn_detr_d2.layers import attention
from dn_detr_d2.modeling.batch import make_targets
from dn_detr_d2.structures import join_queries

pytestmark = pytest.mark.parametrize("system", DENOISING_SYSTEMS)


@pytest.fixture(params=[False, True], ids=["masked", "folded"])
def folded(request, monkeypatch):
    """Whether self-attention folds the groups, which at this size would not pay."""
    monkeypatch.setattr(attention, "pays_to_fold", lambda groups, num_queries: request.param)
    return request.param


@pytest.fixture
def parts(toy_model, system, folded):
    """(model, memory, noised targets, a function from noised targets to predictions)."""
    groups = ["MODEL.DN_DETR.DENOISING.NUM_GROUPS", 3, "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 0]
    model = toy_model(system, *groups).train()
    batch = make_batch(3, 2)
    images = model.preprocess(batch)
    memory = model.encode_images(images)
    noised = model.denoising.generator(make_targets([x["instances"] for x in batch], model.device))
    matching = model.query_source(memory)

    @torch.no_grad()
    def decode(z):
        mask = z.attention_mask(matching.content.shape[1])
        return model.decoder(join_queries(model.query_source.embed(z), matching, mask, z.isolated), memory)

    return model, memory, noised, decode


def replace(noised, slots):
    """The same with other labels and boxes in ``slots``."""
    labels, boxes = noised.labels.clone(), noised.boxes.clone()
    labels[:, slots] = (labels[:, slots] + 1) % 5
    boxes[:, slots] = 1 - boxes[:, slots]
    return dataclasses.replace(noised, labels=labels, boxes=boxes)


def test_matching_queries_do_not_see_denoising_queries(parts):
    model, memory, noised, decode = parts
    d = noised.num_queries
    before, after = decode(noised), decode(replace(noised, slice(0, d)))
    alone = model.decoder(model.query_source(memory), memory)
    for name in ("logits", "boxes"):
        a, b, c = (getattr(x, name) for x in (before, after, alone))
        torch.testing.assert_close(a[:, :, d:], b[:, :, d:], atol=1e-6, rtol=0)
        torch.testing.assert_close(a[:, :, d:], c, atol=1e-5, rtol=0)
        assert (a[:, :, :d] - b[:, :, :d]).abs().max() > 1e-4


@pytest.mark.parametrize("group", [0, 1, 2])
def test_groups_do_not_see_each_other(parts, group):
    noised, decode = parts[2], parts[3]
    width = noised.num_queries // 3
    mine = torch.arange(group * width, (group + 1) * width)
    others = torch.tensor([i for i in range(3 * width) if i not in mine])
    before, after = decode(noised), decode(replace(noised, mine))
    for name in ("logits", "boxes"):
        a, b = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(a[:, :, others], b[:, :, others], atol=1e-6, rtol=0)
        assert (a[:, :, mine] - b[:, :, mine]).abs().max() > 1e-4


@pytest.mark.parametrize("folded", [False], indirect=True)
def test_a_mask_with_one_flipped_entry_leaks(parts, monkeypatch):
    """The test above can fail: one matching query that sees one denoising key changes what it predicts."""
    noised, decode = parts[2], parts[3]
    d, original = noised.num_queries, NoisedTargets.attention_mask

    def flipped(self, num_matching):
        mask = original(self, num_matching)
        mask[d, 0] = False
        return mask

    monkeypatch.setattr(NoisedTargets, "attention_mask", flipped)
    before, after = decode(noised).logits, decode(replace(noised, slice(0, d))).logits
    assert (before[:, :, d:] - after[:, :, d:]).abs().max() > 1e-5


def test_evaluation_is_the_same_with_denoising_on_and_off(parts):
    model, _, _, _ = parts
    model.eval()
    batch = make_batch(2)
    with torch.no_grad():
        on = model(batch)[0]["instances"]
        model.denoising = None
        off = model(batch)[0]["instances"]
    assert torch.equal(on.scores, off.scores)
    assert torch.equal(on.pred_boxes.tensor, off.pred_boxes.tensor)


@pytest.mark.parametrize("folded", [False], indirect=True)
def test_losses_and_gradients_are_the_same_folded(toy_model, system, folded, monkeypatch):
    """With 3 groups the ordinary forward pass of training; dropout off, whose random numbers would be others."""
    model = toy_model(system, "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 3, "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results, calls = [], []
    for fold in (False, True):
        monkeypatch.setattr(
            attention, "pays_to_fold", lambda groups, num_queries, fold=fold: calls.append(groups) or fold
        )
        torch.manual_seed(1)
        model.zero_grad()
        losses = model(make_batch(3, 2))
        sum(losses.values()).backward()
        results.append(losses | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 2 * (1 + len(model.decoder.layers))  # the mask, which is made once, and each layer
    masked, chosen = results
    assert masked.keys() == chosen.keys()
    for name, value in masked.items():
        torch.testing.assert_close(chosen[name], value, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
