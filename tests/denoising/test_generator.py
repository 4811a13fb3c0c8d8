import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming

from dn_detr_d2 import DenoisingGenerator
from dn_detr_d2.boxes import cxcywh_to_xyxy
from dn_detr_d2.denoising import BudgetDenoisingGenerator, ContrastiveDenoisingGenerator
from dn_detr_d2.structures import Targets

SETTINGS = {
    "num_classes": 5,
    "num_groups": 2,
    "label_noise_prob": 0.2,
    "center_noise_scale": 0.4,
    "size_noise_scale": 0.4,
}
QUIET = SETTINGS | {"label_noise_prob": 0.0, "center_noise_scale": 0.0, "size_noise_scale": 0.0}


def make_targets(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(5, (n,), generator=generator) for n in counts]
    return Targets.pad(labels, [torch.rand(n, 4, generator=generator) * 0.4 + 0.3 for n in counts])


def test_slots_of_the_worked_example():
    """Spec section 2.1: counts (2, 3), two groups -> 3 slots a group; image 0 fills 0, 1, 3, 4 and image 1 all six."""
    targets = make_targets(2, 3)
    noised = DenoisingGenerator(**QUIET)(targets)
    assert noised.num_queries == 6
    assert noised.valid.tolist() == [[True, True, False] * 2, [True] * 6]
    pairs = [(q.tolist(), t.tolist()) for q, t in noised.assignment.per_image(2)]
    assert pairs == [([0, 1, 3, 4], [0, 1, 0, 1]), ([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2])]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 12))
def test_without_noise_every_slot_holds_what_it_must_restore(counts, groups, budget):
    max_queries = budget and max(budget, groups)
    targets = make_targets(*counts)
    noised = DenoisingGenerator(**QUIET | {"num_groups": groups, "max_queries": max_queries})(targets)
    for i, (slots, objects) in enumerate(noised.assignment.per_image(len(counts))):
        assert torch.equal(noised.labels[i, slots], targets.labels[i, objects])
        assert torch.equal(noised.boxes[i, slots], targets.boxes[i, objects])
        assert sorted(slots.tolist()) == noised.valid[i].nonzero().flatten().tolist()
        room = noised.num_queries // groups
        for g in range(groups):  # each group holds each object at most once, and as many as it can
            held = objects[slots // room == g].tolist()
            assert len(held) == len(set(held)) == min(counts[i], room)
    if max_queries:
        assert noised.num_queries <= max_queries


def test_padding_is_unknown_and_in_the_middle():
    noised = DenoisingGenerator(**SETTINGS)(make_targets(0, 2))
    assert noised.labels[0].tolist() == [5] * 4
    assert (noised.boxes[0] == 0.5).all()
    assert not noised.valid[0].any()


def test_a_batch_without_objects_has_padding_only():
    noised = DenoisingGenerator(**SETTINGS)(make_targets(0, 0))
    assert noised.num_queries == 2
    assert len(noised.assignment) == 0
    assert noised.attention_mask(3).shape == (5, 5)


def test_groups_and_calls_draw_their_own_noise():
    generator, targets = DenoisingGenerator(**SETTINGS), make_targets(3)
    first, second = generator(targets), generator(targets)
    assert not torch.equal(first.boxes, second.boxes)
    assert not torch.equal(first.boxes[:, :3], first.boxes[:, 3:])


def test_above_the_budget_each_group_gets_a_fresh_subset():
    generator = DenoisingGenerator(**QUIET | {"num_groups": 4, "max_queries": 8})
    targets = make_targets(40)
    seen = [tuple(generator(targets).assignment.target[0].tolist()) for _ in range(10)]
    assert len(set(seen)) > 1
    assert len({seen[0][i : i + 2] for i in range(0, 8, 2)}) > 1


def test_targets_stay_as_they_were():
    targets = make_targets(3, 1)
    before = [x.clone() for x in (targets.labels, targets.boxes, targets.valid)]
    DenoisingGenerator(**SETTINGS | {"label_noise_prob": 1.0})(targets)
    assert all(torch.equal(a, b) for a, b in zip(before, (targets.labels, targets.boxes, targets.valid), strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_groups": 0}, ["num_groups", 0]),
        ({"label_noise_prob": 1.5}, ["label_noise_prob", 1.5]),
        ({"size_noise_scale": -0.1}, ["noise scales", 0.4, -0.1]),
        ({"max_queries": 1}, ["max_queries", "num_groups", 2, 1]),
    ],
)
def test_values_outside_their_range_are_refused(change, named):
    with pytest.raises(ValueError, match=naming(*named)):
        DenoisingGenerator(**SETTINGS | change)


CONTRASTIVE = {
    "num_classes": 5, "num_groups": 2, "label_noise_prob": 0.0, "num_queries": 0,
    "corner_noise_scale": 0.0, "keep_order": False,
}  # fmt: skip


def test_contrastive_groups_hold_near_copies_then_far_ones():
    """Spec section 2.5: counts (2, 3), two groups: each group is three near and three far slots; near ones restore."""
    targets = make_targets(2, 3)
    noised = ContrastiveDenoisingGenerator(**CONTRASTIVE)(targets)
    assert noised.num_queries == 12
    assert noised.num_groups == 2
    assert noised.valid.tolist() == [[True, True, False] * 4, [True] * 12]
    pairs = [(q.tolist(), t.tolist()) for q, t in noised.assignment.per_image(2)]
    assert pairs == [([0, 1, 6, 7], [0, 1, 0, 1]), ([0, 1, 2, 6, 7, 8], [0, 1, 2, 0, 1, 2])]
    assert noised.assignment.class_loss_mask.all()  # far copies and padding must learn to be no object
    torch.testing.assert_close(noised.boxes[1, 3:6], targets.boxes[1])


@pytest.mark.parametrize(("most", "expected"), [(1, 100), (5, 20), (7, 14), (60, 1), (101, 1), (300, 1)])
def test_the_number_of_contrastive_groups_follows_the_fullest_image(most, expected):
    noised = ContrastiveDenoisingGenerator(**CONTRASTIVE | {"num_queries": 100})(make_targets(most, 0))
    assert noised.num_groups == expected
    assert noised.num_queries == 2 * expected * most


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 30), st.integers(2, 40))
def test_a_hard_limit_holds_for_both_copies_together(counts, num_queries, limit):
    settings = CONTRASTIVE | {"num_queries": num_queries, "max_queries": limit, "num_groups": 2}
    noised = ContrastiveDenoisingGenerator(**settings)(make_targets(*counts))
    assert noised.num_queries <= limit
    for i, (slots, objects) in enumerate(noised.assignment.per_image(len(counts))):
        assert noised.valid[i, slots].all()
        assert (noised.labels[i, slots] < 5).all()
        assert len(slots) == len(objects)


