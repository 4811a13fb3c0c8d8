from dataclasses import replace

import pytest
import torch
from naming import naming
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from dn_detr_d2 import HungarianMatcher, SetCriterion, cxcywh_to_xyxy
from dn_detr_d2.losses import BoxL1Cost
from dn_detr_d2.losses.functional import focal_terms
from dn_detr_d2.structures import Assignment, Predictions, Targets


def reference_losses(logits, boxes, pairs, labels, target_boxes, normalizer):
    """Losses of one layer, image by image, with one-hot targets and the N x N GIoU of the official code."""
    onehot, l1, overlap = torch.zeros_like(logits), 0.0, 0.0
    for i, (q, t) in enumerate(pairs):
        onehot[i, q, labels[i][t]] = 1
        l1 = l1 + (boxes[i, q] - target_boxes[i][t]).abs().sum()
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes[i, q]), cxcywh_to_xyxy(target_boxes[i][t]))
        overlap = overlap + (1 - torch.diag(giou)).sum()
    focal = sigmoid_focal_loss(logits, onehot, 0.25, 2.0, reduction="sum")
    return {"class": focal / normalizer, "l1": 5 * l1 / normalizer, "giou": 2 * overlap / normalizer}


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (1,)])
def test_losses_and_gradients_equal_the_per_layer_reference(counts):
    k, q, classes = 3, 6, 4
    logits = torch.randn(k, len(counts), q, classes, requires_grad=True)
    boxes = (torch.rand(k, len(counts), q, 4) * 0.3 + 0.3).requires_grad_()
    labels = [torch.randint(classes, (n,)) for n in counts]
    target_boxes = [torch.rand(n, 4) * 0.3 + 0.3 for n in counts]
    targets, predictions = Targets.pad(labels, target_boxes), Predictions(logits, boxes)
    assignment = HungarianMatcher()(predictions, targets)
    normalizer = torch.tensor(float(max(sum(counts), 1)))
    losses = SetCriterion()(predictions, targets, assignment, normalizer)
    expected = [
        reference_losses(logits[i], boxes[i], assignment.per_image(len(counts), i), labels, target_boxes, normalizer)
        for i in range(k)
    ]
    for name, values in losses.items():
        stacked = torch.stack([torch.as_tensor(layer[name]) for layer in expected])
        torch.testing.assert_close(values, stacked, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(sum(v.sum() for v in losses.values()), (logits, boxes), retain_graph=True)
    theirs = torch.autograd.grad(
        sum(torch.as_tensor(v) for layer in expected for v in layer.values()), (logits, boxes), allow_unused=True
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-5, rtol=1e-5)


def test_focal_loss_of_the_worked_example():
    """Spec section 3: two queries, three classes, one-hot rows (1,0,0) and (0,0,1), two boxes -> 0.921261."""
    logits = torch.tensor([[0, 1, -2], [2, -1, 0.5]]).view(1, 1, 2, 3)
    targets = Targets.pad([torch.tensor([0, 2])], [torch.full((2, 4), 0.5)])
    assignment = Assignment(torch.tensor([0, 0]), torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    losses = SetCriterion()(Predictions(logits, torch.full((1, 1, 2, 4), 0.5)), targets, assignment, torch.tensor(2.0))
    assert losses["class"].item() == pytest.approx(0.921261, abs=1e-6)
    assert losses["l1"].item() == 0
    assert losses["giou"].item() == pytest.approx(0, abs=1e-4)


def test_box_losses_of_worked_boxes():
    """Unit squares half a side apart: L1 0.5 -> 2.5 weighted, 1 - GIoU = 2/3 -> 4/3 weighted."""
    predictions = Predictions(torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 0.5, 1, 1]).view(1, 1, 1, 4))
    targets = Targets.pad([torch.tensor([0])], [torch.tensor([[0.5, 0.5, 1, 1]])])
    assignment = Assignment(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[0]]))
    losses = SetCriterion()(predictions, targets, assignment, torch.tensor(1.0))
    assert (losses["l1"].item(), losses["giou"].item()) == pytest.approx((2.5, 4 / 3), abs=1e-5)


def test_one_row_of_pairs_holds_for_all_layers():
    predictions = Predictions(torch.randn(3, 1, 4, 2), torch.rand(3, 1, 4, 4) * 0.5 + 0.2)
    targets = Targets.pad([torch.tensor([1, 0])], [torch.rand(2, 4) * 0.5 + 0.2])
    row = Assignment(torch.tensor([0, 0]), torch.tensor([[3, 1]]), torch.tensor([[0, 1]]))
    rows = Assignment(row.image, row.query.expand(3, -1), row.target.expand(3, -1))
    once, again = (SetCriterion()(predictions, targets, a, torch.tensor(2.0)) for a in (row, rows))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_queries_that_do_not_count_add_nothing():
    predictions = Predictions(torch.randn(1, 1, 4, 2), torch.rand(1, 1, 4, 4))
    targets = Targets.pad([torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 4)])
    empty = torch.zeros(1, 0, dtype=torch.int64)
    nothing = Assignment(empty[0], empty, empty)
    masked = replace(nothing, class_loss_mask=torch.tensor([[True, False, False, True]]))
    some = SetCriterion()(predictions, targets, masked, torch.tensor(1.0))
    left = Predictions(predictions.logits[:, :, [0, 3]], predictions.boxes[:, :, [0, 3]])
    torch.testing.assert_close(some["class"], SetCriterion()(left, targets, nothing, torch.tensor(1.0))["class"])


def test_focal_terms_are_finite_for_extreme_logits():
    for terms in focal_terms(torch.tensor([-1e4, -100.0, 100, 1e4]), 0.25, 2.0):
        assert terms.isfinite().all()


def test_l1_cost_is_the_sum_of_differences_of_all_pairs():
    a, b = torch.rand(3, 2, 5, 4), torch.rand(2, 3, 4)
    found = BoxL1Cost()(Predictions(torch.zeros(3, 2, 5, 1), a), Targets.pad(list(torch.zeros(2, 3).long()), list(b)))
    torch.testing.assert_close(found, (a[:, :, :, None] - b[:, None]).abs().sum(-1))


def test_losses_are_float32_under_autocast():
    predictions = Predictions(torch.randn(1, 1, 4, 2).bfloat16(), torch.rand(1, 1, 4, 4))
    targets = Targets.pad([torch.tensor([1])], [torch.rand(1, 4)])
    with torch.autocast("cpu", torch.bfloat16):
        losses = SetCriterion()(predictions, targets, HungarianMatcher()(predictions, targets), torch.tensor(1.0))
    assert {v.dtype for v in losses.values()} == {torch.float32}


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=naming(-1)):
        SetCriterion(l1_weight=-1)
