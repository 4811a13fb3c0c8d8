"""Lists of terms: what a criterion and a matcher make of terms and costs that are not ours."""

import pytest
import torch

from dn_detr_d2 import HungarianMatcher, SetCriterion
from dn_detr_d2.losses import (
    BoxL1,
    BoxL1Cost,
    ClassFocal,
    ClassSoftmax,
    Cost,
    LossNormalizers,
    LossTerm,
    SoftmaxCriterion,
    name_layers,
    step_normalizers,
)
from dn_detr_d2.losses.functional import focal_terms
from dn_detr_d2.structures import Assignment, Predictions, Targets


class CountPairs(LossTerm):
    """How many pairs there are, a number for each layer."""

    name = "pairs"

    def __call__(self, predictions, targets, assignment, normalizers):
        return torch.full((len(predictions.logits),), float(len(assignment))) / normalizers.num_pairs


class FirstQuery(Cost):
    """The lower its index, the better a query."""

    name = "index"

    def __call__(self, predictions, targets):
        k, n, q, _ = predictions.logits.shape
        return torch.arange(float(q))[:, None].expand(k, n, q, targets.labels.shape[1])


def case():
    predictions = Predictions(torch.randn(3, 2, 6, 4), torch.rand(3, 2, 6, 4) * 0.4 + 0.3)
    labels = [torch.tensor([1, 2]), torch.tensor([0])]
    return predictions, Targets.pad(labels, [torch.rand(len(x), 4) * 0.4 + 0.3 for x in labels])


def test_a_term_of_ones_own_is_weighted_and_named():
    predictions, targets = case()
    pairs = Assignment(torch.tensor([0, 0, 1]), torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 0]]))
    found = SetCriterion([CountPairs(4.0), BoxL1(5)])(predictions, targets, pairs, 2.0)
    assert found["pairs"].tolist() == [6.0] * 3
    torch.testing.assert_close(found["l1"], SetCriterion()(predictions, targets, pairs, 2.0)["l1"])


def test_a_cost_of_ones_own_decides():
    predictions, targets = case()
    pairs = HungarianMatcher([FirstQuery()])(predictions, targets)
    assert [sorted(query.tolist()) for query, _ in pairs.per_image(2)] == [[0, 1], [0]]
    with_boxes = HungarianMatcher([FirstQuery(1e-9), BoxL1Cost(1.0)])(predictions, targets)
    boxes_alone = HungarianMatcher([BoxL1Cost(1.0)])(predictions, targets)
    assert torch.equal(with_boxes.query, boxes_alone.query)


def test_the_criterion_knows_which_terms_are_means():
    assert [SetCriterion().is_mean(name) for name in ("class", "l1", "giou")] == [False, False, False]
    assert [SoftmaxCriterion().is_mean(name) for name in ("class", "l1", "giou")] == [True, False, False]


def test_a_step_in_parts_divides_a_mean_by_the_queries_of_all_its_images():
    """Two images of 6 queries with 2 and 1 objects: as one batch, and one by one with the counts of both."""
    predictions, targets = case()
    pairs = Assignment(torch.tensor([0, 0, 1]), torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 0]]))
    whole = ClassSoftmax()(predictions, targets, pairs, LossNormalizers.of(3.0, targets))
    total = torch.zeros(3)
    for i in range(2):
        part = Predictions(predictions.logits[:, i : i + 1], predictions.boxes[:, i : i + 1])
        mine = pairs.image == i
        alone = Assignment(pairs.image[mine] * 0, pairs.query[:, mine], pairs.target[:, mine])
        n = targets.counts[i]
        some = Targets.pad([targets.labels[i, :n]], [targets.boxes[i, :n]], min_slots=2)
        total += ClassSoftmax()(part, some, alone, LossNormalizers(torch.tensor(3.0), targets.counts))
    torch.testing.assert_close(total, whole)


def test_a_step_in_parts_divides_the_class_loss_of_denoising_by_the_noised_objects_of_all_its_images():
    """Cross-entropies of 3 and 1 copies, of which 4 are in the step; the fourth query of the second image is padding."""
    predictions, targets = case()
    logits = predictions.logits.log_softmax(-1)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, :3] = mask[1, 0] = True
    norm, total = LossNormalizers(torch.tensor(4.0), targets.counts), torch.zeros(3)
    for i, (query, target) in enumerate([([0, 1, 2], [0, 1, 0]), ([0], [0])]):
        part = Predictions(predictions.logits[:, i : i + 1], predictions.boxes[:, i : i + 1])
        pairs = Assignment(
            torch.zeros(len(query)).long(), torch.tensor([query]), torch.tensor([target]), mask[i : i + 1]
        )
        total += ClassSoftmax()(part, Targets.pad([targets.labels[i]], [targets.boxes[i]]), pairs, norm)
    first, second = targets.labels[0, [0, 1, 0]], targets.labels[1, 0]
    expected = -(logits[:, 0, [0, 1, 2], first].sum(1) + logits[:, 1, 0, second]) / 4
    torch.testing.assert_close(total, expected)


def test_normalizers_of_one_process():
    both = step_normalizers([2, 1, 0], 15, "cpu")
    assert (both.matching.num_pairs.item(), both.denoising.num_pairs.item()) == (3, 15)
    assert both.step_counts == both.denoising.step_counts == [2, 1, 0]
    nothing = step_normalizers([0, 0], 0, "cpu", local_denoising=True)
    assert (nothing.matching.num_pairs.item(), nothing.denoising.num_pairs.item()) == (1, 1)


def test_layers_are_named_from_the_last():
    assert name_layers({"a": [1, 2, 3]}, "main", "aux") == {"main/a": 3, "aux/a_0": 1, "aux/a_1": 2}


def test_useless_lists_are_refused():
    with pytest.raises(ValueError, match="l1_weight"):
        SetCriterion([BoxL1(1)], l1_weight=2)
    with pytest.raises(ValueError, match="'class', 'class'"):
        SetCriterion([ClassFocal(), ClassSoftmax()])
    with pytest.raises(ValueError, match="l1_cost"):
        HungarianMatcher([BoxL1Cost(1)], l1_cost=2)
    with pytest.raises(ValueError, match="-2"):
        BoxL1Cost(-2)


@pytest.mark.parametrize("gamma", [0.5, -1.0, float("nan"), float("inf")])
def test_a_gamma_with_infinite_gradients_is_refused(gamma):
    with pytest.raises(ValueError, match=str(gamma)):
        ClassFocal(gamma=gamma)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_gradients_of_certain_predictions_are_finite(gamma):
    logits = torch.tensor([20.0, -120.0, 0.0, 120.0], requires_grad=True)
    sum(x.sum() for x in focal_terms(logits, 0.25, ClassFocal(gamma=gamma).gamma)).backward()
    assert logits.grad.isfinite().all()
