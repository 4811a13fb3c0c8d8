"""Batches with hidden padding against each image alone, which has no padding at all."""

import pytest
import torch
from conftest import DENOISING_SYSTEMS, SYSTEMS, make_batch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from torch import nn

import dn_detr_d2.modeling.backbone  # noqa: F401  registers the dilated ResNet
from dn_detr_d2 import ConfigError
from dn_detr_d2.modeling.backbone import build_dc5_resnet_backbone
from dn_detr_d2.modeling.hidden_padding import group_norm, resnet_maps
from dn_detr_d2.modeling.neck import padding_mask
from dn_detr_d2.utils.fold_norms import fold_norms

SIZES = ((70, 90), (90, 70), (64, 96), (97, 101), (33, 57))
WIDE = ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
WIDE += ["MODEL.RESNETS.WIDTH_PER_GROUP", 64]
SIDES = st.integers(1, 140)


def norms_off_the_start(network):
    """Norms that do make numbers of the zeros of padding."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            for name, low in (("weight", 0.5), ("bias", -0.3), ("running_mean", -0.2), ("running_var", 0.5)):
                getattr(module, name).data.uniform_(low, low + 0.9)


def resnet(depth=50, *, dilated=False, stride_in_1x1=False):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = depth, stride_in_1x1
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = (64, 64) if depth < 50 else (8, 4)
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64 if depth < 50 else 2
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    cfg.MODEL.RESNETS.RES5_DILATION = 2 if dilated else 1
    build = build_dc5_resnet_backbone if dilated else build_resnet_backbone
    network = build(cfg, ShapeSpec(channels=3)).eval()
    norms_off_the_start(network)
    return network


NETWORKS = {
    "18 layers": lambda: resnet(18),
    "50 layers": resnet,
    "dilated": lambda: resnet(dilated=True),
    "stride in the first convolution": lambda: resnet(stride_in_1x1=True),
    "folded": lambda: (network := resnet(), fold_norms(network))[0],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_maps_of_a_resnet_are_those_of_each_image_alone(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().double()

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), st.integers(0, 40), st.integers(0, 40))
    def check(sizes, below, beside):
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        images = torch.zeros(len(sizes), 3, height + below, width + beside, dtype=torch.float64)
        for image, (h, w) in zip(images, sizes, strict=True):
            image[:, :h, :w] = torch.randn(3, h, w)
        padding = padding_mask(torch.tensor(sizes), *images.shape[-2:])
        with torch.no_grad():
            together = resnet_maps(network, images, padding)
            for i, (h, w) in enumerate(sizes):
                alone = network(images[i : i + 1, :, :h, :w])
                assert alone.keys() == together.keys()
                for level, x in alone.items():
                    rows, columns = x.shape[-2:]
                    found = together[level][i : i + 1, :, :rows, :columns]
                    torch.testing.assert_close(found, x, atol=1e-10, rtol=1e-10)

    check()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 4), st.integers(0, 4))
def test_a_group_norm_is_that_of_the_image_alone(height, width, below, beside):
    norm = nn.GroupNorm(2, 6)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = 9 * torch.randn(2, 6, height + below, width + beside)
    padded = padding_mask(torch.tensor([[height, width], [height + below, width + beside]]), *x.shape[-2:])
    found = group_norm(norm, x, padded)
    torch.testing.assert_close(found[:1, :, :height, :width], norm(x[:1, :, :height, :width]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:], norm(x[1:]), atol=1e-4, rtol=1e-4)


def detections(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model(batch)]


def assert_alike(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize("divisible", [0, 64])
@pytest.mark.parametrize("system", sorted(SYSTEMS.keys() - {"anchor_detr"}))
def test_detections_do_not_depend_on_neighbours_and_padding(toy_model, system, divisible):
    """Sizes that are no multiples of any stride; as without hidden padding, the comparison sees what padding does."""
    model = toy_model(system, "TEST.HIDE_PADDING", True).eval()
    norms_off_the_start(model.backbone)
    batch, passes = make_batch(*[0] * 5, sizes=SIZES), []
    alone = [detections(model, [x])[0] for x in batch]
    model.pad_to_largest, model.size_divisibility = True, divisible
    hook = model.encoder.register_forward_hook(lambda *given: passes.append(len(given[2].tokens)))
    assert_alike(detections(model, batch), alone)
    assert passes == [5]
    hook.remove()
    model.hide_padding = False
    changes = [(a.scores - b.scores).abs().max() for a, b in zip(detections(model, batch), alone, strict=True)]
    assert max(changes) > 1e-4


@pytest.mark.parametrize("queries", [40, 60])
def test_no_query_is_a_cell_of_padding(toy_model, queries):
    """The smallest of these images has 57 cells, the others more than a hundred: with 60 queries it passes by itself."""
    model = toy_model("dino", "TEST.HIDE_PADDING", True, "MODEL.DN_DETR.NUM_QUERIES", queries).eval()
    batch, passes = make_batch(*[0] * 5, sizes=SIZES), []
    assert model.neck.count_cells(SIZES[-1]) == 5 * 8 + 3 * 4 + 2 * 2 + 1
    alone = [detections(model, [x])[0] for x in batch]
    model.pad_to_largest = True
    model.encoder.register_forward_hook(lambda *given: passes.append(len(given[2].tokens)))
    assert_alike(detections(model, batch), alone)
    assert passes == ([5] if queries == 40 else [4, 1])


@pytest.mark.parametrize("system", sorted({*DENOISING_SYSTEMS} - {"dino", "dino_like"}))
def test_known_objects_are_seen_alike(toy_model, system):
    model = toy_model(system, "TEST.HIDE_PADDING", True).eval()
    batch = make_batch(2, 0, 1, sizes=SIZES)
    for record in batch:
        record["known"] = record["instances"]
    alone = [detections(model, [x])[0] for x in batch]
    model.pad_to_largest = True
    assert_alike(detections(model, batch), alone)


def test_training_is_as_before(toy_model):
    model = toy_model("dn_detr")
    losses = []
    for hide in (False, True):
        model.hide_padding = hide
        torch.manual_seed(0)
        losses.append(model(make_batch(2, 3)))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize(
    ("system", "options", "named"),
    [
        ("anchor_detr", [], "RowColumnEncoder"),
        ("mask2former", [], "MASK.ENABLED"),
        (
            "dn_detr",
            ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.DN_DETR.IN_FEATURES", ["p3"]],
            "build_swin_backbone",
        ),
        ("dn_detr", WIDE, "build_resnet_backbone"),
    ],
)
def test_models_that_see_padding_are_refused(toy_model, system, options, named):
    with pytest.raises(ConfigError, match=naming("TEST.HIDE_PADDING", named)):
        toy_model(system, "TEST.HIDE_PADDING", True, *options)
