import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_d2.denoising import noise


def test_shift_and_scale_of_the_worked_box(monkeypatch):
    """Spec section 2.1: lambda .4, box (.5, .5, .4, .6), u = (0, 1, .25, .75) -> (.42, .62, .32, .72)."""
    monkeypatch.setattr(torch, "rand_like", lambda x: x.new_tensor([0, 1, 0.25, 0.75]).expand_as(x))
    noised = noise.shift_and_scale(torch.tensor([[0.5, 0.5, 0.4, 0.6]]), 0.4, 0.4)
    torch.testing.assert_close(noised, torch.tensor([[0.42, 0.62, 0.32, 0.72]]))


@settings(max_examples=50)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_each_number_stays_within_its_own_reach(center_scale, size_scale, seed):
    torch.manual_seed(seed)
    boxes = torch.rand(200, 4) * 0.3 + 0.3
    moved = (noise.shift_and_scale(boxes, center_scale, size_scale) - boxes).abs()
    assert (moved[:, :2] <= boxes[:, 2:] / 2 * center_scale + 1e-6).all()
    assert (moved[:, 2:] <= boxes[:, 2:] * size_scale + 1e-6).all()


def test_the_two_scales_are_separate_and_reach_their_bounds():
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.2]).expand(20000, 4)
    shifted = noise.shift_and_scale(boxes, 0.5, 0.0)
    assert torch.equal(shifted[:, 2:], boxes[:, 2:])
    assert (shifted[:, 0] - 0.5).abs().max().item() == pytest.approx(0.1, rel=0.01)
    scaled = noise.shift_and_scale(boxes, 0.0, 0.5)
    assert torch.equal(scaled[:, :2], boxes[:, :2])
    assert (scaled[:, 3] - 0.2).abs().max().item() == pytest.approx(0.1, rel=0.01)


def test_noise_is_uniform():
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]).expand(40000, 4)
    step = (noise.shift_and_scale(boxes, 1.0, 0.0)[:, 0] - 0.5) / 0.2
    histogram = torch.histc(step, 10, -1, 1) / len(step)
    assert (histogram - 0.1).abs().max() < 0.01


def test_noised_boxes_stay_in_the_unit_interval():
    boxes = torch.tensor([[0.01, 0.99, 0.9, 1.0]]).expand(1000, 4)
    noised = noise.shift_and_scale(boxes, 1.0, 1.0)
    assert noised.min() >= 0
    assert noised.max() <= 1


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_a_label_changes_with_the_stated_probability(prob):
    labels = torch.full((100000,), 3)
    changed = (noise.flip_labels(labels, prob, 10) != labels).float().mean().item()
    assert changed == pytest.approx(prob * 0.9, abs=0.01)


def test_redrawn_labels_are_uniform_and_never_unknown():
    drawn = noise.flip_labels(torch.zeros(50000, dtype=torch.int64), 1.0, 5)
    share = torch.bincount(drawn, minlength=6) / len(drawn)
    assert share[5] == 0
    assert (share[:5] - 0.2).abs().max() < 0.02


def test_arguments_stay_as_they_were():
    labels, boxes = torch.randint(5, (40,)), torch.rand(40, 4)
    before = labels.clone(), boxes.clone()
    noise.flip_labels(labels, 1.0, 5)
    noise.shift_and_scale(boxes, 1.0, 1.0)
    assert torch.equal(labels, before[0])
    assert torch.equal(boxes, before[1])


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 2**31))
def test_a_subset_is_distinct_ascending_and_prefers_the_real(valid, size, seed):
    torch.manual_seed(seed)
    size, mask = min(size, len(valid)), torch.tensor(valid)
    chosen = noise.random_subset(mask, size)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert mask[chosen].sum() == min(size, sum(valid))


def test_every_real_position_is_drawn_equally_often():
    mask = torch.tensor([True, True, False, True]).expand(30000, 4)
    counts = torch.bincount(noise.random_subset(mask, 2).flatten(), minlength=4) / 30000
    torch.testing.assert_close(counts, torch.tensor([2 / 3, 2 / 3, 0, 2 / 3]), atol=0.02, rtol=0)


@pytest.mark.parametrize(("negative", "expected"), [
    (False, [0.525, 0.2875, 0.45, 0.575]),
    (True, [0.725, 0.1375, 0.45, 0.275]),
])  # fmt: skip
def test_corners_of_the_worked_box(monkeypatch, negative, expected):
    """Spec section 2.5: scale 1, box (.5, .5, .4, .6), u = (0, 1, .25, .75), signs (+, -, +, -)."""
    monkeypatch.setattr(torch, "rand_like", lambda x: x.new_tensor([0, 1, 0.25, 0.75]).expand_as(x))
    monkeypatch.setattr(torch, "randint_like", lambda x, high: x.new_tensor([1, 0, 1, 0]).expand_as(x))
    noised = noise.jitter_corners(torch.tensor([[0.5, 0.5, 0.4, 0.6]]), 1.0, negative)
    torch.testing.assert_close(noised, torch.tensor([expected]))


@settings(max_examples=50)
@given(st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_near_corners_stay_within_and_far_ones_go_beyond(scale, negative, keep_order, seed):
    torch.manual_seed(seed)
    boxes = torch.cat([torch.full((200, 2), 0.5), torch.rand(200, 2) * 0.2 + 0.05], 1)  # never reach the image's border
    noised = noise.jitter_corners(boxes, scale, negative, keep_order)
    half = boxes[:, 2:] / 2
    if keep_order:
        assert (noised[:, 2:] >= 0).all()
    else:
        low = noised[:, :2] - noised[:, 2:] / 2
        moved = (low - (boxes[:, :2] - half)).abs() / half
        assert (moved <= scale * (2 if negative else 1) + 1e-4).all()
        assert (moved >= scale * (1 if negative else 0) - 1e-4).all()
    assert noised.isfinite().all()


def test_seven_in_sixteen_far_boxes_cross_at_scale_one_unless_order_is_kept():
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(40000, 4)
    crossed = (noise.jitter_corners(boxes, 1.0, True)[:, 2:] <= 0).any(1).float().mean().item()
    assert crossed == pytest.approx(7 / 16, abs=0.01)
    assert (noise.jitter_corners(boxes, 1.0, True, keep_order=True)[:, 2:] >= 0).all()
    assert (noise.jitter_corners(boxes, 1.0, False)[:, 2:] > -1e-6).all()
