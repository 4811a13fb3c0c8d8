"""TEST.COCO_EVAL faster_coco_eval: the numbers of pycocotools."""

import numpy as np
import pytest
import torch
from conftest import ellipses
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from pycocotools import mask as mask_util

from dev import benchmark_evaluation
from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.evaluation import RecordsEvaluator, coco_evaluator
from dn_detr_d2.evaluation.precision_recall import read_precision_recall

SIDE = 60


def objects(rng, count):
    """(count, 4) xyxy boxes and (count,) labels."""
    corner = rng.uniform(0, SIDE * 0.7, (count, 2))
    return np.concatenate([corner, np.minimum(corner + rng.uniform(3, 40, (count, 2)), SIDE)], 1), rng.integers(
        0, 3, count
    )


def scene(seed, images, most, crowds, detections):
    """Records and detections of made-up images; detections are objects that were moved, and others. Scores repeat."""
    rng = np.random.default_rng(seed)
    records, found = [], []
    for i in range(images):
        boxes, labels = objects(rng, rng.integers(0, most + 1))
        masks = ellipses(torch.tensor(boxes), SIDE, SIDE).numpy()
        annotations = [
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(label),
                "iscrowd": int(rng.random() < crowds),
                "segmentation": mask_util.encode(np.asfortranarray(mask.astype(np.uint8))),
            }
            for box, label, mask in zip(boxes, labels, masks, strict=True)
        ]
        records.append({"image_id": i, "height": SIDE, "width": SIDE, "annotations": annotations})
        others = objects(rng, detections)
        near = boxes[rng.integers(0, len(boxes), detections)] if len(boxes) else boxes
        shown = np.concatenate([near + rng.normal(0, 2, near.shape), others[0]])[:detections].clip(0, SIDE)
        shown[:, 2:] = np.maximum(shown[:, 2:], shown[:, :2] + 1)
        instances = Instances((SIDE, SIDE))
        instances.pred_boxes = Boxes(torch.tensor(shown))
        instances.pred_classes = torch.tensor(rng.integers(0, 3, len(shown)))
        instances.scores = torch.tensor(rng.integers(0, 20, len(shown)) / 20)
        instances.pred_masks = ellipses(torch.tensor(shown), SIDE, SIDE)
        found.append(instances)
    return records, found


def results(records, found, computed_by, limit, folder=None):
    names = ["a", "b", "c"]
    options = {"masks": True, "max_detections": limit, "computed_by": computed_by, "output_dir": folder}
    evaluator = RecordsEvaluator(records, names, distributed=False, **options)
    evaluator.reset()
    for record, instances in zip(records, found, strict=True):
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 4),
    most=st.integers(0, 6),
    crowds=st.sampled_from([0.0, 0.3, 1.0]),
    detections=st.integers(0, 30),
    limit=st.sampled_from([0, 11, 25]),
)
def test_the_numbers_are_those_of_pycocotools(seed, images, most, crowds, detections, limit):
    """Boxes and masks, crowds, equal scores, images without objects or detections, other numbers of detections."""
    records, found = scene(seed, images, most, crowds, detections)
    expected, got = (results(records, found, by, limit) for by in ("pycocotools", "faster_coco_eval"))
    assert expected.keys() == got.keys()
    for task, values in expected.items():
        assert got[task] == pytest.approx(values, abs=1e-9, nan_ok=True), task


def test_precision_and_recall_are_kept_by_both(tmp_path):
    records, found = scene(3, 4, 6, 0.1, 20)
    kept = []
    for by in ("pycocotools", "faster_coco_eval"):
        (tmp_path / by).mkdir()
        metrics = results(records, found, by, 0, str(tmp_path / by))
        kept.append(read_precision_recall(tmp_path / by, "segm"))
        assert 100 * kept[-1].mean().mean() == pytest.approx(metrics["segm"]["AP"], abs=1e-4)
    assert kept[0].classes == kept[1].classes == ["a", "b", "c"]
    np.testing.assert_allclose(kept[0].precision, kept[1].precision, atol=1e-7)
    np.testing.assert_allclose(kept[0].scores, kept[1].scores, atol=1e-7)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(coco_evaluator, "is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=naming("TEST.COCO_EVAL", "'faster_coco_eval'")) as caught:
        RecordsEvaluator([], ["a"], computed_by="faster_coco_eval")
    assert "[fast-eval]" in str(caught.value)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=naming("TEST.COCO_EVAL", "'fast'", "'pycocotools'")):
        setup_cfg("", ["TEST.COCO_EVAL", "fast", "MODEL.DN_DETR.NUM_CLASSES", 3])


def test_the_benchmark_compares_all_three(capsys):
    assert benchmark_evaluation.main(["--images", "20", "--detections", "10"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert all(float(row[4]) < 1e-9 for row in rows[1:])
