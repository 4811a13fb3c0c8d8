import pytest
import torch

from dn_detr_d2.structures import Assignment, ObjectQueries, Predictions, Targets, join_queries


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
    with pytest.raises(ValueError, match=r"\[2\] labels and \[1\] boxes"):
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
