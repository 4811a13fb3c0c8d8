"""Matching and losses of masks at points, against loops over sets, images and pairs on full maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from scipy.optimize import linear_sum_assignment

from dn_detr_d2 import DenoisingGenerator, HungarianMatcher, SetCriterion
from dn_detr_d2.losses import ClassSoftmax, ClassSoftmaxCost, MaskPointCost, MaskPoints, without_masks
from dn_detr_d2.losses.mask_terms import chunk_images
from dn_detr_d2.losses.point_sampling import most_uncertain, sample_maps, sample_masks
from dn_detr_d2.structures import Assignment, Predictions, Targets

POINTS, CLASSES = 40, 3


class Draw:
    """The same points for all sets of a kind; remembers what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, kind, num_sets, num_points, device):
        self.asked.append((kind, num_sets, num_points))
        return self.points(kind, num_points).expand(num_sets, -1, -1).to(device)

    @staticmethod
    def points(kind, num_points):
        generator = torch.Generator().manual_seed(["match", "loss", "rest"].index(kind))
        return torch.rand(num_points, 2, generator=generator)


def make_case(counts, k=3, q=5, size=(24, 40), dtype=torch.float32):
    n, (h, w) = len(counts), size
    embeddings = torch.randn(k, n, q, 8, dtype=dtype).requires_grad_()
    features = torch.randn(n, 8, h // 4, w // 4, dtype=dtype).requires_grad_()
    labels = [torch.randint(CLASSES, (count,)) for count in counts]
    masks = [torch.rand(count, h, w) < 0.4 for count in counts]
    targets = Targets.pad(labels, [torch.rand(count, 4) for count in counts], masks=masks)
    logits = torch.randn(k, n, q, CLASSES + 1).requires_grad_()
    return Predictions(logits, None, embeddings, features), targets, labels, masks


def at_points(maps, points):
    """(M, h, w) at (n, 2)."""
    return F.grid_sample(maps[None].float(), 2 * points[None, None] - 1, align_corners=False)[0, :, 0]


def slow_cost(predictions, k, i, masks):
    """2 x class (without it here) + 5 x cross-entropy + 5 x dice of each query and each object of one image."""
    points = Draw.points("match", POINTS)
    maps = torch.einsum("qc,chw->qhw", predictions.mask_embeddings[k, i], predictions.mask_features[i])
    x, t = at_points(maps, points), at_points(masks, points)
    cost = torch.zeros(len(x), len(t))
    for a in range(len(x)):
        for b in range(len(t)):
            entropy = F.binary_cross_entropy_with_logits(x[a], t[b])
            s = x[a].sigmoid()
            cost[a, b] = 5 * entropy + 3 * (1 - (2 * (s * t[b]).sum() + 1) / (s.sum() + t[b].sum() + 1))
    return cost.detach()


def matcher(draw=None, **settings):
    return HungarianMatcher(
        [ClassSoftmaxCost(2), MaskPointCost(5, 3, num_points=POINTS, draw=draw or Draw(), **settings)]
    )


def term(draw=None):
    return MaskPoints(5, 3, num_points=POINTS, draw=draw or Draw())


def slow_losses(predictions, masks, pairs, k):
    """Weighted sums over the pairs of one set, each pair on its own map."""
    kept, entropy, dice = int(0.75 * POINTS), torch.zeros(()), torch.zeros(())
    for i, (queries, objects) in enumerate(pairs):
        for query, one in zip(queries.tolist(), objects.tolist(), strict=True):
            embedding, features = predictions.mask_embeddings[k, i, query], predictions.mask_features[i]
            logits = torch.einsum("c,chw->hw", embedding, features)[None]
            candidates = Draw.points("loss", 3 * POINTS)
            order = at_points(logits.detach(), candidates)[0].abs().argsort()
            points = torch.cat([candidates[order[:kept]], Draw.points("rest", POINTS - kept)])
            x, t = at_points(logits, points)[0], at_points(masks[i][one][None], points)[0]
            s = x.sigmoid()
            entropy = entropy + F.binary_cross_entropy_with_logits(x, t)
            dice = dice + 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
    return 5 * entropy, 3 * dice


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    masks=st.integers(1, 4),
    points=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
)
def test_bool_masks_are_sampled_like_their_copies_in_float(size, masks, points):
    bits = torch.rand(masks, *size) < 0.5
    points = torch.tensor(points, dtype=torch.float32)
    row = torch.randint(masks, (3,))
    found = sample_masks(bits, row, points.expand(3, -1, -1))
    expected = torch.stack([at_points(bits[r][None], points)[0] for r in row])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_large_masks_are_sampled_up_to_the_rounding_of_their_coordinates():
    """A pixel in a thousand is known to 6e-5 in float32."""
    bits, points = torch.rand(2, 1024, 800) < 0.5, torch.rand(2, 1000, 2)
    expected = sample_maps(bits[:, None].float(), points)[:, 0]
    torch.testing.assert_close(sample_masks(bits, torch.arange(2), points), expected, atol=1e-4, rtol=0)


