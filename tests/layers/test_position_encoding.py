import math

import pytest
import torch
from naming import naming
from torch._subclasses.fake_tensor import FakeTensorMode

from dn_detr_d2.layers import SinePositionEncoding, encode_boxes, sine_encoding

PROBE = [0, 1, 2, 3, 126, 127, 128, 129, 130, 255]


@pytest.mark.parametrize(
    ("temperature", "offset", "probe", "total"),
    [
        (20, 0.0, [-0.0, 1, -0.28339, 0.959, 0.3233, 0.9463, -0.0, 1, -0.28339, 0.9463], 1251.4184),
        (10000, -0.5, [-1, -0.0, -0.80707, -0.59046, 0.00054, 1, -0.86603, 0.5, -0.98416, 1], 1215.4673),
    ],
)
def test_map_encoding_matches_the_fixture_of_the_specification(temperature, offset, probe, total):
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, -1], padding[:, :, -1] = True, True
    encoded = SinePositionEncoding(256, temperature, offset)(padding)
    torch.testing.assert_close(encoded[0, PROBE, 1, 2], torch.tensor(probe), atol=2e-5, rtol=0)
    assert encoded.sum().item() == pytest.approx(total, abs=1e-3)


def test_box_encoding_matches_the_fixture_of_the_specification():
    encoded = encode_boxes(torch.tensor([0.25, 0.5, 0.125, 0.75]), 128)
    expected = {0: 0, 1: -1, 2: 0.40875, 3: -0.91265, 128: 1, 130: 0.97792, 256: 0.70711, 258: 0.62889, 384: -1}
    for channel, value in expected.items():
        assert encoded[channel].item() == pytest.approx(value, abs=2e-5)
    assert encoded.sum().item() == pytest.approx(260.5148, abs=1e-3)


def test_sine_encoding_of_worked_angles():
    """With two channels the frequency is 1; with four the second pair turns at T^(-1/2)."""
    encoded = sine_encoding(torch.tensor([math.pi / 2]), 4, temperature=4.0)[0]
    torch.testing.assert_close(encoded, torch.tensor([1, 0, math.sqrt(0.5), math.sqrt(0.5)]), atol=1e-6, rtol=0)


def test_padding_does_not_change_the_encoding_inside_the_image():
    encoding = SinePositionEncoding(16, 20.0)
    small = torch.zeros(1, 3, 4, dtype=torch.bool)
    padded = torch.ones(1, 5, 7, dtype=torch.bool)
    padded[:, :3, :4] = False
    torch.testing.assert_close(encoding(padded)[:, :, :3, :4], encoding(small))


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_cells_are_counted_inside_the_image(offset):
    """With dim 4 the channels are sin y, cos y, sin x, cos x, of 2 pi (place + offset) / (number of cells inside)."""
    padding = torch.ones(2, 4, 5, dtype=torch.bool)
    padding[0, :3, :2] = False
    padding[1, :1, :5] = False
    encoded = SinePositionEncoding(4, offset=offset)(padding)
    for image, height, width in ((0, 3, 2), (1, 1, 5)):
        for y in range(height):
            for x in range(width):
                angles = [2 * math.pi * (i + 1 + offset) / n for i, n in ((y, height), (x, width))]
                expected = torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)])
                torch.testing.assert_close(encoded[image, :, y, x], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dim", [0, 3, -4])
def test_odd_widths_are_refused(dim):
    with pytest.raises(ValueError, match=naming(dim)):
        sine_encoding(torch.zeros(1), dim)
    with pytest.raises(ValueError, match=naming(dim)):
        SinePositionEncoding(dim)


def test_levels_together_are_encoded_as_each_by_itself():
    encoding = SinePositionEncoding(16, temperature=20.0, offset=-0.5)
    levels = [torch.zeros(2, 4, 6, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    levels[0][1, :, 4:] = levels[1][1, :, 2:] = True
    for found, level in zip(encoding.of_levels(levels), levels, strict=True):
        assert torch.equal(found, encoding(level))
    assert encoding.of_levels(levels, torch.bfloat16)[1].dtype == torch.bfloat16


def test_wavelengths_that_inference_made_go_with_training():
    """A tensor of inference mode cannot be kept for a backward pass, and one of a tracer is no number."""
    with torch.inference_mode():
        sine_encoding(torch.rand(3), 22, 123.0)
    x = torch.rand(3, requires_grad=True)
    sine_encoding(x, 22, 123.0).sum().backward()
    assert x.grad is not None
    with FakeTensorMode() as mode:
        sine_encoding(mode.from_tensor(torch.rand(3)), 26, 123.0)
    assert type(sine_encoding(torch.rand(3), 26, 123.0)) is torch.Tensor
