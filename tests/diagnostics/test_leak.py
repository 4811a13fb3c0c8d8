"""The check finds every single wrong entry of the mask, and nothing in the mask as it is."""

import logging

import pytest
import torch
from conftest import DENOISING_SYSTEMS, MASK_SYSTEMS, make_batch
from naming import naming

from dn_detr_d2 import LeakError
from dn_detr_d2.denoising import NoisedTargets
from dn_detr_d2.denoising.isolation import separating_sets
from dn_detr_d2.diagnostics import check_denoising

GROUPS = ["MODEL.DN_DETR.DENOISING.NUM_GROUPS", 3, "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 0]


def open_one_entry(monkeypatch, query, key):
    original = NoisedTargets.attention_mask

    def flipped(self, num_matching):
        mask = original(self, num_matching)
        d = self.num_queries
        place = (..., query(d), key(d))
        assert mask[place].all()
        mask[place] = False
        return mask

    monkeypatch.setattr(NoisedTargets, "attention_mask", flipped)


@pytest.mark.parametrize("system", [*DENOISING_SYSTEMS, *MASK_SYSTEMS])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_mask_as_it_is_holds(toy_model, system, hidden):
    model = toy_model(system, *GROUPS, "MODEL.DN_DETR.DENOISING.MASK_PADDING", hidden).train()
    check_denoising(model, make_batch(3, 2, masks=True))
    assert model.training


@pytest.mark.parametrize("system", [*DENOISING_SYSTEMS, "mask2former", "mask_dino"])
@pytest.mark.parametrize(
    ("query", "key", "who"),
    [
        (lambda d: d + 4, lambda d: d - 1, r"\b1 of (9|27)\b"),
        (lambda d: d + 8, lambda d: 0, r"\b1 of (9|27)\b"),
        (lambda d: 0, lambda d: d - 1, "other groups"),
        (lambda d: d - 1, lambda d: d // 3, "other groups"),
    ],
)
def test_one_flipped_entry_of_the_mask_is_found(toy_model, monkeypatch, system, query, key, who):
    """A matching query, or the first or last group, that sees one key too many; also where that key is padding of one image.

    One layer, because in the next ones what was seen goes round: others see the one that saw.
    """
    model = toy_model(system, *GROUPS, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 1)
    open_one_entry(monkeypatch, query, key)
    with pytest.raises(LeakError, match=who):
        check_denoising(model, make_batch(3, 2, masks=True))


def test_a_mask_that_reaches_other_queries_is_found(toy_model, monkeypatch):
    """A decoder that looks into the cells of all noised masks at once."""
    model = toy_model("mask2former", *GROUPS)
    outside = model.decoder.blocked_cells

    def leaky(sets, view, queries, layer):
        blocked = outside(sets, view, queries, layer)
        seen = queries.noised_cells(view.shapes[0]).flatten(2).any(1, keepdim=True)
        return torch.where(seen, False, blocked) if layer == 0 else blocked

    monkeypatch.setattr(model.decoder, "blocked_cells", leaky)
    with pytest.raises(LeakError, match=naming("matching", "queries")):
        check_denoising(model, make_batch(3, 2, masks=True))


def test_every_blocked_entry_matters(toy_model, monkeypatch):
    """All entries of the mask that law 7 blocks, one after the other, in a model of three layers."""
    model, batch, original = toy_model("dn_detr", *GROUPS), make_batch(2, 1), NoisedTargets.attention_mask
    d, q = 6, 9
    blocked = [(i, j) for i in range(d + q) for j in range(d) if i >= d or i // 2 != j // 2]
    assert len(blocked) == 6 * 4 + 9 * 6
    for place in blocked:
        with monkeypatch.context() as patch:
            open_one_entry(patch, lambda _, i=place[0]: i, lambda _, j=place[1]: j)
            with pytest.raises(LeakError):
                check_denoising(model, batch)
    assert NoisedTargets.attention_mask is original


def test_an_entry_is_found_among_many_queries(toy_model, monkeypatch):
    """One key among 300 matching and 20 denoising ones has little weight, and is found nevertheless."""
    model = toy_model("dn_detr", "MODEL.DN_DETR.NUM_QUERIES", 300, "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 5)
    open_one_entry(monkeypatch, lambda d: d + 123, lambda d: 7)
    with pytest.raises(LeakError, match=naming(300)):
        check_denoising(model, make_batch(4))


def test_training_streams_do_not_notice_the_check(toy_model):
    model = toy_model("dn_detr")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_denoising(model, make_batch(1))
    assert torch.equal(torch.rand(3), expected)


def test_a_model_without_denoising_has_nothing_to_check(toy_model, caplog):
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        check_denoising(toy_model("dab_detr"), make_batch(1))
    assert naming("DEBUG.CHECK_DENOISING").search(caplog.text)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 8, 9, 100])
def test_every_pair_of_groups_is_separated(num_groups):
    sets = list(separating_sets(num_groups))
    assert len(sets) <= 2 * max(num_groups.bit_length(), 1)
    pairs = {(g, h) for inside in sets for g in inside for h in range(num_groups) if h not in inside}
    assert pairs == {(g, h) for g in range(num_groups) for h in range(num_groups) if g != h}
    assert {g for inside in sets for g in inside} == set(range(num_groups))
