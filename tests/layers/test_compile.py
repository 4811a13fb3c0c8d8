"""The module under torch.compile, eagerly traced: one graph, the same numbers, static and dynamic numbers of queries."""

import pytest
import torch

from dn_detr_d2.layers import ms_deform_attn


@pytest.mark.parametrize("dynamic", [False, True])
def test_operator_compiles_to_one_graph(dynamic):
    shapes = [(4, 6), (2, 3)]
    compiled = torch.compile(ms_deform_attn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (5, 7):
        value, loc = torch.randn(2, 30, 2, 4, requires_grad=True), torch.rand(2, queries, 2, 2, 3, 2)
        weights = torch.rand(2, queries, 2, 2, 3)
        ours, theirs = compiled(value, shapes, loc, weights), ms_deform_attn(value, shapes, loc, weights)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(x.sum(), value)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*grads)
