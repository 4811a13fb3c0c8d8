"""The benchmark's two sides agree, and what it claims about ours holds at a small size."""

import pytest
import torch

from dev import benchmark_masks as bench


@pytest.mark.parametrize(("images", "objects"), [(2, 3), (1, 8)])
def test_both_sides_give_the_same_losses_and_gradients(images, objects, monkeypatch):
    monkeypatch.setattr(bench, "SETS", 2)
    case, sides = bench.Case(images, objects, 64, 50), []
    for side in bench.SIDES.values():
        losses = side(case)
        total = sum(v.sum() for v in losses.values())
        sides.append((losses, torch.autograd.grad(total, (case.embeddings, case.features))))
    for name, values in sides[0][0].items():
        torch.testing.assert_close(values, sides[1][0][name], atol=1e-5, rtol=1e-5)
    for a, b in zip(sides[0][1], sides[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ours_waits_for_the_device_once_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(bench, "SETS", 2)
    assert {bench.waits(bench.Case(images, objects, 64, 50)) for images, objects in ((1, 1), (3, 9))} == {1}
