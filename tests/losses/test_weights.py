"""Weights of objects in the losses, against sums over single pairs written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_d2 import SetCriterion
from dn_detr_d2.boxes import cxcywh_to_xyxy, giou
from dn_detr_d2.losses import SoftmaxCriterion
from dn_detr_d2.structures import Assignment, Predictions, Targets

CLASSES = 3


def case(weights, seed=0, logits=CLASSES):
    """Two layers, two images with two objects and one, six queries."""
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.tensor([1, 2]), torch.tensor([0])]
    boxes = [torch.rand(len(x), 4, generator=generator) * 0.4 + 0.3 for x in labels]
    split = None if weights is None else list(torch.tensor(weights).split([2, 1]))
    targets = Targets.pad(labels, boxes, weights=split)
    shape = torch.randn(2, 2, 6, logits, generator=generator), torch.rand(2, 2, 6, 4, generator=generator) * 0.4 + 0.3
    pairs = Assignment(
        torch.tensor([0, 0, 1]), torch.tensor([[3, 1, 2], [0, 5, 4]]), torch.tensor([[0, 1, 0], [1, 0, 0]])
    )
    return Predictions(*shape), targets, pairs


def focal(x, positive):
    p = torch.sigmoid(x)
    return 0.25 * (1 - p) ** 2 * -F.logsigmoid(x) if positive else 0.75 * p**2 * -F.logsigmoid(-x)


def by_hand(predictions, targets, pairs):
    """Focal class loss, L1 and GIoU of each layer, unweighted terms, one pair and one logit after the other."""
    found = torch.zeros(3, len(predictions.logits))
    for k, logits in enumerate(predictions.logits):
        wanted = {}
        for image, query, target in zip(pairs.image, pairs.query[k], pairs.target[k], strict=True):
            weight, box = targets.weights[image, target], predictions.boxes[k, image, query]
            wanted[int(image), int(query), int(targets.labels[image, target])] = weight
            other = targets.boxes[image, target]
            found[1, k] += weight * (box - other).abs().sum()
            found[2, k] += weight * (1 - giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(other)))
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(CLASSES)).tolist():
            paired = tuple(place) in wanted
            found[0, k] += focal(logits[tuple(place)], paired) * (wanted[tuple(place)] if paired else 1)
    return found


WEIGHTS = st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3)


@settings(max_examples=25)
@given(WEIGHTS, st.integers(0, 99))
def test_losses_of_pairs_are_multiplied_and_what_is_no_object_counts_as_before(weights, seed):
    predictions, targets, pairs = case(weights, seed)
    found = SetCriterion(class_weight=1, l1_weight=1, giou_weight=1)(predictions, targets, pairs, 4.0)
    expected = by_hand(predictions, targets, pairs) / 4
    torch.testing.assert_close(torch.stack([found[name] for name in ("class", "l1", "giou")]), expected)


@pytest.mark.parametrize(("criterion", "logits"), [(SetCriterion, CLASSES), (SoftmaxCriterion, CLASSES + 1)])
def test_weights_of_one_change_nothing(criterion, logits):
    (predictions, with_ones, pairs), (_, without, _) = case([1.0, 1.0, 1.0], 1, logits), case(None, 1, logits)
    found, expected = (criterion()(predictions, targets, pairs, 4.0) for targets in (with_ones, without))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_softmax_weighs_the_cross_entropy_of_pairs():
    predictions, targets, pairs = case([0.5, 0.0, 2.0], 2, CLASSES + 1)
    found = SoftmaxCriterion(class_weight=1)(predictions, targets, pairs, 4.0)["class"]
    for k, logits in enumerate(predictions.logits):
        label, weight = torch.full((2, 6), CLASSES), torch.full((2, 6), 0.1)
        for image, query, target in zip(pairs.image, pairs.query[k], pairs.target[k], strict=True):
            label[image, query], weight[image, query] = targets.labels[image, target], targets.weights[image, target]
        entropy = -logits.log_softmax(-1).gather(-1, label[..., None])[..., 0]
        torch.testing.assert_close(found[k], (entropy * weight).sum() / (3 + 0.1 * 9))
