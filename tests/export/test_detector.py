"""Detections as sets: which belong together, and how many have nobody."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch
from detectron2.structures import Boxes, Instances

from dn_detr_d2.export.detector import ExportedDetector, Tolerance, compare, partners
from dn_detr_d2.export.metadata import output_names
from dn_detr_d2.modeling.outputs import LastPredictions
from dn_detr_d2.modeling.postprocess import Postprocess, select_top

NEAR = Tolerance(score=0.01, iou=0.9, share=0.95)


def found(*rows, masks=None):
    """Instances of (x0, y0, x1, y1, score, class)."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    fields = {"pred_boxes": Boxes(rows[:, :4]), "scores": rows[:, 4], "pred_classes": rows[:, 5].long()}
    return Instances((50, 50), **fields, **({} if masks is None else {"pred_masks": masks}))


A, B = (0, 0, 10, 10, 0.9, 1), (20, 20, 40, 40, 0.9, 1)


def test_the_order_does_not_matter():
    assert partners(found(A, B), found(B, A), NEAR) == [0.0, 0.0]


@pytest.mark.parametrize(
    "other", [(0, 0, 10, 10, 0.9, 2), (0, 0, 10, 10, 0.88, 1), (0, 0, 10, 8.9, 0.9, 1), (5, 5, 5, 5, 0.9, 1)]
)
def test_another_class_score_or_place_is_no_partner(other):
    assert partners(found(A), found(other), NEAR) == [None]


def test_a_partner_is_nobody_elses():
    assert partners(found(A, A), found(A), NEAR) == [0.0, None]
    assert partners(found(A), found(), NEAR) == [None]
    assert partners(found(), found(A), NEAR) == []


def test_what_is_not_a_number_is_no_partner():
    nan = float("nan")
    assert partners(found(A), found((nan, nan, nan, nan, 0.9, 1)), NEAR) == [None]
    assert partners(found(A), found((0, 0, 10, 10, nan, 1)), NEAR) == [None]


def test_masks_decide_where_there_are_some():
    left = torch.zeros(1, 50, 50, dtype=torch.bool)
    left[:, :, :20] = True
    assert partners(found(A, masks=left), found(B, masks=left), NEAR) == [0.0]
    assert partners(found(A, masks=left), found(A, masks=~left), NEAR) == [None]
    nothing = torch.zeros_like(left)
    assert partners(found(A, masks=nothing), found(A, masks=nothing), NEAR) == [0.0]


@pytest.mark.parametrize("system", ["dn_detr", "mask2former", "mask_dino"])
def test_the_model_itself_in_the_place_of_a_file_agrees_entirely(toy_model, system):
    model = toy_model(system).eval()
    exported = ExportedDetector(model, output_names(model), model.forward_tensors)
    batch = make_batch(1, 1, 1, sizes=((64, 96), (96, 64), (64, 96)))
    with torch.no_grad():
        for ours, theirs in zip(model(batch), exported(batch), strict=True):
            assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
            assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
    agreement = compare(model, exported, [batch[:1], batch[:2]], NEAR)
    assert (agreement.share, agreement.score) == (1.0, 0.0)


def test_duplicates_that_rounding_puts_in_another_order_agree():
    """NMS would keep the one of the model and the other of the file."""
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.32]]])
    logits = torch.tensor([[[1.0], [0.9999]]])

    class Model:
        pixel_decoder, size_divisibility, backbone = None, 32, SimpleNamespace(padding_constraints={})
        postprocess = Postprocess(select_top, 7, 0.5)

        def detect(self, batch):
            return self.postprocess(LastPredictions(logits[None], boxes[None]), batch)

    batch = make_batch(1)
    exported = ExportedDetector(Model(), ["logits", "boxes"], lambda *_: (logits.flip(1), boxes))
    ours, theirs = (x.detect(batch)[0]["instances"].pred_boxes.tensor for x in (Model(), exported))
    assert len(ours) == len(theirs) == 1
    assert not torch.equal(ours, theirs)
    assert compare(Model(), exported, [batch], Tolerance(1e-3, 0.9, 0.95)).share == 1.0


def test_a_file_of_another_model_does_not_agree(toy_model):
    model, other = toy_model("dn_detr").eval(), toy_model("dn_detr").eval()
    exported = ExportedDetector(model, output_names(model), other.forward_tensors)
    assert compare(model, exported, [make_batch(1)], NEAR).share < NEAR.share