def test_a_contrastive_batch_without_objects_counts_for_nothing():
    noised = ContrastiveDenoisingGenerator(**CONTRASTIVE)(make_targets(0, 0))
    assert not noised.assignment.class_loss_mask.any()
    assert len(noised.assignment) == 0


@pytest.mark.parametrize("wrong", [{"num_queries": -1}, {"corner_noise_scale": -0.1}, {"num_groups": 0}])
def test_contrastive_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ContrastiveDenoisingGenerator(**CONTRASTIVE | wrong)


@pytest.mark.parametrize("system", [DenoisingGenerator, ContrastiveDenoisingGenerator])
def test_other_noise_is_a_generator_of_its_own_that_noises_every_object(system):
    contrastive = QUIET | {"num_queries": 0, "corner_noise_scale": 1.0, "keep_order": False, "num_groups": 2}
    del contrastive["center_noise_scale"], contrastive["size_noise_scale"]
    original = system(**(QUIET if system is DenoisingGenerator else contrastive), max_queries=4)
    state, targets = dict(vars(original)), make_targets(3, 5)
    quiet = original.renoised(label_noise_prob=0.0, box_noise_scale=0.0)(targets)
    pairs = quiet.assignment
    assert len(pairs) == (3 + 5) * 2
    torch.testing.assert_close(quiet.boxes[pairs.image, pairs.query[0]], targets.boxes[pairs.image, pairs.target[0]])
    loud = original.renoised(label_noise_prob=1.0, box_noise_scale=0.4)(targets)
    assert (loud.boxes != quiet.boxes).any()
    assert (loud.labels != quiet.labels).any()
    assert vars(original) == state


@pytest.mark.parametrize("noise", [(1.1, 0.0), (-0.1, 0.0), (0.0, -0.1)])
def test_other_noise_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match=naming("label_noise_prob", "box_noise_scale", *noise)):
        DenoisingGenerator(**QUIET).renoised(label_noise_prob=noise[0], box_noise_scale=noise[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 30), st.integers(1, 6), st.integers(1, 60))
def test_no_layout_exceeds_the_limit_that_a_generator_accepts(most, num_queries, groups, limit):
    common = {"num_groups": groups, "max_queries": limit}
    for system, values, copies in (
        (DenoisingGenerator, QUIET, 1),
        (BudgetDenoisingGenerator, QUIET | {"num_queries": num_queries}, 1),
        (ContrastiveDenoisingGenerator, CONTRASTIVE | {"num_queries": num_queries}, 2),
    ):
        try:
            generator = system(**values | common)
        except ValueError:
            assert limit < (groups if system is DenoisingGenerator else 2)
            continue
        made, room = generator.layout(most)
        assert 1 <= made * room * copies <= limit


def test_a_limit_that_holds_no_pair_is_refused():
    with pytest.raises(ValueError, match=naming("max_queries", 2, 1)):
        ContrastiveDenoisingGenerator(**CONTRASTIVE | {"num_groups": 1, "max_queries": 1})


