"""The benchmark's two sides agree, and what it claims about ours holds at a small size."""

import pytest
import torch

from dev import benchmark_criterion as bench


@pytest.mark.parametrize(("images", "objects"), [(2, 7), (1, 30), (3, 1)])
def test_both_sides_give_the_same_losses_and_gradients(images, objects):
    case = bench.Case(images, objects)
    gradients = []
    for side in (bench.ours, bench.reference):
        losses = side(case)
        gradients.append(torch.autograd.grad(sum(v.sum() for v in losses.values()), (case.logits, case.predicted)))
        if side is bench.ours:
            found = losses
    for name, values in losses.items():
        torch.testing.assert_close(found[name], values, atol=2e-4, rtol=2e-4)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_no_operator_makes_the_host_wait_but_the_one_copy(monkeypatch):
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or original(self))
    for images, objects in ((1, 3), (4, 20)):
        case = bench.Case(images, objects)
        copies.clear()
        with bench.OperatorCount() as count:
            bench.ours(case)
        assert (count.waits, len(copies)) == (0, 1)


def test_operators_do_not_grow_with_objects_and_are_few():
    totals = []
    for objects in (7, 60):
        with bench.OperatorCount() as count:
            bench.ours(bench.Case(4, objects))
        totals.append(count.total)
    assert totals[0] == totals[1] <= 450  # performance goal C17 at any batch


def test_memory_is_linear_in_objects():
    saved = {n: bench.saved_bytes(bench.ours, bench.Case(4, n)) for n in (20, 40)}
    assert saved[40] < 2.2 * saved[20]
    assert bench.saved_bytes(bench.reference, bench.Case(4, 40)) > 4 * saved[40]
