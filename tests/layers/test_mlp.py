import pytest
import torch
from naming import naming
from torch import nn

from dn_detr_d2.layers import MLP, FeedForward, map_together
from dn_detr_d2.layers.mlp import in_rows


def test_mlp_has_relu_between_but_not_after():
    mlp = MLP(2, 3, 1)
    x = torch.randn(5, 2)
    hidden = (x @ mlp.layers[0].weight.T + mlp.layers[0].bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.layers[1].weight.T + mlp.layers[1].bias)


def test_mlp_of_one_width_is_refused():
    with pytest.raises(ValueError, match=r"\(4,\)"):
        MLP(4)


def test_prelu_has_one_learnt_slope_starting_at_a_quarter():
    block = FeedForward(4, 8, activation="prelu")
    assert block.activation.weight.tolist() == [0.25]


def test_feed_forward_is_post_norm_with_residual():
    block = FeedForward(4, 8)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(block(x), block.norm(x + block.linear2(block.linear1(x).relu())))


def test_unknown_activation_names_the_choices():
    with pytest.raises(ValueError, match=naming("'prelu', 'relu'", "'gelu'")):
        FeedForward(4, 8, activation="gelu")


def test_layers_together_are_the_layers_one_by_one():
    layers, rows = [nn.Linear(6, 4) for _ in range(3)], torch.randn(3, 5, 6)
    expected = torch.stack([layer(x) for layer, x in zip(layers, rows, strict=True)])
    torch.testing.assert_close(map_together(layers, rows), expected)


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (2, 1, 3, 6), (0, 3, 6), (2, 0, 6)])
def test_a_function_of_rows_has_the_shape_of_what_it_is_given(shape):
    layer, x = nn.Linear(6, 4), torch.randn(*shape)
    assert in_rows(layer, x).shape == (*shape[:-1], 4)
    torch.testing.assert_close(in_rows(layer, x), layer(x))
