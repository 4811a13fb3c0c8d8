"""The batch that a model gets: normalised and padded as Detectron2 does it image by image, bit for bit."""

import pytest
import torch
from conftest import make_batch
from detectron2.structures import ImageList
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_d2.modeling.batch import normalised_batch, padded_shape

SIDES = st.integers(1, 70)
CONSTRAINTS = st.sampled_from([None, {}, {"square_size": 96}, {"square_size": 0, "size_divisibility": 24}])


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    divisibility=st.sampled_from([0, 1, 16, 32]),
    constraints=CONSTRAINTS,
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    mean=st.lists(st.floats(0, 255, width=32), min_size=3, max_size=3),
    std=st.lists(st.floats(0.5, 80, width=32), min_size=3, max_size=3),
)
def test_a_batch_is_what_detectron2_makes_of_normalised_images(sizes, divisibility, constraints, dtype, mean, std):
    generator = torch.Generator().manual_seed(len(sizes))
    images = [torch.randint(256, (3, h, w), generator=generator).to(dtype) for h, w in sizes]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    expected = ImageList.from_tensors([(x - mean) / std for x in images], divisibility, padding_constraints=constraints)
    found = normalised_batch(images, mean, std, padded_shape(sizes, divisibility, constraints))
    assert found.dtype == expected.tensor.dtype
    assert found.is_contiguous()
    assert torch.equal(found, expected.tensor)
    assert sizes == expected.image_sizes


def test_images_that_are_not_finite_spoil_their_own_pixels_alone():
    image = torch.full((3, 2, 2), torch.nan)
    batch = normalised_batch([image, torch.ones(3, 3, 3)], torch.ones(3, 1, 1), torch.ones(3, 1, 1), (4, 4))
    assert batch[0, :, :2, :2].isnan().all()
    assert batch.isnan().sum() == 12
    assert not batch[1].any()


def test_gradients_of_images_are_divided_by_the_deviation():
    image = torch.ones(3, 2, 3, requires_grad=True)
    normalised_batch(
        [image], torch.zeros(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1), (4, 4)
    ).sum().backward()
    assert image.grad[:, 0, 0].tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize("system", ["dn_detr", "mask2former"])
def test_a_model_makes_its_batch_in_one_piece(toy_model, system):
    """Of two images two copies, and two operations for all pixels."""
    model = toy_model(system)
    batch = make_batch(1, 1)
    images = model.preprocess(batch)
    expected = ImageList.from_tensors(
        [(x["image"] - model.pixel_mean) / model.pixel_std for x in batch], model.size_divisibility
    )
    assert torch.equal(images.tensor, expected.tensor)
    assert images.image_sizes == expected.image_sizes
