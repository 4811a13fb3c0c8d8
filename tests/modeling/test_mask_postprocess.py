"""Outputs of mask models: against the authors' numbers, against slow loops, and where an image has nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from detectron2.structures import BitMasks
from golden.formula import recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr_d2 import setup_cfg
from dn_detr_d2.boxes import boxes_of_masks
from dn_detr_d2.errors import ConfigError
from dn_detr_d2.modeling import mask_postprocess
from dn_detr_d2.modeling.mask_postprocess import MaskPostprocess, build_postprocess, instance_output, paste_masks
from dn_detr_d2.modeling.postprocess import Postprocess
from dn_detr_d2.structures import Predictions

CASES = ["mask2former_r50", "mask_dino_r50", "mask_dino_r50_hid1024"]


def predicted(logits, masks, boxes=None):
    """Predictions of one set whose mask logits are ``masks`` (N, Q, h, w): each embedding picks a map of its own."""
    picks = torch.eye(masks.shape[1]).expand(1, len(masks), -1, -1)
    return Predictions(logits[None], None if boxes is None else boxes[None], picks, masks.float())


def random_predictions(seed=0, queries=6, classes=5, boxes=False, size=(6, 8)):
    torch.manual_seed(seed)
    coarse = 4 * torch.randn(2, queries, 3, 4)
    masks = F.interpolate(coarse, size=size, mode="bilinear")
    return predicted(3 * torch.randn(2, queries, classes), masks, torch.rand(2, queries, 4) if boxes else None)


def images(*sizes, **wanted):
    return [{"image": torch.zeros(3, *size)} | wanted for size in sizes]


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """(meta, arrays as tensors, predictions, batched inputs)."""
    meta, arrays = recorded(request.param)
    arrays = {name: torch.from_numpy(x) for name, x in arrays.items()}
    made_up = predicted(arrays["post_logits"], arrays["post_masks"], arrays.get("post_boxes"))
    batch = [
        {"image": torch.zeros(3, *size), "height": height, "width": width}
        for size, (height, width) in zip(meta["image_sizes"], meta["output_sizes"], strict=True)
    ]
    return meta, arrays, made_up, batch


def of(meta, *outputs):
    return MaskPostprocess(
        outputs,
        meta["num_classes"],
        range(meta["num_things"]),
        top_k=meta["detections_per_image"],
        object_threshold=meta["object_mask_threshold"],
        overlap_threshold=meta["overlap_threshold"],
    )


@pytest.mark.parametrize(("name", "outputs"), [("inst", ["instances"]), ("things", ["instances", "panoptic_seg"])])
def test_instances_are_those_of_the_authors(golden, name, outputs):
    meta, arrays, predictions, batch = golden
    for i, output in enumerate(of(meta, *outputs)(predictions, batch)):
        found = output["instances"]
        torch.testing.assert_close(found.scores, arrays[f"post_{name}{i}_scores"], atol=1e-6, rtol=0)
        assert found.pred_classes.tolist() == arrays[f"post_{name}{i}_labels"].tolist()
        assert found.pred_masks.flatten(1).sum(1).tolist() == arrays[f"post_{name}{i}_areas"].tolist()
        if predictions.boxes is not None:
            torch.testing.assert_close(found.pred_boxes.tensor, arrays[f"post_{name}{i}_boxes"], atol=2e-3, rtol=0)


def test_segments_are_those_of_the_authors(golden):
    meta, arrays, predictions, batch = golden
    for i, output in enumerate(of(meta, "panoptic_seg")(predictions, batch)):
        ids, segments = output["panoptic_seg"]
        assert ids.dtype == torch.int32
        assert torch.equal(ids, arrays[f"post_panoptic{i}"].int())
        areas = ids.flatten().bincount().tolist()
        assert [x | {"area": areas[x["id"]]} for x in segments] == meta[f"post_panoptic{i}"]


def test_semantic_maps_are_those_of_the_authors(golden):
    meta, arrays, predictions, batch = golden
    for i, output in enumerate(of(meta, "sem_seg", "instances")(predictions, batch)):
        seen = output["sem_seg"]
        torch.testing.assert_close(seen[:, ::8, ::8], arrays[f"post_semantic{i}"], atol=1e-5, rtol=0)
        if f"post_semantic{i}_argmax_areas" in meta:
            areas = seen.argmax(0).flatten().bincount(minlength=meta["num_classes"])
            assert areas.tolist() == meta[f"post_semantic{i}_argmax_areas"]


def test_a_semantic_output_alone_is_resized_after_the_sum():
    predictions, batch = random_predictions(), images((20, 30), (24, 32), height=40, width=50)
    weights = (predictions.logits[0].sigmoid() / 0.06).softmax(-1)
    maps = F.interpolate(predictions.mask_logits(), scale_factor=4.0, mode="bilinear").sigmoid()
    summed = torch.einsum("nqc,nqhw->nchw", weights, maps)
    for output, one, x in zip(MaskPostprocess(["sem_seg"], 5)(predictions, batch), summed, batch, strict=True):
        height, width = x["image"].shape[1:]
        expected = F.interpolate(one[None, :, :height, :width], size=(40, 50), mode="bilinear")[0]
        torch.testing.assert_close(output["sem_seg"], expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(1, 40))
def test_pasting_a_few_at_a_time_gives_what_all_at_once_would(seed, count, wanted, together):
    torch.manual_seed(seed)
    logits, image_size = 3 * torch.randn(count, 6, 8), (20, 31)
    whole = F.interpolate(logits[None], scale_factor=4.0, mode="bilinear")[:, :, :20, :31]
    whole = F.interpolate(whole, size=wanted, mode="bilinear")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_postprocess, "CHUNK", together * 768)
        masks, means = paste_masks(logits, image_size, wanted)
    assert torch.equal(masks, whole > 0)
    for mean, own in zip(means, whole, strict=True):
        inside = own[own > 0].sigmoid()
        assert mean.item() == pytest.approx(inside.mean().item() if len(inside) else 0, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.3))
def test_boxes_of_masks_are_those_of_detectron2(seed, share):
    masks = torch.from_numpy(np.random.RandomState(seed).rand(4, 7, 9) < share)
    masks[0] = False
    assert boxes_of_masks(masks).tolist() == BitMasks(masks).get_bounding_boxes().tensor.int().tolist()


def test_without_boxes_the_boxes_are_those_of_the_masks():
    output = MaskPostprocess(["instances"], 5, top_k=30)(random_predictions(), images((24, 32), (20, 30)))
    for one in output:
        found = one["instances"]
        assert torch.equal(found.pred_boxes.tensor, BitMasks(found.pred_masks).get_bounding_boxes().tensor)


def test_boxes_are_relative_to_the_padded_image_and_not_clipped():
    predictions = random_predictions(boxes=True)
    predictions.boxes[0, 0, 0] = torch.tensor([0.75, 0.5, 0.5, 1.0])  # of 24 x 32: x 16..32, y 0..24
    predictions.logits[0, 0, 0, 2] = 20.0
    post = MaskPostprocess(["instances"], 5, score_by_mask=False)
    found = post(predictions, images((12, 16), (24, 32), height=24, width=16))[0]["instances"]
    assert found.image_size == (24, 16)
    assert found.pred_classes[0] == 2
    assert found.pred_boxes.tensor[0].tolist() == [16, 0, 32, 48]  # the image is stretched by 2 in height alone


def slow_instances(logits, top_k):
    """(score, query, class) by sorting all pairs; of sigmoid heads, without masks."""
    pairs = [(p, q, c) for q, row in enumerate(logits.sigmoid().tolist()) for c, p in enumerate(row)]
    return sorted(pairs, reverse=True)[:top_k]


@pytest.mark.parametrize("top_k", [1, 7, 1000])  # 1000: more than there are pairs
def test_the_best_pairs_are_kept(top_k):
    predictions = random_predictions(seed=3)
    post = MaskPostprocess(["instances"], 5, top_k=top_k, score_by_mask=False)
    for one, logits in zip(post(predictions, images((24, 32), (24, 32))), predictions.logits[0], strict=True):
        expected = slow_instances(logits, top_k)
        assert one["instances"].scores.tolist() == pytest.approx([x[0] for x in expected])
        assert one["instances"].pred_classes.tolist() == [x[2] for x in expected]
        assert len(one["instances"]) == min(top_k, 30)


def test_scores_descend_and_an_empty_mask_scores_nothing():
    predictions = random_predictions()
    predictions.mask_features[0, 1] = -3.0
    found = MaskPostprocess(["instances"], 5, top_k=30)(predictions, images((24, 32), (24, 32)))[0]["instances"]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    empty = ~found.pred_masks.flatten(1).any(1)
    assert empty.sum() == 5
    assert not found.scores[empty].any()
    assert not found.pred_boxes.tensor[empty].any()


def slow_panoptic(scores, labels, maps, things, threshold):
    """The authors' rule pixel by pixel: maps (n, H, W) of probabilities."""
    ids, segments, stuff = np.zeros(maps.shape[1:], int), [], {}
    owner = (scores[:, None, None] * maps).argmax(0)
    for k, label in enumerate(labels):
        mine, own = owner == k, maps[k] >= 0.5
        if not (mine & own).any() or mine.sum() / own.sum() < threshold:
            continue
        if label in things or label not in stuff:
            segments.append({"id": len(segments) + 1, "isthing": label in things, "category_id": label})
            if label not in things:
                stuff[label] = len(segments)
        ids[mine & own] = len(segments) if label in things else stuff[label]
    return ids, segments


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.6, 0.9]))
def test_segments_are_those_of_a_slow_reference(seed, threshold):
    predictions = random_predictions(seed, queries=9, classes=4)  # few classes, so that stuff joins
    post = MaskPostprocess(["panoptic_seg"], 3, {0}, object_threshold=0.4, overlap_threshold=threshold)
    for i, output in enumerate(post(predictions, images((24, 32), (24, 32)))):
        probability, labels = predictions.logits[0, i].softmax(-1).max(-1)
        kept = (labels < 3) & (probability > 0.4)
        maps = F.interpolate(predictions.mask_logits()[i : i + 1], scale_factor=4.0, mode="bilinear")[0].sigmoid()
        expected = slow_panoptic(
            *(x[kept].numpy() for x in (probability, labels)), maps[kept].numpy(), things={0}, threshold=threshold
        )
        ids, segments = output["panoptic_seg"]
        assert ids.tolist() == expected[0].tolist()
        assert segments == expected[1]


