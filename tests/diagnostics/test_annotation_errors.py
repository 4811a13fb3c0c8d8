"""Shifted, spurious and missing boxes, with a model that sees what is there and with the real ones."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import DENOISING_SYSTEMS, make_batch
from detectron2.structures import Boxes, Instances
from naming import naming
from torch import nn
from torchvision.ops import box_iou

from dn_detr_d2 import ConfigError, DenoisingGenerator, cxcywh_to_xyxy, xyxy_to_cxcywh
from dn_detr_d2.denoising import DenoisingQueries, QueryDenoising
from dn_detr_d2.diagnostics import judge_annotations
from dn_detr_d2.diagnostics.annotation_errors import KINDS
from dn_detr_d2.modeling.outputs import ForwardOutputs
from dn_detr_d2.structures import Predictions, Targets

HEIGHT, WIDTH = 64, 96
SCALE = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
GENERATOR = DenoisingGenerator(
    num_classes=3, num_groups=4, label_noise_prob=0.5, center_noise_scale=0.4, size_noise_scale=0.4
)


class Seeing(nn.Module):
    """Detects the ``there`` boxes of each record with the score 0.9, and restores each annotated box to the nearest one."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.denoising, self.decoder = QueryDenoising(GENERATOR, dim=8), SimpleNamespace(BOXES=True)

    def forward(self, batch):
        return [{"instances": self._detect(record)} for record in batch]

    @staticmethod
    def _detect(record):
        there = record["there"]
        scale = torch.tensor([record["width"] / WIDTH, record["height"] / HEIGHT] * 2)
        found = Instances((record["height"], record["width"]))
        found.pred_boxes, found.scores = Boxes(there * scale), torch.full((len(there),), 0.9)
        found.pred_classes = torch.arange(len(there)) % 3
        return found

    def forward_outputs(self, batch, denoising):
        boxes = [xyxy_to_cxcywh(record["instances"].gt_boxes.tensor / SCALE) for record in batch]
        targets = Targets.pad([record["instances"].gt_classes for record in batch], boxes)
        noised = denoising.generator(targets)
        restored, pairs = noised.boxes.clone(), noised.assignment
        for image, query, target in zip(pairs.image, pairs.query[0], pairs.target[0], strict=True):
            there = batch[image]["there"]
            if len(there):
                nearest = box_iou(cxcywh_to_xyxy(targets.boxes[image, target])[None] * SCALE, there).argmax()
                restored[image, query] = xyxy_to_cxcywh(there[nearest] / SCALE)
        dn = DenoisingQueries(denoising, targets, noised)
        logits = torch.zeros(1, *noised.labels.shape, 3)
        return ForwardOutputs(
            SimpleNamespace(mask_features=None), targets, None, dn, Predictions(logits, restored[None])
        )


def scene(annotated, there, image_id=0):
    """A batch of one image with boxes (xyxy) that are annotated, and boxes of what is there."""
    annotated, there = (torch.tensor(x, dtype=torch.float32).view(-1, 4) for x in (annotated, there))
    instances = Instances((HEIGHT, WIDTH), gt_boxes=Boxes(annotated))
    instances.gt_classes = instances.gt_index = torch.arange(len(annotated)) % 3
    image = {"image": torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), "height": HEIGHT, "width": WIDTH}
    return [image | {"image_id": image_id, "instances": instances, "there": there}]


def judge_boxes(*given, kinds=("box", "spurious", "missing"), **settings):
    return judge_annotations(*given, kinds=kinds, **settings)


A, B, C = [5.0, 5, 25, 35], [40.0, 10, 70, 30], [60.0, 40, 90, 60]


def first(judged, kind):
    return next(x for x in judged if x.kind == kind)


def test_a_right_image_has_no_errors():
    judged = judge_boxes(Seeing(), [scene([A, B], [A, B])])
    assert [x.kind for x in judged] == ["box"] * 2 + ["spurious"] * 2 + ["missing"] * 2
    assert [x.score for x in judged] == pytest.approx([0, 0, 0.1, 0.1, 0, 0], abs=1e-5)


def test_a_shifted_box_comes_first_and_the_objects_place_is_suggested():
    moved = [A[0] + 8, A[1], A[2] + 8, A[3]]  # by 0.4 of the width: IoU = 12 / 28
    found = first(judge_boxes(Seeing(), [scene([B, moved], [A, B])]), "box")
    assert found.index == 1
    assert found.score == pytest.approx(1 - 12 / 28, abs=1e-5)
    assert found.box == pytest.approx(moved, abs=1e-4)
    assert found.suggested_box == pytest.approx(A, abs=1e-4)


def test_a_box_around_nothing_is_spurious():
    found = first(judge_boxes(Seeing(), [scene([A, C], [A, B])]), "spurious")
    assert (found.index, found.score) == (1, 1)
    assert found.suggested_box is found.suggested is None


def test_what_is_not_annotated_is_missing():
    judged = judge_boxes(Seeing(), [scene([A], [A, B, C])])
    missing = [x for x in judged if x.kind == "missing"]
    assert [x.score for x in missing] == pytest.approx([0.9, 0.9, 0], abs=1e-5)
    assert sorted(x.suggested_box for x in missing[:2]) == [B, C]
    assert [x.suggested for x in missing[:2]] in ([1, 2], [2, 1])
    assert all(x.index is x.box is x.label is None for x in missing)


def test_several_detections_of_an_object_are_one():
    near = [x + 1 for x in B]
    judged = judge_boxes(Seeing(), [scene([A], [A, B, near])], kinds=["missing"])
    assert len(judged) == 2


