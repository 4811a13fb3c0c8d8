"""AP of masks is Detectron2's, from polygons and run lengths; from panoptic maps it is that of the segments."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image
from pycocotools import mask as mask_util

from dn_detr_d2 import DatasetError
from dn_detr_d2.boxes import boxes_of_masks
from dn_detr_d2.data import register_coco_json
from dn_detr_d2.evaluation import RecordsEvaluator, TolerantCOCOEvaluator

HEIGHT, WIDTH = 90, 120


def polygon(dice):
    """An outline [x0, y0, ...] around a centre, partly outside of the image."""
    angles, centre = np.sort(dice.uniform(0, 2 * np.pi, 7)), dice.uniform((0, 0), (WIDTH, HEIGHT))
    around = np.stack([np.cos(angles), np.sin(angles)], 1) * dice.uniform(5, 40, (7, 1))
    return np.round(centre + around, 2).reshape(-1).tolist()


def bits(segmentation):
    runs = mask_util.frPyObjects(segmentation, HEIGHT, WIDTH)
    return mask_util.decode(mask_util.merge(runs) if isinstance(segmentation, list) else runs)


def column_runs(mask):
    """Run lengths as numbers, down the columns, beginning with what lies outside."""
    ends = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=0, append=-1))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(ends, prepend=0).tolist()}


def one_object(dice, number, image):
    """An annotation with polygons, run lengths as numbers or as text, or a crowd."""
    segmentation = [polygon(dice) for _ in range(dice.integers(1, 3))]
    mask, kind = bits(segmentation), dice.integers(4)
    if not mask.any():
        return None
    if kind in (0, 3):
        segmentation = column_runs(mask)
    elif kind == 1:
        segmentation = mask_util.encode(np.asfortranarray(mask))
        segmentation["counts"] = segmentation["counts"].decode()
    box = boxes_of_masks(torch.from_numpy(mask).bool()).tolist()
    return {
        "id": number, "image_id": image, "category_id": int(dice.integers(1, 4)), "segmentation": segmentation,
        "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "area": float(mask.sum()), "iscrowd": int(kind == 3),
    }  # fmt: skip


def detections(dice, annotations):
    """Some of the objects, moved by a few pixels, with any score."""
    masks, labels = [], []
    for x in annotations:
        for _ in range(dice.integers(0, 3)):
            mask = np.roll(mask_of(x), dice.integers(-4, 5, 2), (0, 1))
            if mask.any():
                masks.append(mask)
                labels.append(x["category_id"] - 1 if dice.random() < 0.9 else 0)
    masks = torch.from_numpy(np.array(masks).reshape(-1, HEIGHT, WIDTH)).bool()
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(boxes_of_masks(masks).float()),
        pred_masks=masks,
        scores=torch.from_numpy(np.round(dice.random(len(labels)), 2)).float(),
        pred_classes=torch.tensor(labels, dtype=torch.int64),
    )


def mask_of(annotation):
    segmentation = annotation["segmentation"]
    compressed = isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)
    return mask_util.decode(segmentation) if compressed else bits(segmentation)


@pytest.fixture
def registered(tmp_path, forgotten_sets):
    """registered(annotations of each image) -> name of the data set."""
    names = map("test_masks_{}".format, itertools.count())

    def make(annotations):
        name, folder = next(names), tmp_path
        images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(len(annotations))]
        for image in images:
            Image.new("L", (WIDTH, HEIGHT)).save(folder / image["file_name"])
        categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(("nut", "bolt", "nail"))]
        content = {"images": images, "annotations": list(itertools.chain(*annotations)), "categories": categories}
        file = folder / f"{name}.json"
        file.write_text(json.dumps(content))
        register_coco_json(name, str(file), str(folder))
        return name

    return make


@pytest.mark.parametrize("seed", [0, 1])
def test_ap_of_boxes_and_masks_is_that_of_detectron2(registered, tmp_path, seed):
    dice, numbers = np.random.default_rng(seed), iter(range(1, 1000))
    annotations = [
        [x for _ in range(dice.integers(1, 6)) if (x := one_object(dice, next(numbers), image))] for image in range(8)
    ]
    found = [detections(dice, image) for image in annotations]
    name, results = registered(annotations), []
    for kind, output in ((COCOEvaluator, "theirs"), (TolerantCOCOEvaluator, "ours")):
        evaluator = kind(name, tasks=("bbox", "segm"), output_dir=str(tmp_path / output))
        evaluator.reset()
        for i, instances in enumerate(found):
            evaluator.process([{"image_id": i}], [{"instances": instances}])
        results.append(evaluator.evaluate())
    assert 5 < results[0]["segm"]["AP"] < 95
    for task in ("bbox", "segm"):
        assert results[0][task].keys() == results[1][task].keys()
        np.testing.assert_array_equal(list(results[0][task].values()), list(results[1][task].values()))
    written = [json.loads((tmp_path / x / "coco_instances_results.json").read_text()) for x in ("theirs", "ours")]
    assert sorted(map(repr, written[0])) == sorted(map(repr, written[1]))


def evaluate(records, instances, **options):
    evaluator = RecordsEvaluator(records, ["nut", "bolt", "nail"], masks=True, **options)
    evaluator.reset()
    for record, found in zip(records, instances, strict=True):
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()


def rectangle(label, *boxes):
    """Detections whose masks are rectangles."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)),
        pred_masks=masks,
        scores=torch.arange(len(boxes), 0, -1) / 10,
        pred_classes=torch.full((len(boxes),), label),
    )


