"""DETR's softmax: cost, loss and detections against DETR's formulas written out."""

import pytest
import torch
from conftest import make_batch
from naming import naming
from torch import nn

from dn_detr_d2.modeling import DetectionHeads, SoftmaxCriterion, SoftmaxMatcher
from dn_detr_d2.modeling.postprocess import select_best
from dn_detr_d2.structures import Assignment, Predictions, Targets


def predictions(k=2, n=2, q=5, classes=3):
    return Predictions(torch.randn(k, n, q, classes + 1, requires_grad=True), torch.rand(k, n, q, 4) * 0.3 + 0.3)


def test_class_cost_is_minus_the_probability():
    predicted = predictions()
    targets = Targets.pad([torch.tensor([2, 0]), torch.tensor([1])], [torch.rand(2, 4), torch.rand(1, 4)])
    cost = SoftmaxMatcher(class_cost=1, l1_cost=0, giou_cost=0).cost(predicted, targets)
    p = predicted.logits.exp() / predicted.logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(cost[:, 0], -p[:, 0][..., [2, 0]])
    torch.testing.assert_close(cost[:, 1, :, 0], -p[:, 1, :, 1])


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_class_loss_is_the_weighted_cross_entropy_of_torch(counts):
    predicted = predictions()
    labels = [torch.randint(3, (n,)) for n in counts]
    targets = Targets.pad(labels, [torch.rand(n, 4) * 0.3 + 0.3 for n in counts])
    assignment = SoftmaxMatcher()(predicted, targets)
    losses = SoftmaxCriterion(no_object_weight=0.1)(predicted, targets, assignment, torch.tensor(5.0))
    weight = torch.tensor([1, 1, 1, 0.1])
    for k in range(2):
        wanted = torch.full((2, 5), 3)
        for i, (query, target) in enumerate(assignment.per_image(2, k)):
            wanted[i, query] = labels[i][target]
        entropy = nn.functional.cross_entropy(predicted.logits[k].flatten(0, 1), wanted.flatten(), weight)
        torch.testing.assert_close(losses["class"][k], entropy)


def test_uncounted_queries_have_no_class_loss():
    predicted, mask = predictions(k=1, n=1), torch.tensor([[True, True, False, True, False]])
    targets = Targets.pad([torch.tensor([1])], [torch.rand(1, 4)])
    assignment = Assignment(torch.tensor([0]), torch.tensor([[3]]), torch.tensor([[0]]), mask)
    loss = SoftmaxCriterion()(predicted, targets, assignment, torch.tensor(1.0))["class"].sum()
    gradient = torch.autograd.grad(loss, predicted.logits)[0]
    assert (gradient[0, 0].abs().sum(-1) > 0).tolist() == mask[0].tolist()


@pytest.mark.parametrize("weight", [0, -1, 1.5])
def test_a_weight_outside_its_range_is_refused(weight):
    with pytest.raises(ValueError, match=naming("no_object_weight")):
        SoftmaxCriterion(no_object_weight=weight)


def test_each_query_is_detected_once_with_its_best_class():
    logits = torch.tensor([[2.0, 0, 1, 5], [0, 3, 1, 0], [1, 0, 0, 1]])  # the last column is "no object"
    found = select_best(logits, torch.tensor([[0.5, 0.5, 0.2, 0.4]] * 3), (10, 20), top_k=2)
    assert found.pred_classes.tolist() == [1, 0]  # queries 1 and 2; query 0 says "no object"
    expected = [logits[1].softmax(0)[1], logits[2].softmax(0)[0]]
    torch.testing.assert_close(found.scores, torch.stack(expected))
    torch.testing.assert_close(found.pred_boxes.tensor[0], torch.tensor([8.0, 3, 12, 7]))


def test_heads_put_no_object_behind_the_classes():
    heads, x = DetectionHeads(8, 3, 2, no_object=True), torch.randn(4, 8)
    logits = heads.classify(x, 1)
    torch.testing.assert_close(logits[:, :3], heads.class_heads[1](x))
    torch.testing.assert_close(logits[:, 3:], heads.no_object_heads[1](x))


def test_detr_predicts_at_most_one_box_a_query(toy_model):
    found = toy_model("detr", "TEST.DETECTIONS_PER_IMAGE", 100).eval()(make_batch(0))[0]["instances"]
    assert len(found) == 9
    assert found.scores.max() < 1


def test_default_costs_are_those_of_detr():
    """Carion et al. (ECCV 2020), Appendix A.4: 1 of the class, 5 of L1, 2 of GIoU."""
    assert {cost.name: cost.weight for cost in SoftmaxMatcher().costs} == {"class": 1, "l1": 5, "giou": 2}
