"""Every kind of box noise against its statement in docs/noise.md."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naming import naming
from plug_in_page import run_blocks
from scipy import stats

from dn_detr_d2 import ConfigError, ContrastiveDenoisingGenerator, DenoisingGenerator
from dn_detr_d2.denoising import BOX_NOISES, NoiseScale, ScaleAware, noise
from dn_detr_d2.denoising.box_noise import distance_at_iou, least_iou

NAMES = ["uniform", "gaussian", "truncated_gaussian", "iou_targeted", "scale_aware"]
DRAWS = 40_000
SCALE = NoiseScale(0.4, 0.3)


def draw(name, box=(0.5, 0.5, 0.2, 0.1), scale=SCALE, count=DRAWS):
    """``count`` noised copies of a box, which no clamp changes."""
    return BOX_NOISES.resolve(name)(torch.tensor(box).expand(count, 4), scale)


def in_reaches(noised, box=(0.5, 0.5, 0.2, 0.1), scale=SCALE):
    """How far each number has moved, as a multiple of DN-DETR's reach."""
    _, _, width, height = box
    reach = (width * scale.center / 2, height * scale.center / 2, width * scale.size, height * scale.size)
    return ((noised.double() - torch.tensor(box).double()) / torch.tensor(reach).double()).numpy()


def iou(a, b):
    """IoU of two cxcywh boxes in plain arithmetic."""
    low, high = [], []
    for box in (a, b):
        low.append([box[0] - box[2] / 2, box[1] - box[3] / 2])
        high.append([box[0] + box[2] / 2, box[1] + box[3] / 2])
    sides = [max(min(high[0][i], high[1][i]) - max(low[0][i], low[1][i]), 0) for i in (0, 1)]
    common = sides[0] * sides[1]
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_the_names_are_those_of_the_page():
    page = (ROOT / "docs" / "noise.md").read_text(encoding="utf-8")
    rows = {name for line in page.splitlines() for name in re.findall(r"^\| `(\w+)`", line)}
    assert set(BOX_NOISES._noises) == set(NAMES)
    assert set(NAMES) <= rows


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(st.floats(0, 3), st.floats(0, 3), st.integers(0, 2**31))
def test_boxes_stay_in_range_and_arguments_as_they_were(name, center, size, seed):
    torch.manual_seed(seed)
    boxes = torch.rand(3, 2, 1, 5, 4)
    before = boxes.clone()
    noised = BOX_NOISES.resolve(name)(boxes, NoiseScale(center, size))
    assert noised.shape == boxes.shape
    assert noised.dtype == boxes.dtype
    assert ((noised >= 0) & (noised <= 1)).all()
    assert torch.equal(boxes, before)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_without_scale_boxes_come_back_and_a_seed_repeats_the_noise(name, seed):
    torch.manual_seed(seed)
    boxes, kind = torch.rand(40, 4), BOX_NOISES.resolve(name)
    boxes[0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert torch.equal(kind(boxes, NoiseScale(0.0, 0.0)), boxes)
    torch.manual_seed(seed)
    first, second = kind(boxes, SCALE), kind(boxes, SCALE)
    torch.manual_seed(seed)
    assert torch.equal(kind(boxes, SCALE), first)
    assert not torch.equal(first, second)
    assert kind(boxes[:0], SCALE).shape == (0, 4)


def test_uniform_is_the_function_of_the_paper_with_the_same_draws():
    torch.manual_seed(3)
    boxes = torch.rand(50, 4)
    torch.manual_seed(7)
    expected = noise.shift_and_scale(boxes, 0.4, 0.3)
    torch.manual_seed(7)
    assert torch.equal(BOX_NOISES.resolve("uniform")(boxes, SCALE), expected)


@pytest.mark.parametrize(("name", "distribution", "deviation"), [
    ("uniform", stats.uniform(-1, 2), 0.5774),
    ("gaussian", stats.norm(scale=1 / math.sqrt(3)), 0.5774),
    ("truncated_gaussian", stats.truncnorm(-2, 2, scale=0.5), 0.4398),
    ("scale_aware", stats.uniform(-1, 2), 0.5774),
])  # fmt: skip
def test_each_number_moves_as_the_page_says(name, distribution, deviation):
    moved = in_reaches(draw(name))
    assert distribution.std() == pytest.approx(deviation, abs=1e-4)
    for column in moved.T:
        assert stats.kstest(column, distribution.cdf).statistic < 2 / math.sqrt(DRAWS)
    assert np.abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.03


def test_the_cut_gaussian_ends_at_the_reach():
    assert 0.97 < np.abs(in_reaches(draw("truncated_gaussian"))).max() <= 1 + 1e-5
    assert np.abs(in_reaches(draw("gaussian"))).max() > 1.5


@pytest.mark.parametrize(("scale", "least"), [
    ((0.4, 0.4), 0.36),  # (1 - 0.4) ** 2: narrower and shorter by 0.4, at the edge of the box
    ((0.4, 0.0), 0.64 / 1.36),  # shifted by a fifth along both axes
    ((0.0, 0.5), 0.25),
    ((0.0, 0.0), 1.0),
    ((1.0, 1.0), 0.0),
    ((2.5, 0.1), 0.0),
])  # fmt: skip
def test_the_least_iou_of_worked_scales(scale, least):
    assert least_iou(NoiseScale(*scale)) == pytest.approx(least)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1.5), st.floats(0, 1.5), st.integers(0, 2**31))
