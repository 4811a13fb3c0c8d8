import pytest
import torch
from naming import naming

from dn_detr_d2.layers import MLP, FeedForward


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