def test_an_image_without_anything():
    predictions = random_predictions(classes=6)
    predictions.logits[..., -1] = 50.0  # no object
    output = MaskPostprocess(mask_postprocess.OUTPUTS, 5, {1, 2})(predictions, images((24, 32), (20, 30)))
    for one, size in zip(output, [(24, 32), (20, 30)], strict=True):
        assert one["panoptic_seg"][0].shape == size
        assert not one["panoptic_seg"][0].any()
        assert one["panoptic_seg"][1] == []
        assert one["sem_seg"].shape == (5, *size)
        assert one["sem_seg"].max() < 1e-6
        assert set(one["instances"].pred_classes.tolist()) <= {1, 2}
    none = instance_output(
        predictions.logits[0, 0],
        predictions.mask_logits()[0],
        None,
        (24, 32),
        (9, 9),
        num_classes=5,
        top_k=3,
        classes=(),
    )
    assert len(none) == 0
    assert none.pred_masks.shape == (0, 9, 9)
    assert none.pred_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("field", ["logits", "boxes", "mask_features"])
def test_predictions_that_are_not_finite(field):
    predictions = random_predictions(boxes=True)
    getattr(predictions, field).view(-1)[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"one\.png"):
        MaskPostprocess(["instances"], 5)(predictions, images((24, 32), (24, 32), file_name="one.png"))