def test_uniform_noise_never_falls_below_the_least_iou_and_comes_near_it(center, size, seed):
    """A grid over the range that uniform noise draws from, its ends included."""
    scale = NoiseScale(center, size)
    steps = np.linspace(-1, 1, 9)
    lowest = min(
        iou((0, 0, 1, 1), (a * center / 2, b * center / 2, max(1 + c * size, 0), max(1 + d * size, 0)))
        for a in steps[:5] for b in steps[:5] for c in steps for d in steps
    )  # fmt: skip
    assert lowest == pytest.approx(least_iou(scale), abs=1e-9)
    torch.manual_seed(seed)
    box = torch.tensor([0.5, 0.5, 0.125, 0.25], dtype=torch.float64)  # far from the borders, where it would be clipped
    drawn = BOX_NOISES.resolve("uniform")(box.expand(500, 4), scale)
    inside = [iou(box.tolist(), x) for x in drawn.tolist() if x[2] > 1e-3 and x[3] > 1e-3]
    assert all(x >= least_iou(scale) - 1e-6 for x in inside)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=4, max_size=4),
    st.floats(0.01, 1),
)
def test_the_distance_leads_to_the_wanted_iou_and_is_the_first_that_does(direction, wanted):
    assume(any(direction))
    step, loss = torch.tensor(direction, dtype=torch.float64), torch.tensor([1 - wanted], dtype=torch.float64)
    t = distance_at_iou(step, loss).item()

    def at(t):
        return iou((0, 0, 1, 1), (direction[0] * t, direction[1] * t, 1 + direction[2] * t, 1 + direction[3] * t))

    assert t >= 0
    assert at(t) == pytest.approx(wanted, abs=1e-9)
    assert all(at(t * part) >= wanted - 1e-9 for part in np.linspace(0, 1, 20))


@pytest.mark.parametrize("scale", [(0.4, 0.4), (0.4, 0.0), (0.0, 0.4), (0.9, 0.2)])
@pytest.mark.parametrize("box", [(0.5, 0.5, 0.2, 0.1), (0.3, 0.6, 0.02, 0.03)])
def test_the_iou_is_uniform_from_the_least_one_to_one(scale, box):
    scale = NoiseScale(*scale)
    found = np.array([iou(box, x) for x in draw("iou_targeted", box, scale, 20_000).double().tolist()])
    least = least_iou(scale)
    assert stats.kstest(found, stats.uniform(least, 1 - least).cdf).statistic < 2 / math.sqrt(20_000)
    assert least - 1e-4 <= found.min() < least + 0.01
    # The uniform noise of the same scale spreads it otherwise.
    usual = [iou(box, x) for x in draw("uniform", box, scale, 2000).double().tolist()]
    assert stats.kstest(usual, stats.uniform(least, 1 - least).cdf).statistic > 0.1


def test_directions_of_iou_targeted_noise_have_no_preferred_side():
    moved = (draw("iou_targeted") - torch.tensor([0.5, 0.5, 0.2, 0.1])).numpy()
    assert np.abs((moved[:, :2] > 0).mean(0) - 0.5).max() < 0.02


@pytest.mark.parametrize(("side", "shift", "change"), [
    (0.2, 0.04, 0.06),  # above the reference size: lambda1 / 2 and lambda2 of the side itself
    (0.05, 0.02, 0.03),  # below: of the reference size, 0.1
    (0.01, 0.02, 0.01),  # a side never changes by more than itself
])  # fmt: skip
def test_scale_aware_noise_of_worked_sides(side, shift, change):
    boxes = torch.tensor([0.5, 0.5, side, 0.2]).expand(DRAWS, 4)
    moved = (ScaleAware(reference_size=0.1)(boxes, NoiseScale(0.4, 0.3)) - boxes).abs().max(0).values
    assert moved.tolist() == pytest.approx([shift, 0.04, change, 0.06], rel=0.01)


@pytest.mark.parametrize("size", [0.0, -0.1, math.inf, math.nan])
def test_a_reference_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=naming("reference_size", size)):
        ScaleAware(reference_size=size)


