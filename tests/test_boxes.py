import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou

from dn_detr_d2.boxes import corners, cxcywh_to_xyxy, giou, giou_of_corners, image_scale, logit, xyxy_to_cxcywh

unit = st.floats(0, 1, width=32)
boxes = st.lists(st.tuples(unit, unit, unit, unit), min_size=0, max_size=8)


@given(boxes)
def test_conversion_and_back_is_the_identity(values):
    cxcywh = torch.tensor(values).reshape(-1, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(cxcywh)), cxcywh, atol=1e-6, rtol=0)


def test_conversion_of_a_worked_box():
    torch.testing.assert_close(cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])), torch.tensor([0.4, 0.1, 0.6, 0.7]))


def test_image_scale_is_width_height_width_height():
    assert image_scale((3, 7), torch.zeros(1)).tolist() == [7, 3, 7, 3]


def test_logit_matches_the_official_fixture():  # spec section 0: note the asymmetry of the two ends
    x = torch.tensor([0, 0.0005, 0.3, 0.9999, 1])
    expected = torch.tensor([-6.90776, -6.90726, -0.8473, 6.90766, 6.90776])
    torch.testing.assert_close(logit(x), expected, atol=1e-5, rtol=0)


@given(st.floats(0.001, 0.999))
def test_logit_is_the_inverse_of_the_sigmoid(value):
    x = torch.tensor(value)
    torch.testing.assert_close(logit(x).sigmoid(), x, atol=1e-6, rtol=0)


def test_logit_of_one_half_is_exactly_zero():
    assert logit(torch.tensor(0.5)).item() == 0


def test_logit_keeps_nan():
    assert logit(torch.tensor(float("nan"))).isnan()


def test_giou_of_worked_boxes():
    """Two unit squares shifted by half: intersection 1/2, union 3/2, enclosing 3/2 -> 1/3. Far apart: -(5 - 2) / 5."""
    a = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    b = torch.tensor([[0.5, 0, 1.5, 1], [4, 0, 5, 1]])
    torch.testing.assert_close(giou(a, b, eps=0.0), torch.tensor([1 / 3, -0.6]))


def test_giou_of_the_corners_of_worked_boxes():
    """Squares of side 0.4 that share a half: IoU 1/3, and nothing around them is lost."""
    a, b = torch.tensor([0.4, 0.5, 0.4, 0.4]), torch.tensor([0.6, 0.5, 0.4, 0.4])
    low, high = corners(a)
    torch.testing.assert_close(low, torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(high, torch.tensor([0.6, 0.7]))
    torch.testing.assert_close(giou_of_corners((low, high), corners(b)), torch.tensor(1 / 3))


def test_giou_agrees_with_torchvision_pairwise():
    a, b = (cxcywh_to_xyxy(torch.rand(n, 4) * 0.5 + 0.1) for n in (6, 4))
    torch.testing.assert_close(giou(a[:, None], b, eps=0.0), generalized_box_iou(a, b))


@given(boxes.filter(bool))
def test_giou_is_symmetric_and_within_bounds(values):
    a = cxcywh_to_xyxy(torch.tensor(values))
    b = a.flip(0)
    torch.testing.assert_close(giou(a, b), giou(b, a))
    assert ((giou(a, b) >= -1 - 1e-6) & (giou(a, b) <= 1 + 1e-6)).all()


def test_giou_of_degenerate_boxes_is_finite_with_finite_gradient():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = giou(point, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    value.sum().backward()
    assert value.isfinite().all()
    assert point.grad.isfinite().all()


side = st.floats(-6, 0).map(lambda exponent: 10**exponent)


@given(unit, unit, side, side)
def test_giou_of_a_box_with_itself_is_one_with_finite_gradients(x, y, width, height):
    """Down to a side of 1e-6: at the image's corner, and anywhere at sides that float32 can tell from a point there."""
    low = torch.tensor([x, y])
    high = torch.maximum(low + torch.tensor([width, height]), low + 1e-6)
    box = torch.cat([low, high])
    for a in (cxcywh_to_xyxy(torch.tensor([width / 2, height / 2, width, height])), box):
        a.requires_grad_()
        value = giou(a, a.detach())
        (gradient,) = torch.autograd.grad(value, a)
        assert value.item() >= 1 - 1e-5
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("side", "expected"), [(1e-2, 0.990), (1e-3, 0.5), (1e-4, 0.0099)])
def test_the_official_epsilon_is_a_switch(side, expected):
    box = cxcywh_to_xyxy(torch.tensor([0.5, 0.5, side, side]))
    assert giou(box, box, eps=1e-6).item() == pytest.approx(expected, rel=1e-2)
    assert giou(box, box).item() == pytest.approx(1, abs=1e-5)


@given(boxes.filter(bool))
def test_giou_and_its_gradient_are_finite_whatever_the_boxes(values):
    a = cxcywh_to_xyxy(torch.tensor(values)).requires_grad_()
    value = giou(a[:, None], a.detach())
    value.sum().backward()
    assert value.isfinite().all()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_empty_tensors_pass_through(shape):
    empty = torch.zeros(shape)
    assert cxcywh_to_xyxy(empty).shape == xyxy_to_cxcywh(empty).shape == empty.shape
    assert giou(empty, empty).shape == empty.shape[:-1]
