"""Start weights against the bounds of the distributions that the published codes draw them from.

Xavier-uniform: |w| <= sqrt(6 / (in + out)). PyTorch's linear layers and convolutions: |w|, |b| <= 1 / sqrt(in), with in
the inputs of an output.
"""

import pytest
import torch
from detectron2.modeling import build_model
from naming import naming

from dn_detr_d2 import ConfigError


def reach(tensor):
    return tensor.abs().max().item()


def assert_xavier(*weights):
    for weight in weights:
        assert reach(weight) == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.03)


def assert_pytorch(*layers):
    for layer in layers:
        assert reach(layer.weight) == pytest.approx(layer.weight[0].numel() ** -0.5, rel=0.03)
        assert layer.bias.abs().sum() > 0


@pytest.fixture
def started(toy_cfg):
    """started(system, *overrides) -> a model of 64 channels as it starts."""
    return lambda system, *overrides: build_model(
        toy_cfg(system, "MODEL.DN_DETR.HIDDEN_DIM", 64, "MODEL.DN_DETR.ENCODER.NUM_LAYERS", 2, *overrides)
    )


def test_the_encoder_only_model_starts_as_its_authors_code(started):
    """Spec section 1.7: one Xavier pass after everything was built; box heads and projections of maps are not in it."""
    model = started("encoder_only", "MODEL.DN_DETR.QUERY_SOURCE.NUM_PATTERNS", 64)
    attention = model.encoder.layers[1].self_attn
    assert_xavier(attention.sampling_offsets.weight, attention.attention_weights.weight, attention.value_proj.weight)
    assert reach(attention.sampling_offsets.bias) == pytest.approx(attention.num_points)  # the rays are kept
    assert attention.attention_weights.bias.abs().sum() == 0
    assert_xavier(model.query_source.patterns.weight, model.decoder.layers[1].ffn.linear1.weight)
    assert_pytorch(model.decoder.heads.box_heads[0].layers[0], *(x[0] for x in model.neck.projections))
    assert reach(model.decoder.heads.box_heads[0].layers[-1].weight) == pytest.approx(1 / 8, rel=0.03)
    assert model.encoder.level_embed.weight.std().item() == pytest.approx(1, abs=0.15)
    assert model.decoder.heads.class_heads[0].bias[0].item() == pytest.approx(-4.59512, abs=1e-5)


def test_anchor_detr_starts_as_its_authors_code(started):
    """Xavier in the input projections of attention alone, no bias there; layers are copies of one; points in the image."""
    model = started("anchor_detr")
    encoder, decoder = model.encoder, model.decoder
    for attention in (encoder.layers[0].self_attn, decoder.layers[0].self_attn, decoder.layers[0].cross_attn):
        assert_xavier(attention.in_proj.weight)
        assert reach(attention.out_proj.weight) == pytest.approx(1 / 8, rel=0.03)
        assert attention.in_proj.bias.abs().sum() == attention.out_proj.bias.abs().sum() == 0
    assert_pytorch(encoder.layers[0].ffn.linear1, decoder.layers[0].ffn.linear2)
    for part in (encoder, decoder):
        first, second = (part.layers[i].state_dict() for i in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
    points = model.query_source.points.weight
    assert 0 <= points.min() < 0.2 < 0.8 < points.max() <= 1
    assert decoder.heads.box_heads[0].layers[-1].bias.tolist() == [0, 0, -2, -2]


def test_layers_of_different_parts_start_alike_where_they_are_alike(started):
    """Only the first layer of DN-DETR's decoder projects the position of its query once more."""
    model = started("dn_detr", "MODEL.DN_DETR.INITIALIZATION", "anchor_detr")
    first, second = (dict(layer.named_parameters()) for layer in model.decoder.layers[:2])
    shared = first.keys() & second.keys()
    assert shared < first.keys()
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert_pytorch(model.encoder.position_scale.layers[0])


def test_proposals_of_mask_dino_start_as_linear_layers(started):
    assert_pytorch(started("mask_dino").query_source.project)
    assert_xavier(started("dino").query_source.project.weight)


def test_other_starts_are_refused(toy_cfg):
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.INITIALIZATION", "anchor_detr", "kaiming")):
        toy_cfg("dn_detr", "MODEL.DN_DETR.INITIALIZATION", "kaiming")
