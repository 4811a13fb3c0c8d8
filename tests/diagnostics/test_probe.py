"""The probe against the matcher by hand, and what it must leave as it was."""

import random

import numpy as np
import pytest
import torch
from conftest import SYSTEMS, make_batch

from dn_detr_d2 import DatasetError
from dn_detr_d2.diagnostics import probe
from dn_detr_d2.diagnostics.diagnostic_hooks import read_assignment, write_assignment
from dn_detr_d2.diagnostics.instability import anchor_metrics, instability
from dn_detr_d2.diagnostics.model_state import preserve_state


def numbered(*counts, masks=False):
    """One batch an image, ids from 7 downwards."""
    return [[record | {"image_id": 7 - i}] for i, record in enumerate(make_batch(*counts, masks=masks))]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_probe_is_the_matching_of_the_model_in_evaluation_mode(toy_model, system):
    model = toy_model(system).eval()
    loader = numbered(3, 0, 2)
    images = probe(model, loader)
    assert [image.image_id for image in images] == ["5", "6", "7"]
    for image, [record] in zip(images[::-1], loader, strict=True):
        with torch.no_grad():
            seen = model.forward_outputs([record])
        count = len(record["instances"])
        queries = 27 if system in ("encoder_only", "anchor_detr") else 9  # three patterns
        assert image.matched.shape == (3, queries)
        for layer, rows in enumerate(image.matched):
            assert sorted(rows[rows >= 0].tolist()) == list(range(count))
            cost = model.matcher.cost(seen.predictions, seen.targets)[layer, 0].numpy()
            mine = sum(cost[q, t] for q, t in enumerate(rows) if t >= 0)
            for _ in range(50):  # no other pairing is cheaper
                others = random.sample(range(queries), count)
                assert mine <= sum(cost[q, t] for t, q in enumerate(others)) + 1e-5
        corners = record["instances"].gt_boxes.tensor
        wanted = (corners[:, 2:] - corners[:, :2]).prod(1)
        np.testing.assert_allclose(image.areas, wanted.numpy(), rtol=1e-4)
        np.testing.assert_array_equal(image.anchors, seen.queries.boxes[0].numpy())


def test_models_with_masks_are_probed_with_the_set_before_the_first_layer(toy_model):
    for system in ("mask2former", "mask_dino"):
        loader = numbered(3, 0, 2, masks=True)
        images = probe(toy_model(system).train(), loader)
        for image, [record] in zip(images[::-1], loader, strict=True):
            count = len(record["instances"])
            assert image.matched.shape == (4, 9)
            assert all(sorted(rows[rows >= 0].tolist()) == list(range(count)) for rows in image.matched)
            assert (image.anchors is None) == (system == "mask2former")
        assert ("distance" in anchor_metrics(images, 100)) == (system == "mask_dino")


@pytest.mark.parametrize("system", ["dn_detr", "mask_dino"])
def test_areas_are_those_of_the_original_image(toy_model, system):
    [[record]] = numbered(2, masks=True)
    model = toy_model(system)
    area = record["instances"].gt_boxes.area()
    record |= {"height": 128, "width": 192}
    np.testing.assert_allclose(probe(model, [[record]])[0].areas, 4 * area, rtol=1e-5)
    record |= {"height": 64, "width": 96}
    half, whole = (probe(model, [[record | size]])[0] for size in ({}, {"height": 128, "width": 192}))
    np.testing.assert_allclose(whole.areas, 4 * half.areas, rtol=1e-6)


def test_a_probe_leaves_modes_gradients_and_random_streams_as_they_were(toy_model):
    model = toy_model("dn_detr").train()
    model.encoder.eval()  # a part that stands still on purpose
    modes = [module.training for module in model.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    probe(model, numbered(2))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_and_streams_come_back_after_an_error(toy_model):
    model = toy_model("dn_detr").train()
    torch.manual_seed(3)
    expected = torch.rand(1).item()
    torch.manual_seed(3)
    with pytest.raises(IndexError), preserve_state(model, seed=8):
        torch.rand(5)[5]
    assert torch.rand(1).item() == expected
    assert model.training


def test_images_without_boxes_are_no_measurement(toy_model):
    with pytest.raises(DatasetError):
        probe(toy_model("dn_detr"), numbered(0, 0))


def test_images_with_fewer_cells_than_queries_are_probed(toy_model, tmp_path):
    """Two stages give an image no more queries than it has cells."""
    model = toy_model("dino", "MODEL.DN_DETR.NUM_QUERIES", 300)
    records = make_batch(2, 2, sizes=((64, 96), (80, 80)))
    images = probe(model, [[record | {"image_id": i}] for i, record in enumerate(records)])
    (shape,) = {image.matched.shape for image in images}
    assert shape[1] < 300
    assert {image.anchors.shape for image in images} == {(shape[1], 4)}
    assert all((image.matched >= 0).sum() == 2 * shape[0] for image in images)
    assignment = {image.image_id: image.matched for image in images}
    write_assignment(tmp_path / "x.npz", 1, assignment)
    assert instability(read_assignment(tmp_path / "x.npz")[1], assignment).tolist() == [0] * shape[0]