def test_a_generator_takes_a_name_or_a_function_and_its_scales():
    seen = []

    def twice(boxes, scale):
        seen.append(scale)
        return boxes / 2

    generator = DenoisingGenerator(num_classes=3, box_noise=twice, center_noise_scale=0.4, size_noise_scale=0.2)
    boxes = torch.rand(2, 5, 4)
    assert torch.equal(generator.noise_boxes(boxes), boxes / 2)
    generator.noise_factor = 0.5
    generator.noise_boxes(boxes)
    assert seen == [(0.4, 0.2), (0.2, 0.1)]
    assert (seen[0].center, seen[0].size) == (0.4, 0.2)
    assert DenoisingGenerator(num_classes=3, box_noise="gaussian").box_noise is BOX_NOISES.resolve("gaussian")


def test_diagnostics_have_the_uniform_noise_of_the_scale_that_they_name():
    """Whatever the training's kind and schedule: labels must say nothing where gamma is 1."""
    generator = DenoisingGenerator(num_classes=3, box_noise="gaussian", label_noise=lambda labels, *_: labels)
    generator.noise_factor = 0.1
    twin = generator.renoised(label_noise_prob=1.0, box_noise_scale=0.3)
    moved = in_reaches(twin.noise_boxes(torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(2000, 4)), scale=NoiseScale(0.3, 0.3))
    assert 0.99 < np.abs(moved).max() <= 1 + 1e-5
    labels = torch.bincount(twin.noise_labels(torch.zeros(3000, dtype=torch.int64)))
    assert (labels / 3000 - 1 / 3).abs().max() < 0.04
    assert generator.noise_factor == 0.1


def test_a_function_that_changes_the_shape_is_refused():
    generator = DenoisingGenerator(num_classes=3, box_noise=lambda boxes, scale: boxes[..., :2])
    with pytest.raises(ValueError, match=naming("(2, 5, 4)", "(2, 5, 2)")):
        generator.noise_boxes(torch.rand(2, 5, 4))


@pytest.mark.parametrize("name", ["normal", "", None, 7, ["uniform"]])
def test_an_unknown_noise_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=naming("box_noise", name, *NAMES)):
        DenoisingGenerator(num_classes=3, box_noise=name)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=naming("box_noise", "'uniform'")):
        BOX_NOISES.register("uniform")(lambda boxes, scale: boxes)


@pytest.mark.parametrize("noise", ["gaussian", lambda boxes, scale: boxes])
def test_contrastive_denoising_has_its_own_box_noise(noise):
    with pytest.raises(ValueError, match=naming("box_noise", "'uniform'", "DenoisingGenerator")):
        ContrastiveDenoisingGenerator(num_classes=3, box_noise=noise)


def test_the_factor_scales_the_reach_of_contrastive_corners():
    generator = ContrastiveDenoisingGenerator(num_classes=3, corner_noise_scale=0.5)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 1, 2, 5000, 4)
    generator.noise_factor = 0.5
    near, far = (generator.noise_boxes(boxes) - boxes)[..., :2].abs().unbind(2)
    assert near.max().item() == pytest.approx(0.25 * 0.1, rel=0.05)  # the centre moves with both corners
    assert far.max().item() == pytest.approx(2 * 0.25 * 0.1, rel=0.05)


NODE = "MODEL.DN_DETR.DENOISING."


def test_the_config_names_the_noise(toy_model):
    model = toy_model("dn_detr", NODE + "BOX_NOISE.NAME", "scale_aware", NODE + "BOX_NOISE.REFERENCE_SIZE", 0.2)
    assert model.denoising.generator.box_noise == ScaleAware(0.2)
    usual = toy_model("dn_detr").denoising.generator
    assert usual.box_noise is BOX_NOISES.resolve("uniform")
    assert usual.noise_factor == 1


@pytest.mark.parametrize(("system", "name", "named"), [
    ("dn_detr", "normal", ["BOX_NOISE.NAME", "'normal'", "gaussian"]),
    ("dino", "normal", ["BOX_NOISE.NAME", "'normal'", "gaussian"]),
    ("dino", "gaussian", ["BOX_NOISE.NAME", "uniform"]),
])  # fmt: skip
def test_a_config_with_noise_that_cannot_be_is_refused(toy_model, system, name, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_model(system, NODE + "BOX_NOISE.NAME", name)


@pytest.fixture
def page():
    yield run_blocks(ROOT / "docs" / "noise.md")
    BOX_NOISES._noises.pop("laplace")


def test_the_noise_of_the_page_is_registered_and_trains(page, toy_model):
    from conftest import make_batch

    model = toy_model("dn_detr", NODE + "BOX_NOISE.NAME", "laplace").train()
    assert model.denoising.generator.box_noise is page.laplace
    losses = model(make_batch(2, 1))
    assert sum(losses.values()).isfinite()
    moved = in_reaches(page.laplace(torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(DRAWS, 4), SCALE))
    assert np.abs(moved).mean() == pytest.approx(0.4, rel=0.05)  # of a Laplace distribution this is its scale
