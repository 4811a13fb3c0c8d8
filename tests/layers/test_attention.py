import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naming import naming
from torch import nn

from dn_detr_d2.layers import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    MultiLevelConditionalCrossAttention,
    MultiScaleDeformableAttention,
    SelfAttention,
    added_to_scores,
    attend,
    ms_deform_attn,
    project_values,
)
from dn_detr_d2.layers.attention import attend_folded, pays_to_fold
from dn_detr_d2.layers.ms_deform_attn import locations_from_boxes, locations_from_points
from dn_detr_d2.structures import IsolatedGroups


def loop_attention(query, key, value, heads, blocked=None):
    """Softmax attention one head, image and query at a time."""
    out = torch.zeros(*query.shape[:2], value.shape[2])
    e, d = query.shape[2] // heads, value.shape[2] // heads
    for i in range(query.shape[0]):
        for head in range(heads):
            for j in range(query.shape[1]):
                scores = key[i, :, head * e : (head + 1) * e] @ query[i, j, head * e : (head + 1) * e] / math.sqrt(e)
                if blocked is not None:
                    mask = blocked if blocked.dim() == 2 else blocked[i]
                    scores = scores.masked_fill(mask[min(j, len(mask) - 1)], -math.inf)
                out[i, j, head * d : (head + 1) * d] = scores.softmax(0) @ value[i, :, head * d : (head + 1) * d]
    return out


@pytest.mark.parametrize("mask", [None, "shared", "per image", "keys"])
def test_attend_equals_written_loops(mask):
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    shapes = {"shared": (3, 5), "per image": (2, 3, 5), "keys": (2, 1, 5)}
    blocked = None
    if mask:
        blocked = torch.rand(shapes[mask]) < 0.4
        blocked[..., 0] = False
    expected = loop_attention(query, key, value, 2, blocked)
    torch.testing.assert_close(attend(query, key, value, 2, blocked), expected)