def test_a_worked_point():
    """A 2 x 2 mask with its upper row set: half way between the centres of the rows it is one half."""
    mask = torch.tensor([[[True, True], [False, False]]])
    points = torch.tensor([[[0.5, 0.5], [0.5, 0.25], [0.25, 0.75], [0.0, 0.25], [0.0, 0.0]]])
    expected = torch.tensor([[0.5, 1, 0, 0.5, 0.25]])  # at the border half, in the corner a quarter lies outside
    assert torch.equal(sample_masks(mask, torch.zeros(1, dtype=torch.int64), points), expected)


def test_the_most_uncertain_points_are_those_nearest_to_a_logit_of_0():
    ramp = torch.linspace(-4, 4, 9).expand(1, 3, 9)
    x = (torch.arange(9) + 0.5) / 9
    candidates = torch.stack([x, torch.full((9,), 0.5)], 1)[None]
    kept = most_uncertain(ramp, candidates, 3)
    assert sorted(kept[0, :, 0].tolist()) == pytest.approx(x[3:6].tolist())


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0), (4,), (7, 1)])
def test_pairs_equal_scipy_on_the_slow_cost(counts):
    predictions, targets, labels, masks = make_case(counts)
    found = matcher()(predictions, targets)
    assert found.counts == [min(count, 5) for count in counts]
    for k in range(3):
        for i, (queries, objects) in enumerate(found.per_image(len(counts), k)):
            cost = (
                slow_cost(predictions, k, i, masks[i]) - 2 * predictions.logits[k, i].softmax(-1)[:, labels[i]].detach()
            )
            ours = matcher().cost(predictions, targets)[k, i, :, : counts[i]]
            torch.testing.assert_close(ours, cost, atol=1e-5, rtol=1e-5)
            rows, columns = linear_sum_assignment(cost.numpy())
            assert (queries.tolist(), objects.tolist()) == (rows.tolist(), columns.tolist())


def test_parts_of_the_queries_cost_what_all_cost(monkeypatch):
    predictions, targets, *_ = make_case((2, 3))
    whole = matcher().cost(predictions, targets)
    monkeypatch.setattr(MaskPointCost, "chunk", 4 * POINTS)  # two rows of two images
    torch.testing.assert_close(matcher().cost(predictions, targets), whole)


@pytest.mark.parametrize("chunk", [2**25, 1, 500])
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (4,), (0, 0)])
def test_losses_and_gradients_equal_the_slow_reference(counts, chunk, monkeypatch):
    monkeypatch.setattr(MaskPoints, "chunk", chunk)  # 1: each mask alone, and made twice
    predictions, targets, _, masks = make_case(counts)
    assignment = matcher()(predictions, targets)
    found = SetCriterion([term()])(predictions, targets, assignment, max(sum(counts), 1))
    slow = [slow_losses(predictions, masks, assignment.per_image(len(counts), k), k) for k in range(3)]
    expected = torch.stack([torch.stack(one) for one in slow], 1) / max(sum(counts), 1)
    torch.testing.assert_close(torch.stack([found["mask"], found["dice"]]), expected, atol=1e-5, rtol=1e-5)
    leaves = (predictions.mask_embeddings, predictions.mask_features)
    ours = torch.autograd.grad(sum(x.sum() for x in found.values()), leaves)  # also where there is no pair
    theirs = torch.autograd.grad(expected.sum(), leaves) if sum(counts) else [torch.zeros_like(x) for x in leaves]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_pairs_of_the_noise_hold_for_all_sets():
    predictions, targets, _, masks = make_case((2, 1), q=3 * 2)
    noised = DenoisingGenerator(num_classes=CLASSES, num_groups=3)(targets)
    assert noised.assignment.counts == [6, 3]
    found = SetCriterion([term()])(predictions, targets, noised.assignment, 9)
    for k in range(3):
        expected = slow_losses(predictions, masks, noised.assignment.per_image(2), k)
        for name, value in zip(("mask", "dice"), expected, strict=True):
            torch.testing.assert_close(found[name][k], value / 9, atol=1e-5, rtol=1e-5)


