"""Restoration and suspicious labels, with a model that is right by construction and with the real ones."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import DENOISING_SYSTEMS, MASK_SYSTEMS, make_batch
from naming import naming
from torch import nn
from torchvision.ops import box_iou

from dn_detr_d2 import ConfigError, DatasetError, DenoisingGenerator, cxcywh_to_xyxy
from dn_detr_d2.denoising import ContrastiveDenoisingGenerator, DenoisingQueries, QueryDenoising
from dn_detr_d2.diagnostics import judge_labels, measure_restoration
from dn_detr_d2.diagnostics.diagnostic_hooks import describe_health
from dn_detr_d2.modeling.outputs import ForwardOutputs
from dn_detr_d2.structures import Predictions, Targets

PLAIN = DenoisingGenerator(
    num_classes=3, num_groups=4, label_noise_prob=0.5, center_noise_scale=0.4, size_noise_scale=0.4
)
CONTRASTIVE = ContrastiveDenoisingGenerator(
    num_classes=3,
    num_groups=4,
    label_noise_prob=0.5,
    num_queries=0,
    corner_noise_scale=1.0,
    keep_order=False,
    max_queries=4,
)


class Oracle(nn.Module):
    """Knows ``truth`` of each record: says it in layer 1, repeats the noised label in layer 0; boxes stay as noised."""

    def __init__(self, generator=PLAIN):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.denoising, self.decoder = QueryDenoising(generator, dim=8), SimpleNamespace(BOXES=True)

    def forward_outputs(self, batch, denoising):
        boxes, scale = [record["instances"].gt_boxes.tensor for record in batch], torch.tensor([96.0, 64, 96, 64])
        boxes = [(x / scale).view(-1, 2, 2) for x in boxes]
        boxes = [torch.cat([x.mean(1), x[:, 1] - x[:, 0]], 1) for x in boxes]
        noised = denoising.generator(targets := Targets.pad([x["instances"].gt_classes for x in batch], boxes))
        truth = Targets.pad([x["truth"] for x in batch], boxes).labels
        labels = noised.labels.clone()
        pairs = noised.assignment
        labels[pairs.image, pairs.query[0]] = truth[pairs.image, pairs.target[0]]
        logits = torch.stack([self._say(noised.labels), self._say(labels)])
        dn = DenoisingQueries(denoising, targets, noised)
        return ForwardOutputs(None, targets, None, dn, Predictions(logits, noised.boxes.expand(2, -1, -1, -1)))

    @staticmethod
    def _say(labels):
        return nn.functional.one_hot(labels, 4)[..., :3] * 8.0 - 4


def scenes(*counts, flipped=(), masks=False):
    """Batches of one 64 x 96 image each; ``flipped`` lists (image, object) whose annotation is not the truth."""
    batches = []
    for i, record in enumerate(make_batch(*counts, sizes=((64, 96),), num_classes=3, masks=masks)):
        instances = record["instances"]
        truth = instances.gt_classes.clone()
        for _, j in (pair for pair in flipped if pair[0] == i):
            instances.gt_classes[j] = (truth[j] + 1) % 3
        instances.gt_index = torch.arange(len(instances))
        batches.append([record | {"image_id": i, "truth": truth}])
    return batches


@pytest.mark.parametrize("generator", [PLAIN, CONTRASTIVE], ids=["plain", "contrastive"])
def test_restoration_by_an_oracle(generator):
    found = measure_restoration(Oracle(generator), scenes(3, 0, 2, 4), [0.0, 0.4])
    for scale, result in found.items():
        assert result.count == 9 * 4  # near copies of all objects, also where training has a limit on queries
        assert result.accuracy[1] == 1
        assert 0.4 < result.accuracy[0] < 0.95  # noised labels: 2/3 are right on average, the rest is chance of 36
        assert result.iou.tolist() == pytest.approx([result.start_iou] * 2)
        assert (result.start_iou > 0.999) == (scale == 0)
    assert found[0.4].start_iou < 0.9


def test_restored_boxes_are_compared_as_torchvision_does():
    oracle = Oracle()
    [batch] = scenes(4)
    with torch.random.fork_rng():
        result = measure_restoration(oracle, [batch], [0.3])[0.3]
        from dn_detr_d2.diagnostics.denoising_health import renoised_passes

        [seen] = renoised_passes(oracle, batch, 0.5, 0.3, [0])
    pairs = seen.noised.assignment
    noised, clean = seen.noised.boxes[0, pairs.query[0]], seen.targets.boxes[0, pairs.target[0]]
    slow = [
        box_iou(cxcywh_to_xyxy(a)[None], cxcywh_to_xyxy(b)[None]).item() for a, b in zip(noised, clean, strict=True)
    ]
    assert result.start_iou == pytest.approx(sum(slow) / len(slow), abs=1e-6)


def test_neither_order_nor_division_of_the_images_matters():
    loader = scenes(3, 1, 2)
    forward, backward = (measure_restoration(Oracle(), x, [0.4])[0.4] for x in (loader, loader[::-1]))
    assert forward.accuracy.tolist() == backward.accuracy.tolist()
    assert forward.start_iou == pytest.approx(backward.start_iou)


def test_flipped_labels_come_first_with_the_truth_as_suggestion():
    flipped = [(0, 1), (2, 0), (3, 3)]
    loader = scenes(3, 0, 2, 4, flipped=flipped)
    judged = judge_labels(Oracle(), loader)
    assert len(judged) == 9
    assert {(x.image_id, x.index) for x in judged[:3]} == set(flipped)
    for x in judged:
        record = loader[x.image_id][0]
        assert x.label == record["instances"].gt_classes[x.index]
        assert x.box == pytest.approx(record["instances"].gt_boxes.tensor[x.index].tolist(), abs=1e-3)
        assert (x.score > 0) == ((x.image_id, x.index) in flipped)
    assert all(x.suggested == loader[x.image_id][0]["truth"][x.index] for x in judged[:3])
    assert judged[0].score == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item() * 2 - 1)


@pytest.mark.parametrize("seed", range(5))
def test_planted_labels_come_first_though_the_model_errs(seed):
    """200 objects, 20 wrong labels; the model takes 20 other objects for another class and is as sure of it.

    So 20 places are shared by 40: 10 hits on average. By chance it were 2; 5 are two standard deviations below the average.
    """
    places = random.Random(seed).sample([(i, j) for i in range(20) for j in range(10)], 40)
    flipped, mistaken = set(places[:20]), places[20:]
    loader = scenes(*[10] * 20, flipped=flipped)
    for i, j in mistaken:
        loader[i][0]["truth"][j] = (loader[i][0]["truth"][j] + 1) % 3
    judged = judge_labels(Oracle(), sorted(loader, key=lambda batch: -batch[0]["image_id"]))
    first = {(x.image_id, x.index) for x in judged[:40]}
    assert first == set(places)
    assert sum((x.image_id, x.index) in flipped for x in judged[:20]) >= 5


def test_boxes_of_judged_labels_are_in_pixels_of_the_original_image():
    [[record]] = scenes(2)
    judged = judge_labels(Oracle(), [[record | {"height": 128, "width": 288}]])
    for x in judged:
        resized = record["instances"].gt_boxes.tensor[x.index] * torch.tensor([3.0, 2, 3, 2])
        assert x.box == pytest.approx(resized.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("system", "loss"),
    [
        *((system, "focal") for system in DENOISING_SYSTEMS),
        *((system, "softmax") for system in ("dn_detr", "dn_deformable_detr", "encoder_only")),
    ],
)
def test_real_models_can_be_measured(toy_model, system, loss):
    model = toy_model(system, "MODEL.DN_DETR.LOSS.CLASS_LOSS", loss).train()
    loader = scenes(2, 0, 3)
    found = measure_restoration(model, loader, [0.2, 0.8])
    for result in found.values():
        assert result.accuracy.shape == result.iou.shape == (3,)
        assert ((result.iou >= 0) & (result.iou <= 1)).all()
    assert found[0.2].start_iou > found[0.8].start_iou
    judged = judge_labels(model, loader)
    assert len(judged) == 5
    assert [x.score for x in judged] == sorted((x.score for x in judged), reverse=True)
    assert all(x.suggested < 5 for x in judged)  # never "no object"
    assert all(x.label != x.suggested and -1 <= x.score <= 1 for x in judged)
    assert model.training


@pytest.mark.parametrize("system", MASK_SYSTEMS)
def test_models_with_masks_are_measured_by_set_and_without_boxes_by_class_alone(toy_model, system):
    model, loader = toy_model(system), scenes(2, 0, 3, masks=True)
    (found,) = measure_restoration(model, loader, [0.2]).values()
    assert found.accuracy.shape == found.iou.shape == (4,)
    scalars = describe_health({0.2: found})
    assert "denoising/accuracy@0.2" in scalars
    assert ("denoising/iou@0.2" in scalars) == (system != "mask2former")
    if system != "mask2former":
        assert found.iou[0] == pytest.approx(found.start_iou, abs=1e-5)  # the set before the first layer
    assert len(judge_labels(model, loader)) == 5


def test_the_annotated_label_does_not_reach_the_model(toy_model):
    """With two classes the score is p(other) - p(annotated): another annotation of the same scene turns its sign."""
    model, [[record]] = toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 2), scenes(1)
    scores = []
    for label in (0, 1):
        record["instances"].gt_classes = torch.tensor([label])
        [judged] = judge_labels(model, [[record]])
        assert (judged.label, judged.suggested) == (label, 1 - label)
        scores.append(judged.score)
    assert scores[0] == pytest.approx(-scores[1], abs=1e-6)
    assert scores[0] != 0


@pytest.mark.parametrize("measure", [lambda m, x: measure_restoration(m, x, [0.4]), judge_labels])
def test_a_model_without_denoising_is_refused(toy_model, measure):
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.DENOISING.NAME", "''")):
        measure(toy_model("dab_detr"), scenes(1))


def test_one_class_cannot_be_wrong(toy_model):
    with pytest.raises(ConfigError, match=naming(2, 1)):
        judge_labels(toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 1), scenes(1))


def test_restoring_nothing_is_no_measurement():
    with pytest.raises(DatasetError):
        measure_restoration(Oracle(), scenes(0), [0.4])
