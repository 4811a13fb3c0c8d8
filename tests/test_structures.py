from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from naming import naming

from dn_detr_d2.structures import (
    Assignment,
    ObjectQueries,
    Predictions,
    Targets,
    join_queries,
    slice_queries,
    to_device,
    upload,
)


def test_padding_keeps_every_object_and_marks_the_rest():
    labels = [torch.tensor([4]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 2])]
    boxes = [torch.full((1, 4), 0.1), torch.zeros(0, 4), torch.full((2, 4), 0.2)]
    targets = Targets.pad(labels, boxes)
    assert targets.counts == [1, 0, 2]
    assert targets.labels.tolist() == [[4, 0], [0, 0], [1, 2]]
    assert targets.valid.tolist() == [[True, False], [False, False], [True, True]]
    torch.testing.assert_close(targets.boxes[:, :, 0], torch.tensor([[0.1, 0.5], [0.5, 0.5], [0.2, 0.2]]))


def test_a_batch_without_objects_has_one_padded_slot():
    targets = Targets.pad([torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0, 4)] * 2)
    assert targets.labels.shape == (2, 1)
    assert not targets.valid.any()


def test_unequal_numbers_of_labels_and_boxes_are_refused():
    with pytest.raises(ValueError, match=naming("[2]", "[1]")):
        Targets.pad([torch.zeros(2, dtype=torch.int64)], [torch.zeros(1, 4)])


def test_assignment_lists_pairs_per_image():
    assignment = Assignment(torch.tensor([0, 0, 2]), torch.tensor([[5, 1, 7]]), torch.tensor([[0, 1, 0]]))
    pairs = [(q.tolist(), t.tolist()) for q, t in assignment.per_image(3)]
    assert pairs == [([5, 1], [0, 1]), ([], []), ([7], [0])]


def test_predictions_split_by_position():
    predictions = Predictions(torch.arange(12.0).reshape(1, 1, 6, 2), torch.zeros(1, 1, 6, 4))
    denoising, matching = predictions.split(4)
    assert denoising.logits.shape[2] == 4
    assert matching.logits.flatten().tolist() == [8, 9, 10, 11]


def test_denoising_queries_come_first():
    first, last = (ObjectQueries(torch.full((1, n, 2), v), torch.full((1, n, 4), v)) for n, v in ((3, 1.0), (2, 2.0)))
    joined = join_queries(first, last, torch.zeros(5, 5, dtype=torch.bool))
    assert joined.content[0, :, 0].tolist() == joined.boxes[0, :, 0].tolist() == [1, 1, 1, 2, 2]


@dataclass
class WithSizes(ObjectQueries):
    """Queries of somebody else's model: one field more on the query axis, one that is not."""

    sizes: torch.Tensor | None = field(default=None, metadata={"query_axis": 0})
    note: str = ""


def test_every_field_on_the_query_axis_is_joined_and_split():
    first, last = (
        WithSizes(
            torch.zeros(1, n, 2),
            torch.zeros(1, n, 4),
            position=torch.full((1, n, 2), v),
            sizes=torch.full((n,), v),
            note=str(v),
        )
        for n, v in ((3, 1.0), (2, 2.0))
    )
    joined = join_queries(first, last, None)
    assert joined.position[0, :, 0].tolist() == joined.sizes.tolist() == [1, 1, 1, 2, 2]
    assert joined.note == "2.0"
    back = [slice_queries(joined, part) for part in (slice(None, 3), slice(3, None))]
    for part, whole in zip(back, (first, last), strict=True):
        assert torch.equal(part.sizes, whole.sizes)
        assert torch.equal(part.position, whole.position)


@pytest.mark.parametrize("lacking", ["denoising", "matching"])
def test_a_field_that_only_one_part_has_is_named(lacking):
    parts = {name: ObjectQueries(torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)) for name in ("denoising", "matching")}
    parts["matching" if lacking == "denoising" else "denoising"].position = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=rf"{lacking} queries have no 'position'"):
        join_queries(parts["denoising"], parts["matching"], None)


def test_predictions_with_masks_are_split_with_them():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    embeddings = torch.eye(2).repeat(1, 1, 3, 1)[:, :, :5]
    predictions = Predictions(torch.zeros(1, 1, 5, 2), None, embeddings, features)
    denoising, matching = predictions.split(2)
    maps = [features[0, i % 2].tolist() for i in range(5)]
    assert denoising.mask_logits()[0].tolist() == maps[:2]
    assert matching.mask_logits()[0].tolist() == maps[2:]
    assert matching.boxes is None


def test_masks_are_padded_with_nothing():
    labels, boxes = [torch.tensor([1]), torch.tensor([1, 0])], [torch.full((n, 4), 0.5) for n in (1, 2)]
    masks = [torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(2, 3, 4, dtype=torch.bool)]
    targets = Targets.pad(labels, boxes, masks=masks)
    assert targets.masks.shape == (2, 2, 3, 4)
    assert targets.masks.flatten(2).sum(-1).tolist() == [[12, 0], [12, 12]]
    with pytest.raises(ValueError, match=r"\[1, 2\] labels and \[2, 2\] masks"):
        Targets.pad(labels, boxes, masks=[masks[1], masks[1]])


def test_a_part_of_a_batch_can_have_the_layout_of_all_of_it():
    targets = Targets.pad([torch.tensor([4])], [torch.full((1, 4), 0.1)], min_slots=3)
    assert targets.labels.tolist() == [[4, 0, 0]]
    assert targets.counts == [1]


class OnTheHost:
    """What to_device asks of a tensor, and what it was asked."""

    def __init__(self, tensor, asked):
        self.tensor, self.asked, self.device = tensor, asked, tensor.device

    def pin_memory(self):
        self.asked.append("pin")
        return self

    def to(self, device, non_blocking=False):
        self.asked.append((str(device), non_blocking))
        return self.tensor


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_nothing_is_pinned_but_for_a_gpu(device):
    asked, x = [], torch.arange(6.0)
    assert to_device(OnTheHost(x, asked), device) is x
    assert asked == [(str(device), False)]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_what_goes_to_a_gpu_goes_through_pinned_memory_without_a_wait(device):
    asked = []
    to_device(OnTheHost(torch.arange(6.0), asked), device)
    assert asked == ["pin", (str(device), True)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool])
def test_an_upload_changes_no_number(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    torch.testing.assert_close(to_device(x.transpose(0, 2), "cpu"), x.transpose(0, 2), atol=0, rtol=0)
    rows = upload(np.array([[1, 2], [3, 4]], dtype=np.int32), x)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[1, 2], [3, 4]]