MASKS = ["MODEL.DN_DETR.MASK.ENABLED", True]


def config(*overrides):
    common = ["MODEL.DN_DETR.NUM_CLASSES", 4, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    return setup_cfg(str(ROOT / "configs" / "dn_detr_R50_50ep.yaml"), [*common, *overrides])


def test_the_config_chooses():
    assert isinstance(build_postprocess(config()), Postprocess)
    things = ["MODEL.DN_DETR.MASK.THING_CLASSES", "[0, 3]", "MODEL.DN_DETR.MASK.OUTPUTS", "['panoptic_seg']"]
    post = build_postprocess(config(*MASKS, *things, "TEST.DETECTIONS_PER_IMAGE", 7))
    assert (post.outputs, post.things, post.top_k) == (("panoptic_seg",), {0, 3}, 7)
    assert build_postprocess(config(*MASKS)).things == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [("OUTPUTS", "['masks']"), ("OUTPUTS", "[]"), ("THING_CLASSES", "[4]"), ("THING_CLASSES", "['a']")],
)
def test_outputs_and_things_that_there_are_not(key, value):
    with pytest.raises(ConfigError, match=rf"MASK\.{key}"):
        build_postprocess(config(*MASKS, f"MODEL.DN_DETR.MASK.{key}", value))
