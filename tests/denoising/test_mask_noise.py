"""Moved masks, against numpy's roll with what has wrapped around blanked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming

from dn_detr_d2 import DenoisingGenerator
from dn_detr_d2.denoising import (
    BudgetDenoisingGenerator,
    ContrastiveDenoisingGenerator,
    NoisedMasks,
    noise,
    shift_masks,
)
from dn_detr_d2.structures import Targets


def slow_shift(mask, dx, dy, cell=1):
    moved = np.roll(mask.numpy(), (dy, dx), (0, 1))
    h, w = moved.shape
    moved[: max(dy, 0)] = moved[max(h + min(dy, 0), 0) :] = False
    moved[:, : max(dx, 0)] = moved[:, max(w + min(dx, 0), 0) :] = False
    return F.max_pool2d(torch.from_numpy(moved)[None].float(), cell)[0] > 0


def worked_mask():
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 8:16, 4:20] = True
    return mask


def make_targets(counts=(2, 3), size=(32, 64)):
    labels = [torch.randint(5, (n,)) for n in counts]
    boxes = [torch.rand(n, 4) * 0.4 + 0.3 for n in counts]
    return Targets.pad(labels, boxes, masks=[torch.rand(n, *size) < 0.05 for n in counts])


def test_the_worked_example(monkeypatch):
    """Rows 8..15 and columns 4..19 of a 32 x 32 image move by 3.2 -> 3 to the right and 1.6 -> 2 upwards."""
    monkeypatch.setattr(noise.torch, "rand_like", lambda x: torch.tensor([1.0, 0]).expand_as(x))
    offsets = noise.mask_offsets(torch.tensor([[0.5 * 32, 0.25 * 32]]), 0.4)
    assert offsets.tolist() == [[3, -2]]
    moved = shift_masks(worked_mask(), offsets)[0]
    rows, columns = moved.any(1).nonzero().flatten(), moved.any(0).nonzero().flatten()
    assert (rows.tolist(), columns.tolist()) == (list(range(6, 14)), list(range(7, 23)))
    assert moved.sum() == 8 * 16
    eighths, sixteenths = shift_masks(worked_mask(), offsets, 8)[0], shift_masks(worked_mask(), offsets, 16)[0]
    assert eighths.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert sixteenths.int().tolist() == [[1, 1], [0, 0]]


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cell=st.sampled_from([1, 2, 4]),
    offsets=st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=1, max_size=4),
    density=st.sampled_from([0.02, 0.3]),
)
def test_moved_masks_equal_a_roll_that_loses_what_wraps(shape, cell, offsets, density):
    masks = torch.rand(3, shape[0] * cell, shape[1] * cell) < density
    index = torch.randint(3, (len(offsets),))
    moved = shift_masks(masks, torch.tensor(offsets), cell, index)
    expected = [slow_shift(masks[i], dx, dy, cell) for i, (dx, dy) in zip(index, offsets, strict=True)]
    assert torch.equal(moved, torch.stack(expected))


def test_there_and_back_again():
    """What does not leave the image comes back to its place; no move is no change."""
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[:, 6:14, 6:24] = torch.rand(2, 8, 18) < 0.5
    offsets = torch.tensor([[5, -6], [-3, 4]])
    moved = shift_masks(masks, offsets)
    assert torch.equal(moved.sum((1, 2)), masks.sum((1, 2)))
    assert torch.equal(shift_masks(moved, -offsets), masks)
    assert torch.equal(shift_masks(masks, offsets * 0), masks)
    assert not shift_masks(masks, offsets + 100).any()


def test_offsets_are_whole_and_uniform_up_to_their_limit():
    size = torch.tensor([100.0, 40.0]).expand(20000, 2)
    offsets = noise.mask_offsets(size, 0.4)  # up to 20 and 8 pixels
    assert offsets.dtype == torch.int64
    assert offsets.abs().amax(0).tolist() == [20, 8]
    assert offsets.float().mean(0).tolist() == pytest.approx([0, 0], abs=0.3)
    share = (offsets[:, 1] == 3).float().mean().item()  # of 16 pixels
    assert share == pytest.approx(1 / 16, abs=0.01)
    assert (noise.mask_offsets(size, 0.0) == 0).all()


@pytest.mark.parametrize("limit", [0, 2])
def test_slots_cover_what_their_object_covers_moved(limit):
    targets = make_targets()
    noised = DenoisingGenerator(num_classes=5, num_groups=2, max_queries=limit)(targets)
    cells = noised.masks.cells((4, 8))
    assert cells.shape == (2, noised.num_queries, 4, 8)
    assert not cells[~noised.valid].any()
    assert torch.equal(noised.masks.masks, targets.masks)
    for i, (slots, objects) in enumerate(noised.assignment.per_image(2)):
        for slot, one in zip(slots.tolist(), objects.tolist(), strict=True):
            dx, dy = noised.masks.offsets[i, slot].tolist()
            assert torch.equal(cells[i, slot], slow_shift(targets.masks[i, one], dx, dy, 8))
            w, h = (targets.boxes[i, one, 2:] * torch.tensor([64, 32]) / 2 * 0.4).tolist()
            assert abs(dx) <= round(w)
            assert abs(dy) <= round(h)


def test_groups_and_images_have_shifts_of_their_own():
    targets = make_targets((3, 3), (256, 256))
    noised = DenoisingGenerator(num_classes=5, num_groups=3)(targets)
    assert len(noised.masks.offsets.flatten(0, 1).unique(dim=0)) > 9


def test_a_schedule_scales_the_shifts():
    generator = DenoisingGenerator(num_classes=5)
    generator.noise_factor = 0.0
    assert not generator(make_targets()).masks.offsets.any()


@pytest.mark.parametrize("kind", [DenoisingGenerator, BudgetDenoisingGenerator, ContrastiveDenoisingGenerator])
def test_shifts_are_drawn_last(kind):
    """So labels and boxes are noised as in a model without masks."""
    targets, found = make_targets(), []
    for one in (targets, replace(targets, masks=None)):
        torch.manual_seed(1)
        found.append(kind(num_classes=5)(one))
    assert torch.equal(found[0].labels, found[1].labels)
    assert torch.equal(found[0].boxes, found[1].boxes)
    assert found[1].masks is None


def test_a_batch_without_objects_has_slots_that_cover_nothing():
    noised = DenoisingGenerator(num_classes=5, num_groups=2)(make_targets((0, 0)))
    assert noised.masks.cells((1, 2)).shape == (2, 2, 1, 2)
    assert not noised.masks.cells((1, 2)).any()


@pytest.mark.parametrize("shape", [(3, 8), (4, 4), (5, 10)])
def test_cells_that_are_not_whole_are_refused(shape):
    empty = torch.zeros(1, 1, dtype=torch.int64)
    masks = NoisedMasks(torch.zeros(1, 1, 32, 64, dtype=torch.bool), empty, empty[..., None].expand(1, 1, 2), empty > 0)
    with pytest.raises(ValueError, match=naming("32", "64", *map(str, shape))):
        masks.cells(shape)


def test_full_size_masks_of_all_slots_never_exist():
    """100 slots of 1024 x 1024 pixels would be 105 MB; a table of the one mask is 4 bytes a pixel."""
    masks, offsets = torch.zeros(1, 1024, 1024, dtype=torch.bool), torch.randint(-50, 50, (1, 100, 2))
    index, valid = torch.zeros(1, 100, dtype=torch.int64), torch.ones(1, 100, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profile:
        NoisedMasks(masks[None], index, offsets, valid).cells((32, 32))
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 10e6