@pytest.mark.parametrize(("most", "expected"), [(1, 12), (3, 4), (5, 2), (12, 1), (13, 1)])
def test_a_budget_of_queries_decides_about_the_groups(most, expected):
    """A budget of 12 and 3 objects: 4 groups of 3."""
    noised = BudgetDenoisingGenerator(**QUIET | {"num_queries": 12})(make_targets(most, 0))
    assert (noised.num_groups, noised.num_queries) == (expected, expected * most)


def test_padded_slots_of_a_budget_have_a_class_loss_where_the_step_has_objects():
    generator, targets = BudgetDenoisingGenerator(**QUIET, num_queries=6), make_targets(2, 3)
    noised = generator(targets)
    assert noised.assignment.class_loss_mask.all()
    assert noised.valid.tolist() == [[True, True, False] * 2, [True] * 6]
    pairs = [(q.tolist(), t.tolist()) for q, t in noised.assignment.per_image(2)]
    assert pairs == [([0, 1, 3, 4], [0, 1, 0, 1]), ([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2])]
    torch.testing.assert_close(noised.boxes[1, :3], targets.boxes[1])
    assert not generator(make_targets(0, 0)).assignment.class_loss_mask.any()
    assert generator(make_targets(0, 0), step_counts=[0, 0, 4]).assignment.class_loss_mask.all()


def test_without_noise_a_budget_has_one_group():
    assert BudgetDenoisingGenerator(**QUIET, num_queries=100).clean()(make_targets(2)).num_groups == 1


def test_a_budget_of_0_is_the_number_of_groups_and_a_negative_one_is_refused():
    assert BudgetDenoisingGenerator(**QUIET, num_queries=0)(make_targets(3)).num_groups == QUIET["num_groups"]
    with pytest.raises(ValueError, match=naming("num_queries", -1)):
        BudgetDenoisingGenerator(**QUIET, num_queries=-1)


def with_factors(targets, factor):
    factors = [torch.full((count,), factor) for count in targets.counts]
    boxes = [x[:count] for x, count in zip(targets.boxes, targets.counts, strict=True)]
    labels = [x[:count] for x, count in zip(targets.labels, targets.counts, strict=True)]
    return Targets.pad(labels, boxes, noise_factors=factors)


@pytest.mark.parametrize("kind", [DenoisingGenerator, BudgetDenoisingGenerator])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_noise_of_an_object_goes_as_far_as_its_factor_says(kind, factor):
    """From the same random numbers; the boxes are in the middle, so that nothing is clamped."""
    targets, generator = make_targets(2, 3), kind(num_classes=5, num_groups=3)
    torch.manual_seed(1)
    plain = generator(targets)
    torch.manual_seed(1)
    noised = generator(with_factors(targets, factor))
    clean = targets.boxes.gather(
        1, torch.arange(3).repeat(plain.num_queries // 3).expand(2, -1)[..., None].expand(-1, -1, 4)
    )
    real = plain.valid & (plain.boxes > 0).all(-1) & (plain.boxes < 1).all(-1)
    assert real.sum() > 10
    torch.testing.assert_close(noised.boxes[real], (clean + factor * (plain.boxes - clean))[real])
    assert torch.equal(noised.labels, plain.labels)


def test_each_object_has_its_own_factor_and_numbers_stay_in_the_image():
    targets = make_targets(2)
    wide = Targets.pad(list(targets.labels), list(targets.boxes), noise_factors=[torch.tensor([0.0, 9.0])])
    noised = DenoisingGenerator(**SETTINGS | {"num_groups": 200})(wide)
    boxes = noised.boxes.unflatten(1, (200, 2))[0]
    assert torch.equal(boxes[:, 0], targets.boxes[0, 0].expand(200, 4))
    assert boxes[:, 1].min() >= 0
    assert boxes[:, 1].max() <= 1
    assert (boxes[:, 1] - targets.boxes[0, 1]).abs().max() > 0.4


@pytest.mark.parametrize("factor", [1.0, 1.6, 4.0])
def test_near_copies_of_an_uncertain_object_stay_near_and_far_ones_go_as_far_as_ever(factor):
    """A corner moves by u ** (1 / f) half sizes, whose mean is f / (1 + f); from the same random numbers."""
    targets = Targets.pad([torch.zeros(1, dtype=torch.int64)], [torch.tensor([[0.5, 0.5, 0.1, 0.1]])])
    generator = ContrastiveDenoisingGenerator(num_classes=5, num_queries=0, num_groups=4000)
    found = []
    for objects in (targets, with_factors(targets, factor)):
        torch.manual_seed(1)
        corners = cxcywh_to_xyxy(generator(objects).boxes.unflatten(1, (4000, 2))[0])
        found.append((corners - cxcywh_to_xyxy(targets.boxes[0, 0])).abs() / 0.05)
    (plain_near, plain_far), (near, far) = (x.unbind(1) for x in found)
    torch.testing.assert_close(far, plain_far)
    torch.testing.assert_close(near**factor, plain_near, atol=1e-4, rtol=1e-4)
    assert near.max() <= 1 + 1e-5
    assert near.mean().item() == pytest.approx(factor / (1 + factor), abs=0.01)