@given(
    images=st.integers(1, 2),
    number=st.integers(1, 3),
    size=st.integers(1, 3),
    matching=st.integers(0, 4),
    heads=st.integers(1, 2),
)
def test_folded_attention_equals_written_loops_with_the_mask(images, number, size, matching, heads):
    group = torch.tensor([i // size for i in range(number * size)] + [number] * matching)
    blocked = (group[:, None] != group) & (group != number)
    query, key, value = (torch.randn(images, len(group), heads * width) for width in (4, 4, 3))
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    folded = attend_folded(*split, IsolatedGroups(number, size)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(folded, loop_attention(query, key, value, heads, blocked))


def test_large_groups_are_folded_and_small_ones_masked():
    """Folded, the mask is not looked at; nor does a fold change what comes out, or its gradient."""
    dense = {}
    for number, size, matching, folds in ((10, 100, 300, True), (5, 7, 300, False), (20, 20, 900, False)):
        groups = IsolatedGroups(number, size)
        group = torch.tensor([i // size for i in range(number * size)] + [number] * matching)
        blocked = (group[:, None] != group) & (group != number)
        inputs = [torch.randn(1, len(group), 16, requires_grad=True) for _ in range(3)]
        assert pays_to_fold(groups, len(group)) == folds
        weights = torch.randn(1, len(group), 16)
        for name, arguments in {"masked": (blocked,), "chosen": (blocked, 0.0, groups)}.items():
            out = attend(*inputs, 2, *arguments)
            dense[name] = [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]
        for ours, theirs in zip(dense["chosen"], dense["masked"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        everything = attend(*inputs, 2, torch.zeros_like(blocked), 0.0, groups)
        assert torch.allclose(everything, dense["masked"][0], atol=1e-5) == folds


@given(images=st.integers(0, 2), queries=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_mask_made_once_blocks_what_the_mask_blocks(images, queries, seed):
    """Shared by all images or (``images`` > 0) one an image; output and gradients of written loops."""
    torch.manual_seed(seed)
    shape = (images, queries, queries) if images else (queries, queries)
    blocked = (torch.rand(shape) < 0.5) & ~torch.eye(queries, dtype=torch.bool)  # a query sees itself
    inputs = [torch.randn(max(images, 1), queries, 4, requires_grad=True) for _ in range(3)]
    made = added_to_scores(blocked, None, inputs[0])
    assert made.isfinite().all()  # infinite inputs of a layer are reported as a fault
    weights = torch.randn(max(images, 1), queries, 4)
    found, expected = attend(*inputs, 2, made), loop_attention(*inputs, 2, blocked)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_mask_is_made_in_the_dtype_of_attention_and_only_where_it_is_looked_at():
    content, groups = torch.randn(1, 1300, 8), IsolatedGroups(10, 100)
    blocked = torch.zeros(1300, 1300, dtype=torch.bool)
    assert added_to_scores(None, None, content) is None
    assert added_to_scores(blocked, groups, content) is blocked  # folded
    assert added_to_scores(blocked[:3, :3], None, content[:, :3]).dtype == torch.float32
    assert added_to_scores(blocked[:3, :3], None, content[:, :3].double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        made = added_to_scores(blocked[:3, :3], IsolatedGroups(1, 2), content[:, :3])
    assert made.dtype == torch.bfloat16


def test_folded_attention_drops_weights():
    ones = torch.ones(1, 1, 30, 4)
    for groups in (IsolatedGroups(1, 15), IsolatedGroups(3, 10)):
        dropped = attend_folded(ones, ones, ones, groups, 0.5)
        kept = dropped.unique(dim=2).shape[2]
        assert kept > 3  # without dropout all rows are ones
        torch.testing.assert_close(dropped.mean(), torch.tensor(1.0), atol=0.2, rtol=0)


def test_self_attention_equals_pytorchs_module():
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.in_proj.weight.data, torch.randn(48)
    ours.in_proj.bias.data = theirs.in_proj_bias.data
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, position, blocked = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.rand(5, 5) < 0.3
    blocked.fill_diagonal_(False)
    expected = theirs(x + position, x + position, x, attn_mask=blocked, need_weights=False)[0]
    torch.testing.assert_close(ours(x, position, blocked), ours.norm(x + expected))


def test_conditional_self_attention_adds_content_and_position():
    layer = ConditionalSelfAttention(8, 2)
    x, position = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    query = layer.query_content(x) + layer.query_position(position)
    key = layer.key_content(x) + layer.key_position(position)
    expected = layer.norm(x + layer.out_proj(loop_attention(query, key, layer.value(x), 2)))
    torch.testing.assert_close(layer(x, position), expected)


@pytest.mark.parametrize("first", [True, False])
def test_conditional_cross_attention_scores_content_plus_position_per_head(first):
    layer = ConditionalCrossAttention(8, 2, add_query_position=first)
    x, position, sine = (torch.randn(1, 3, 8) for _ in range(3))
    tokens, places = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    padding = torch.tensor([[False, False, True, False]])
    q, k, kp = layer.query_content(x), layer.key_content(tokens), layer.key_position(places)
    if first:
        q, k = q + layer.query_position(position), k + kp
    qs = layer.query_sine(sine)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = (q[0, :, h] @ k[0, :, h].T + qs[0, :, h] @ kp[0, :, h].T) / math.sqrt(8)
        heads.append(scores.masked_fill(padding, -math.inf).softmax(-1) @ layer.value(tokens)[0, :, h])
    expected = layer.norm(x + layer.out_proj(torch.cat(heads, -1)))
    torch.testing.assert_close(layer(x, position, sine, tokens, places, padding), expected)


def test_deformable_attention_starts_on_rays_from_the_reference():
    """Spec section 1.4: head j looks along 2 pi j / H, scaled to the unit square, point k at k + 1 steps."""
    layer = MultiScaleDeformableAttention(32, 4, num_levels=2, num_points=3)
    bias = layer.sampling_offsets.bias.view(4, 2, 3, 2)
    rays = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for k in range(3):
        torch.testing.assert_close(bias[:, 0, k], rays * (k + 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[:, 0], bias[:, 1])
    assert layer.sampling_offsets.weight.abs().sum() == layer.attention_weights.weight.abs().sum() == 0


def test_deformable_attention_ignores_padded_tokens():
    layer = MultiScaleDeformableAttention(8, 2, 1, 2)
    query, tokens = torch.randn(1, 3, 8), torch.randn(1, 6, 8)
    reference = torch.rand(1, 3, 1, 2)
    padding = torch.tensor([[False, False, True] * 2])
    changed = tokens.clone()
    changed[:, [2, 5]] += 7
    once, again = (layer(query, reference, t, padding, [(2, 3)]) for t in (tokens, changed))
    torch.testing.assert_close(once, again)


def test_deformable_attention_is_projection_softmax_and_the_operator():
    layer = MultiScaleDeformableAttention(8, 2, 1, 2)
    nn.init.normal_(layer.attention_weights.weight)
    query, tokens, reference = torch.randn(1, 3, 8), torch.randn(1, 6, 8), torch.rand(1, 3, 1, 4)
    value = layer.value_proj(tokens).view(1, 6, 2, 4)
    offsets = layer.sampling_offsets(query).view(1, 3, 2, 1, 2, 2)
    weights = layer.attention_weights(query).view(1, 3, 2, 2).softmax(-1).view(1, 3, 2, 1, 2)
    loc = reference[:, :, None, :, None, :2] + offsets / 2 * reference[:, :, None, :, None, 2:] / 2
    expected = layer.output_proj(ms_deform_attn(value, [(2, 3)], loc, weights))
    padding = torch.zeros(1, 6, dtype=torch.bool)
    torch.testing.assert_close(layer(query, reference, tokens, padding, [(2, 3)]), expected)


def test_worked_sampling_locations():
    offsets = torch.tensor([2.0, -3.0]).view(1, 1, 1, 1, 1, 2)
    around = locations_from_points(torch.tensor([0.5, 0.5]).view(1, 1, 1, 2), offsets, [(6, 4)])
    torch.testing.assert_close(around.flatten(), torch.tensor([0.5 + 2 / 4, 0.5 - 3 / 6]))
    inside = locations_from_boxes(torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4), offsets, [(6, 4)])
    torch.testing.assert_close(inside.flatten(), torch.tensor([0.5 + 2 * 0.1, 0.5 - 3 * 0.2]))


@pytest.mark.parametrize("layer", [SelfAttention, ConditionalSelfAttention, ConditionalCrossAttention])
def test_heads_must_divide_the_channels(layer):
    with pytest.raises(ValueError, match=naming(10, 4)):
        layer(10, 4)


@pytest.mark.parametrize("first", [True, False])
def test_multi_level_attention_weighs_the_answer_of_each_level(first):
    """Each level attended on its own, projected, then mixed by the softmax of the asking query (spec section 1.7)."""
    attention = MultiLevelConditionalCrossAttention(16, 4, 2, add_query_position=first)
    shapes, n, q = [(3, 4), (2, 2)], 2, 5
    x, position, sine, asked = (torch.randn(n, q, 16) for _ in range(4))
    tokens, places, padding = torch.randn(n, 16, 16), torch.randn(n, 16, 16), torch.rand(n, 16) < 0.3
    padding[:, [0, 12]] = False
    out = attention(x, position, sine, tokens, places, padding, shapes, asked)

    query, key = attention.query_content(x), attention.key_content(tokens)
    if first:
        query, key = query + attention.query_position(position), key + attention.key_position(places)
    query = torch.cat([query.view(n, q, 4, 4), attention.query_sine(sine).view(n, q, 4, 4)], -1).flatten(2)
    key = torch.cat([key.view(n, 16, 4, 4), attention.key_position(places).view(n, 16, 4, 4)], -1).flatten(2)
    weights = attention.level_weights(asked).softmax(-1)
    mixed = 0
    for level, cells in enumerate((slice(0, 12), slice(12, 16))):
        answer = loop_attention(query, key[:, cells], attention.value(tokens)[:, cells], 4, padding[:, None, cells])
        mixed = mixed + weights[..., level : level + 1] * attention.out_proj(answer)
    torch.testing.assert_close(out, attention.norm(x + mixed), atol=1e-5, rtol=1e-5)


def dropped(monkeypatch, layer, run):
    """How many attention weights a layer in training loses, seen as its dropout argument in each call."""
    from dn_detr_d2.layers import attention

    seen, real = [], attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda *args, dropout_p=0.0, **kwargs: seen.append(dropout_p) or real(*args, **kwargs, dropout_p=dropout_p),
    )
    for training in (True, False):
        layer.train(training)
        run(layer)
    return seen


@pytest.mark.parametrize("name", ["self", "conditional self", "conditional cross", "multi-level"])
def test_attention_weights_are_dropped_in_training_alone(monkeypatch, name):
    x, tokens, padding = torch.randn(1, 3, 8), torch.randn(1, 6, 8), torch.zeros(1, 6, dtype=torch.bool)
    cross = (x, x, x, tokens, tokens, padding)
    layer, arguments, calls = {
        "self": (SelfAttention(8, 2, 0.3), (x, x), 1),
        "conditional self": (ConditionalSelfAttention(8, 2, 0.3), (x, x), 1),
        "conditional cross": (ConditionalCrossAttention(8, 2, 0.3), cross, 1),
        "multi-level": (MultiLevelConditionalCrossAttention(8, 2, 2, 0.3), (*cross, [(2, 2), (1, 2)], x), 2),
    }[name]
    assert dropped(monkeypatch, layer, lambda layer: layer(*arguments)) == [0.3] * calls + [0.0] * calls


def test_dropped_attention_of_conditional_attention_keeps_its_mean():
    """With values of 1, what a query finds is the sum of its kept weights / (1 - p): its mean is 1, and it scatters."""
    torch.manual_seed(0)
    layer = ConditionalSelfAttention(4, 1, 0.5).train()
    with torch.no_grad():
        layer.value.weight.zero_(), layer.value.bias.fill_(1.0)
        layer.out_proj = nn.Identity()
        layer.dropout.forward = lambda x: x  # the residual branch has one of its own
        layer.norm = nn.Identity()
        x = torch.zeros(1, 4000, 4)
        keys = torch.zeros(1, 4000, 4)
        found = layer(x[:, :500], keys[:, :500])
    assert found.std() > 0.01
    assert found.mean() == pytest.approx(1.0, abs=0.02)


def deformable_inputs(layers, n=2, shapes=((3, 4), (2, 2)), queries=5):
    """(query, reference, tokens, padding, shapes) of random numbers, the second image with padding, for layers off their
    symmetric start."""
    cells = sum(h * w for h, w in shapes)
    padding = torch.zeros(n, cells, dtype=torch.bool)
    padding[1, ::3] = True
    inputs = (torch.randn(n, queries, 16), torch.rand(n, queries, 2, 2), torch.randn(n, cells, 16), padding)
    for parameter in nn.ModuleList(layers).parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return (*inputs, list(shapes))


def test_values_of_several_layers_are_those_of_each():
    layers = [MultiScaleDeformableAttention(16, 4, 2, 3) for _ in range(3)]
    inputs = deformable_inputs(layers)
    values = project_values(layers, inputs[2], inputs[3])
    for layer, value in zip(layers, values, strict=True):
        assert value.is_contiguous()  # or the operator would copy it
        torch.testing.assert_close(layer(*inputs, value), layer(*inputs))


def test_large_values_are_projected_layer_by_layer(monkeypatch):
    monkeypatch.setattr("dn_detr_d2.layers.attention.TOGETHER", 100)
    layers = [MultiScaleDeformableAttention(16, 4, 2, 3) for _ in range(3)]
    assert project_values(layers, torch.randn(1, 3, 16), torch.zeros(1, 3, dtype=torch.bool)) == [None] * 3


def test_rows_of_queries_and_tokens_give_the_rows_of_the_result():
    layer = MultiScaleDeformableAttention(16, 4, 2, 3)
    query, reference, tokens, padding, shapes = deformable_inputs([layer])
    found = layer(query.flatten(0, 1), reference, tokens.flatten(0, 1), padding, shapes)
    torch.testing.assert_close(found, layer(query, reference, tokens, padding, shapes).flatten(0, 1))


def test_self_attention_projects_with_and_without_gradients_alike():
    layer, x, position = SelfAttention(16, 4), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    nn.init.normal_(layer.in_proj.bias)
    blocked = torch.eye(5, dtype=torch.bool)
    with torch.no_grad():
        expected = layer(x, position, blocked)
    torch.testing.assert_close(layer(x, position, blocked), expected)
