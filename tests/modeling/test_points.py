"""The random points of masks: one function, looked up when points are drawn."""

import pytest
import torch
from detectron2.config import get_cfg

from dn_detr_d2 import add_dn_detr_config
from dn_detr_d2.losses import without_masks
from dn_detr_d2.modeling import points
from dn_detr_d2.modeling.build import build_criterion, build_matcher
from dn_detr_d2.structures import Predictions, Targets


def make_cfg(**weights):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    node = cfg.MODEL.DN_DETR
    node.MASK.ENABLED, node.MASK.NUM_POINTS, node.LOSS.CLASS_LOSS = True, 20, "softmax"
    for name, value in weights.items():
        node.LOSS[f"{name}_WEIGHT"] = node.MATCHER[f"{name}_COST"] = value
    return cfg


def case():
    masks = [torch.rand(2, 16, 16) < 0.5, torch.rand(1, 16, 16) < 0.5]
    targets = Targets.pad([torch.tensor([0, 1]), torch.tensor([2])], [torch.rand(2, 4), torch.rand(1, 4)], masks=masks)
    return Predictions(torch.zeros(3, 2, 4, 4), None, torch.randn(3, 2, 4, 8), torch.randn(2, 8, 4, 4)), targets


def test_points_are_uniform():
    found = points.random_points("match", 3, 20000, torch.device("cpu"))
    assert (found.shape, found.dtype) == ((3, 20000, 2), torch.float32)
    assert found.mean(1).flatten().tolist() == pytest.approx([0.5] * 6, abs=0.01)
    assert 0 <= found.min() < 1e-3 < 1 - 1e-3 < found.max() <= 1


def test_every_point_comes_from_a_function_that_can_be_replaced(monkeypatch):
    cfg = make_cfg(L1=0.0, GIOU=0.0)
    matcher, criterion, (predictions, targets) = build_matcher(cfg), build_criterion(cfg, boxes=False), case()
    asked = []

    def replacement(kind, num_sets, num_points, device):
        asked.append((kind, num_sets, num_points))
        return torch.full((num_sets, num_points, 2), 0.5, device=device)

    monkeypatch.setattr("dn_detr_d2.modeling.points.random_points", replacement)
    state = torch.get_rng_state()
    criterion(predictions, targets, matcher(predictions, targets), 3)
    assert asked == [("match", 2, 20), ("loss", 9, 60), ("rest", 9, 5)]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mask_model_has_losses_of_masks_and_those_of_boxes_that_count():
    matcher, criterion = (
        build_matcher(make_cfg(L1=0.0, GIOU=0.0)),
        build_criterion(make_cfg(L1=0.0, GIOU=0.0), boxes=False),
    )
    assert [cost.name for cost in matcher.costs] == ["class", "mask"]
    assert [name for term in criterion.terms for name in term.names] == ["class", "mask", "dice"]
    assert criterion.is_mean("class")
    with_boxes = build_criterion(make_cfg())
    assert [term.name for term in with_boxes.terms] == ["class", "l1", "giou", "mask"]
    assert [term.name for term in without_masks(with_boxes).terms] == ["class", "l1", "giou"]


def test_weights_come_from_the_config():
    (mask,) = build_criterion(make_cfg(MASK=3.0, DICE=7.0, L1=0.0, GIOU=0.0), boxes=False).terms[1:]
    assert (mask.weight, mask.dice_weight, mask.candidates, mask.kept, mask.rest) == (3, 7, 60, 15, 5)
    (cost,) = build_matcher(make_cfg(MASK=3.0, DICE=7.0, L1=0.0, GIOU=0.0)).costs[1:]
    assert (cost.mask_weight, cost.dice_weight, cost.num_points) == (3, 7, 20)