def annotation(x0, y0, x1, y1, label=0, **others):
    return {"id": 1, "bbox": [x0, y0, x1, y1], "bbox_mode": 0, "category_id": label, "iscrowd": 0} | others


def test_a_crowd_without_a_mask_is_its_box_and_a_size_comes_from_the_detections():
    outline = [[10, 10, 40, 10, 40, 30, 10, 30]]
    record = {"image_id": 1, "annotations": [annotation(10, 10, 40, 30, segmentation=outline),
                                             annotation(60, 10, 110, 80, iscrowd=1)]}  # fmt: skip
    found = rectangle(0, (62, 12, 70, 20), (10, 10, 40, 30))  # the better one lies in the crowd
    assert evaluate([record], [found])["segm"]["AP"] == pytest.approx(100)
    del record["annotations"][1]
    assert evaluate([record], [found])["segm"]["AP"] == pytest.approx(50)


def test_masks_of_a_panoptic_data_set_are_its_segments(tmp_path):
    ids = np.zeros((HEIGHT, WIDTH), int)
    ids[10:30, 10:40], ids[50:80, 20:90] = 300, 7
    Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(tmp_path / "a.png")
    segments = [annotation(10, 10, 40, 30, id=300), annotation(20, 50, 90, 80, label=2, id=7)]
    record = {"image_id": 1, "annotations": segments, "pan_seg_file_name": str(tmp_path / "a.png")}
    found = rectangle(0, (10, 10, 40, 30))
    results = evaluate([record], [found], only=["nut"])  # of nails, which are stuff here, there are no instances
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    found.pred_masks[:, 20:] = False
    assert evaluate([record], [found], only=["nut"])["segm"]["AP"] == pytest.approx(10)  # half of it: IoU 0.5 alone
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=naming("a.png", (HEIGHT, WIDTH))):
        evaluate([record], [found])


def test_masks_that_cannot_be_evaluated_are_named(registered, caplog):
    caplog.set_level(logging.WARNING)
    record = {"image_id": 1, "annotations": [annotation(10, 10, 40, 30, segmentation=[[1, 2]], id=17)]}
    with pytest.raises(DatasetError, match=naming(17)):
        evaluate([record], [rectangle(0, (10, 10, 40, 30))])


@pytest.mark.parametrize("form", ["polygon", "numbers", "text"])
def test_objects_without_an_area_have_that_of_their_mask(tmp_path, form):
    """A triangle of 861 pixels in a box of 42 x 42 is small, the box would be of middle size."""
    triangle = [[10, 10, 52, 10, 10, 52]]
    runs = mask_util.merge(mask_util.frPyObjects(triangle, HEIGHT, WIDTH))
    mask = mask_util.decode(runs)
    assert mask.sum() < 32**2 < 42**2
    forms = {"polygon": triangle, "numbers": column_runs(mask), "text": runs | {"counts": runs["counts"].decode()}}
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 42, 42], "segmentation": forms[form]}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"area_{tmp_path.name}"
    register_coco_json(name, str(tmp_path / "a.json"), str(tmp_path))
    evaluator = TolerantCOCOEvaluator(name, tasks=("bbox", "segm"))
    evaluator.reset()
    found = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.tensor([[10.0, 10, 52, 52]])), scores=torch.ones(1))
    found.pred_classes, found.pred_masks = torch.zeros(1, dtype=torch.int64), torch.from_numpy(mask)[None].bool()
    evaluator.process([{"image_id": 1, "height": HEIGHT, "width": WIDTH}], [{"instances": found}])
    results = evaluator.evaluate()["segm"]
    assert results["APs"] == pytest.approx(100)
    assert np.isnan(results["APm"])


def test_no_detection_at_all_is_an_ap_of_0(tmp_path):
    """As of a detector with a threshold at the beginning of its training; NaN would look like an evaluation that is not."""
    record = {"image_id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH, "annotations": [
        {"bbox": [5, 5, 10, 10], "bbox_mode": 1, "category_id": 0, "id": 1, "iscrowd": 0}]}  # fmt: skip
    evaluator = RecordsEvaluator([record], ["x"], output_dir=str(tmp_path))
    evaluator.reset()
    none = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    none.pred_classes = torch.zeros(0, dtype=torch.int64)
    evaluator.process([record], [{"instances": none}])
    assert evaluator.evaluate()["bbox"]["AP"] == 0
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