def test_pairs_may_come_without_their_counts():
    predictions, targets, *_ = make_case((0, 2, 0))
    pairs = matcher()(predictions, targets)
    bare = Assignment(pairs.image, pairs.query, pairs.target)
    assert bare.image_counts(3) == pairs.counts == [0, 2, 0]
    one, other = (SetCriterion([term()])(predictions, targets, x, 2.0) for x in (pairs, bare))
    assert all(torch.equal(one[name], other[name]) for name in one)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    k=st.integers(1, 3),
    chunk=st.sampled_from([1, 700, 2**25]),
)
def test_any_batch_has_finite_losses_and_as_many_points_as_it_asks_for(counts, k, chunk):
    draw = Draw()
    predictions, targets, *_ = make_case(counts, k, q=3)
    loss = term(draw)
    loss.chunk = chunk
    assignment = matcher(draw)(predictions, targets)
    values = SetCriterion([loss])(predictions, targets, assignment, 1)
    assert all(x.shape == (k,) and x.isfinite().all() for x in values.values())
    pairs = k * sum(min(count, 3) for count in counts)
    assert draw.asked[0] == ("match", len(counts), POINTS)
    for kind, num_points in (("loss", 3 * POINTS), ("rest", POINTS - int(0.75 * POINTS))):
        asked = [one for one in draw.asked if one[0] == kind]
        assert {one[2] for one in asked} <= {num_points}
        assert sum(one[1] for one in asked) == pairs
    (values["mask"] + values["dice"]).sum().backward()
    assert predictions.mask_features.grad is not None
    assert predictions.mask_embeddings.grad is not None


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 9), max_size=5), size=st.integers(1, 7))
def test_chunks_are_full_and_hold_every_item_in_order(counts, size):
    chunks = chunk_images(counts, size)
    items = [image for chunk in chunks for image, count in chunk for _ in range(count)]
    assert items == [image for image, count in enumerate(counts) for _ in range(count)]
    sizes = [sum(count for _, count in chunk) for chunk in chunks]
    assert sizes == [size] * (sum(counts) // size) + [sum(counts) % size] * (sum(counts) % size > 0)
    assert all(count > 0 for chunk in chunks for _, count in chunk)


def test_a_mask_that_is_right_costs_next_to_nothing():
    """Logits of +-30 that are the target's pixels: no cross-entropy, and a dice of 1."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    targets = Targets.pad([torch.tensor([0])], [torch.rand(1, 4)], masks=[mask])
    maps = (60.0 * mask - 30)[:, None].reshape(1, 1, 8, 8)
    predictions = Predictions(torch.zeros(1, 1, 1, 2), None, torch.ones(1, 1, 1, 1), maps)
    inside = lambda kind, sets, count, device: (torch.randint(8, (sets, count, 2)) + 0.5) / 8  # noqa: E731
    loss = MaskPoints(1, 1, num_points=400, draw=inside)
    pairs = Assignment(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[0]]))
    values = SetCriterion([loss])(predictions, targets, pairs, 1)
    assert values["mask"].item() == pytest.approx(0, abs=1e-6)
    assert values["dice"].item() == pytest.approx(0, abs=1e-5)
    cost = MaskPointCost(1, 1, num_points=400, draw=inside)(predictions, targets)
    assert cost.item() == pytest.approx(0, abs=1e-4)


def test_masks_are_compared_in_float32_under_autocast():
    predictions, targets, *_ = make_case((2, 1), dtype=torch.bfloat16)
    wide = Predictions(predictions.logits, None, predictions.mask_embeddings.float(), predictions.mask_features.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matcher().cost(predictions, targets), matcher().cost(wide, targets))
        losses = SetCriterion([term()])(predictions, targets, matcher()(predictions, targets), 1)
    assert {x.dtype for x in losses.values()} == {torch.float32}


def test_one_term_gives_two_losses_and_can_be_left_out():
    criterion = SetCriterion([ClassSoftmax(2), term()])
    assert [criterion.is_mean(name) for name in ("class", "mask", "dice")] == [True, False, False]
    assert [one.names for one in without_masks(criterion).terms] == [("class",)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_weight": -1}, "-1"),
        ({"dice_weight": float("nan")}, "nan"),
        ({"num_points": 0}, "num_points = 0"),
        ({"importance_ratio": 1.5}, "1.5"),
        ({"oversample_ratio": 0.5}, "0.5"),
    ],
)
def test_useless_settings_are_refused(settings, named):
    settings = {"num_points": 4, "draw": Draw()} | settings
    with pytest.raises(ValueError, match=naming(named)):
        MaskPoints(**settings)
    if "oversample_ratio" not in settings and "importance_ratio" not in settings:
        with pytest.raises(ValueError, match=naming(named)):
            MaskPointCost(**settings)


def test_a_mask_that_is_not_finite_is_named():
    predictions, targets, *_ = make_case((2, 3))
    predictions.mask_embeddings.data[1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 1, image 1"):
        matcher()(predictions, targets)


def test_no_float_copy_of_the_masks_is_made():
    """Targets of 64 million pixels are compared with a fraction of a byte a pixel."""
    predictions, targets, *_ = make_case((1,))
    targets.masks = torch.zeros(1, 1, 8192, 8192, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profile:
        pairs = matcher()(predictions, targets)
        SetCriterion([term()])(predictions, targets, pairs, 1)
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert most < np.prod(targets.masks.shape) // 10
