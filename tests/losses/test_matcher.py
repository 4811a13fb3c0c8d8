import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from dn_detr_d2 import HungarianMatcher, cxcywh_to_xyxy
from dn_detr_d2.structures import Predictions, Targets


def make_case(k, counts, q=6, classes=4, seed=0):
    torch.manual_seed(seed)
    predictions = Predictions(torch.randn(k, len(counts), q, classes), torch.rand(k, len(counts), q, 4) * 0.4 + 0.3)
    labels = [torch.randint(classes, (n,)) for n in counts]
    return predictions, labels, [torch.rand(n, 4) * 0.4 + 0.3 for n in counts]


def slow_cost(logits, boxes, labels, target_boxes):
    """DETR's costs of one image and one layer, term by term (spec section 3)."""
    p = logits.sigmoid()[:, labels]
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, target_boxes, p=1)
    overlap = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return 2 * (positive - negative) + 5 * l1 - 2 * overlap


def test_class_cost_of_the_worked_logits():
    """Spec section 3: logits (0, 1, -2) as positives of the three classes."""
    predictions = Predictions(torch.tensor([0, 1.0, -2]).view(1, 1, 1, 3), torch.full((1, 1, 1, 4), 0.5))
    targets = Targets.pad([torch.arange(3)], [torch.full((3, 4), 0.5)])
    cost = HungarianMatcher(class_cost=1, l1_cost=0, giou_cost=0).cost(predictions, targets).flatten()
    torch.testing.assert_close(cost, torch.tensor([-0.08664, -0.52074, 0.41117]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1,), (6, 8), (0, 0)])
def test_pairs_equal_scipy_image_by_image_and_layer_by_layer(counts):
    predictions, labels, boxes = make_case(3, counts)
    assignment = HungarianMatcher()(predictions, Targets.pad(labels, boxes))
    for k, (i, n) in itertools.product(range(3), enumerate(counts)):
        queries, objects = assignment.per_image(len(counts), row=k)[i]
        cost = slow_cost(predictions.logits[k, i], predictions.boxes[k, i], labels[i], boxes[i])
        rows, columns = linear_sum_assignment(cost)
        assert len(queries) == min(n, 6)
        assert queries.tolist() == rows.tolist()
        assert objects.tolist() == columns.tolist()


def test_cost_equals_the_slow_cost():
    predictions, labels, boxes = make_case(2, (3, 1))
    cost = HungarianMatcher().cost(predictions, Targets.pad(labels, boxes))
    for k, i in np.ndindex(2, 2):
        expected = slow_cost(predictions.logits[k, i], predictions.boxes[k, i], labels[i], boxes[i])
        torch.testing.assert_close(cost[k, i, :, : len(labels[i])], expected, atol=2e-4, rtol=0)


def test_the_order_of_ground_truths_does_not_matter():
    predictions, labels, boxes = make_case(1, (5,))
    order = torch.randperm(5)
    once = HungarianMatcher()(predictions, Targets.pad(labels, boxes))
    again = HungarianMatcher()(predictions, Targets.pad([labels[0][order]], [boxes[0][order]]))
    pairs = {(q, t) for q, t in zip(once.query[0].tolist(), once.target[0].tolist(), strict=True)}
    assert pairs == {
        (q, order[t].item()) for q, t in zip(again.query[0].tolist(), again.target[0].tolist(), strict=True)
    }


def test_other_images_do_not_change_the_pairs_of_an_image():
    predictions, labels, boxes = make_case(2, (2, 3))
    both = HungarianMatcher()(predictions, Targets.pad(labels, boxes)).per_image(2, row=1)[0]
    first = Predictions(predictions.logits[:, :1], predictions.boxes[:, :1])
    alone = HungarianMatcher()(first, Targets.pad(labels[:1], boxes[:1])).per_image(1, row=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


def test_bfloat16_predictions_are_matched_in_float32():
    predictions, labels, boxes = make_case(1, (3, 2))
    targets = Targets.pad(labels, boxes)
    half = Predictions(predictions.logits.bfloat16(), predictions.boxes)
    with torch.autocast("cpu", torch.bfloat16):
        assert HungarianMatcher().cost(half, targets).dtype == torch.float32
    torch.testing.assert_close(
        HungarianMatcher().cost(half, targets),
        HungarianMatcher().cost(Predictions(half.logits.float(), half.boxes), targets),
    )


@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_a_prediction_that_is_not_finite_is_named(part):
    predictions, labels, boxes = make_case(2, (2, 3))
    getattr(predictions, part)[1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 1, image 1"):
        HungarianMatcher()(predictions, Targets.pad(labels, boxes))


@pytest.mark.parametrize("costs", [(0, 0, 0), (-1, 5, 2)])
def test_useless_costs_are_refused(costs):
    with pytest.raises(ValueError, match="-1" if min(costs) < 0 else "all be 0"):
        HungarianMatcher(class_cost=costs[0], l1_cost=costs[1], giou_cost=costs[2])
