"""Detections on their way to the host: Detectron2's own post-processing is the reference, and one wait has to do."""

import pytest
import torch
from conftest import make_batch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from naming import naming

from dev.benchmark_criterion import OperatorCount
from dn_detr_d2.modeling.postprocess import Postprocess, select_best, select_top, without_duplicates
from dn_detr_d2.structures import Predictions


def predictions(images, queries, seed):
    """Random ones of two layers; of some boxes a side is nothing, and some lie outside the image."""
    torch.manual_seed(seed)
    boxes = torch.rand(2, images, queries, 4) * 1.6 - 0.3
    boxes[..., 2:] = boxes[..., 2:].clamp(min=0)
    return Predictions(torch.randn(2, images, queries, 4), boxes)


def records(images):
    sizes = [(40, 60), (64, 48), (33, 91)]
    batch = [{"image": torch.zeros(3, *sizes[i % 3]), "file_name": f"{i}.png"} for i in range(images)]
    for i, record in enumerate(batch):
        if i % 2 == 0:  # the output has another size
            record |= {"height": 100 + i, "width": 77}
    return batch


@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 99), st.sampled_from([select_top, select_best]))
def test_it_is_detectron2s_post_processing(images, queries, seed, select):
    made, batch = predictions(images, queries, seed), records(images)
    found = Postprocess(select, 6)(made, batch)
    assert len(found) == images
    for i, (one, record) in enumerate(zip(found, batch, strict=True)):
        size = tuple(record["image"].shape[-2:])
        raw = select(made.logits[-1, i], made.boxes[-1, i], size, 6)
        theirs = detector_postprocess(raw, record.get("height", size[0]), record.get("width", size[1]))
        ours = one["instances"]
        assert ours.image_size == theirs.image_size
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)


def test_the_image_that_is_not_finite_is_named():
    made = predictions(3, 4, 0)
    made.logits[-1, 1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN or Inf.*\['1\.png'\]"):
        Postprocess(select_top, 6)(made, records(3))


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "detr"])
def test_a_batch_waits_once_for_the_device_whatever_is_in_it(toy_model, monkeypatch, system):
    reads = []
    for name in ("cpu", "tolist", "item", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, f=original: reads.append(1) or f(self))
    model = toy_model(system).eval()
    for sizes in (((64, 96),), ((64, 96), (96, 64), (80, 80))):
        reads.clear()
        with torch.no_grad(), OperatorCount() as count:
            found = model(make_batch(*[0] * 3, sizes=sizes))
        assert len(found) == 3
        assert (len(reads), count.waits) == (1, 0)


def test_labels_that_are_looked_for_come_out_alike():
    post, batch = Postprocess(select_top, 6), records(2)
    made = predictions(3, 5, 4)  # two passes over the first image, one over the second
    found = post.of_labels(made, [torch.tensor([2, 0]), torch.tensor([1])], batch)
    assert [
        set(x["instances"].pred_classes.tolist()) <= kinds for x, kinds in zip(found, ({0, 2}, {1}), strict=True)
    ] == [
        True,
        True,
    ]
    made.boxes[-1, 2, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=naming("1.png")):
        post.of_labels(made, [torch.tensor([2, 0]), torch.tensor([1])], batch)


def overlap(one, other):
    """IoU of two boxes; 0 where there is nothing in common."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    if min(width, height) <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one, other)]
    return width * height / (sum(areas) - width * height)


def slow_nms(boxes, classes, iou):
    """Indices of what is kept of detections that are sorted by score, one pair at a time."""
    boxes, kept = boxes.tolist(), []
    for i in range(len(boxes)):
        if not any(classes[i] == classes[j] and overlap(boxes[i], boxes[j]) > iou for j in kept):
            kept.append(i)
    return kept


def random_detections(count, seed, classes=3):
    """Sorted by score, some with equal scores; boxes lie outside the image too, and some have no area."""
    torch.manual_seed(seed)
    corner = torch.randint(-30, 30, (count, 2)).float()
    boxes = torch.cat([corner, corner + torch.randint(0, 40, (count, 2))], 1)
    scores = (torch.rand(count) * 10).round().div(10).sort(descending=True).values
    return Instances((20, 20), pred_boxes=Boxes(boxes), scores=scores, pred_classes=torch.randint(classes, (count,)))


@given(st.integers(0, 40), st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.7, 0.999, 1.0]))
def test_nms_is_greedy_within_a_class(count, seed, iou):
    found = random_detections(count, seed)
    kept = without_duplicates(found, iou)
    expected = slow_nms(found.pred_boxes.tensor, found.pred_classes, iou) if iou < 1 else list(range(count))
    assert torch.equal(kept.pred_boxes.tensor, found.pred_boxes.tensor[expected])
    assert torch.equal(kept.pred_classes, found.pred_classes[expected])
    assert torch.equal(kept.scores, found.scores[expected])


def test_what_lies_outside_the_image_does_not_meet_another_class():
    """NMS of several classes at a time moves them apart, by the largest coordinate; negative ones must not come back."""
    boxes = torch.tensor([[90.0, 90.0, 100.0, 100.0], [-11.0, -11.0, -1.0, -1.0]])
    found = Instances(
        (9, 9), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8]), pred_classes=torch.tensor([0, 1])
    )
    assert len(without_duplicates(found, 0.5)) == 2


@pytest.mark.parametrize("system", ["dn_deformable_detr", "detr", "mask2former"])
def test_a_model_with_nms_keeps_the_best_of_what_it_finds_without(toy_model, system):
    every = toy_model(system).eval()
    model = toy_model(system, "TEST.NMS", 0.02).eval()
    model.load_state_dict(every.state_dict())
    batch = make_batch(*[0] * 2, sizes=((64, 96), (80, 80)))
    with torch.no_grad():
        for whole, some in zip(every(batch), model(batch), strict=True):
            whole, some = whole["instances"], some["instances"]
            kept = slow_nms(whole.pred_boxes.tensor, whole.pred_classes, 0.02)
            assert 0 < len(kept) < len(whole)
            assert torch.equal(some.scores, whole.scores[kept])
            assert torch.equal(some.pred_boxes.tensor, whole.pred_boxes.tensor[kept])
            if whole.has("pred_masks"):
                assert torch.equal(some.pred_masks, whole.pred_masks[kept])