@pytest.mark.parametrize(("annotated", "there"), [([], [A]), ([A], []), ([], [])])
def test_images_without_annotations_or_detections(annotated, there):
    judged = judge_boxes(Seeing(), [scene(annotated, there), scene([A], [A], 1)])
    kinds = [x.kind for x in judged if x.image_id == 0]
    assert kinds == ["box", "spurious"] * len(annotated) + ["missing"] * len(there)
    assert all(x.score == pytest.approx(1) for x in judged if x.image_id == 0 and x.kind == "spurious")


def test_boxes_are_in_pixels_of_the_original_image():
    [record] = scene([A], [A, B])
    judged = judge_boxes(Seeing(), [[record | {"height": 2 * HEIGHT, "width": 3 * WIDTH}]])
    larger = torch.tensor([3.0, 2, 3, 2])
    found = first(judged, "box")
    assert found.score == pytest.approx(0, abs=1e-5)
    assert found.box == pytest.approx((torch.tensor(A) * larger).tolist(), rel=1e-5)
    assert found.suggested_box == pytest.approx(found.box, rel=1e-5)
    assert first(judged, "missing").suggested_box == pytest.approx((torch.tensor(B) * larger).tolist(), rel=1e-5)


@pytest.mark.parametrize("system", DENOISING_SYSTEMS)
def test_real_models_judge_every_annotation_and_keep_their_mode(toy_model, system):
    model = toy_model(system).train()
    loader = []
    for i, record in enumerate(make_batch(2, 0, 3, sizes=((HEIGHT, WIDTH),), num_classes=3)):
        record["instances"].gt_index = torch.arange(len(record["instances"]))
        loader.append([record | {"image_id": i}])
    judged = judge_boxes(model, loader, repeats=2)
    for kind in ("box", "spurious"):
        assert {(x.image_id, x.index) for x in judged if x.kind == kind} == {(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)}
    assert {x.image_id for x in judged if x.kind == "missing"} == {0, 1, 2}
    assert all(0 <= x.score <= 1 for x in judged)
    for kind in ("box", "spurious", "missing"):
        scores = [x.score for x in judged if x.kind == kind]
        assert scores == sorted(scores, reverse=True)
    assert model.training


def test_what_cannot_be_judged_is_refused(toy_model):
    with pytest.raises(ConfigError, match=naming("'colour'", *KINDS)):
        judge_boxes(Seeing(), [], kinds=["colour"])
    with pytest.raises(ConfigError, match=naming("'box'", "class")):
        judge_boxes(toy_model("mask2former"), [])
    with pytest.raises(ConfigError, match=naming("'class'", 2, 1)):
        judge_annotations(toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 1), [], kinds=["class"])
    with pytest.raises(ConfigError, match="no denoising"):
        judge_boxes(toy_model("dab_detr"), [])


def test_boxes_of_a_model_with_masks_are_parts_of_the_padded_image(toy_model, monkeypatch):
    """70 x 100 pixels are padded to 96 x 128. Who restores every box to what it was doubts none."""
    batch = [
        record | {"image_id": i} for i, record in enumerate(make_batch(2, 1, sizes=((70, 100), (64, 90)), masks=True))
    ]
    for record in batch:
        record["instances"].gt_index = torch.arange(len(record["instances"]))

    def restore(bare, batch, *_):
        outputs = bare.forward_outputs(batch, bare.denoising.clean())
        pairs, boxes = outputs.noised.assignment, outputs.predictions.boxes.clone()
        boxes[:, pairs.image, pairs.query[0]] = outputs.denoised.boxes[pairs.image, pairs.target[0]]
        yield replace(outputs, predictions=replace(outputs.predictions, boxes=boxes))

    monkeypatch.setattr("dn_detr_d2.diagnostics.annotation_errors.renoised_passes", restore)
    judged = judge_annotations(toy_model("mask_dino"), [batch], kinds=["box"])
    assert len(judged) == 3
    for found in judged:
        assert found.score == pytest.approx(0, abs=1e-3)
        assert found.suggested_box == pytest.approx(found.box, abs=0.05)


class Told(Seeing):
    """Is told of ``known`` objects, denoises these, and detects the others that are there."""

    def forward_outputs(self, batch, denoising):
        return super().forward_outputs(
            [x | {"instances": x["known"], "there": x["everything"]} for x in batch], denoising
        )


@pytest.mark.parametrize(("unknown", "there", "spurious", "missing"), [
    ([B], [B], 0.1, 0.0), ([B], [], 1.0, None), ([], [B], None, 0.9), ([B], [A, B], 0.1, 0.0),
])  # fmt: skip
def test_known_objects_are_neither_missing_nor_spurious(unknown, there, spurious, missing):
    """``known`` is annotated rightly; ``unknown`` is what is annotated of the classes that the model looks for."""
    [record] = scene([A, *unknown], there)
    annotated = record["instances"]
    record |= {"known": annotated[:1], "instances": annotated[1:], "everything": torch.tensor([A, B])}
    judged = judge_annotations(Told(), [[record]])
    scores = {kind: max((x.score for x in judged if x.kind == kind), default=None) for kind in KINDS}
    assert [x.index for x in judged if x.kind == "box"] == [0]
    assert scores["box"] == pytest.approx(0, abs=1e-4)
    assert scores["spurious"] == (None if spurious is None else pytest.approx(spurious))
    assert scores["missing"] == (None if missing is None else pytest.approx(missing, abs=1e-4))
