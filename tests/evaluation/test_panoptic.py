"""Panoptic quality against numbers by hand and a slow reference, and the mean IoU of both kinds of maps."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image
from ranks import on_ranks

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.evaluation import PanopticEvaluator, SemanticEvaluator, panoptic_evaluator

NAMES, THINGS = ["person", "car", "sky", "road"], {0, 1}


def write_png(path, ids):
    ids = np.asarray(ids)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def segment(number, label, crowd=0):
    return {"id": number, "category_id": label, "iscrowd": crowd}


def evaluated(folder, truth, predicted, **options):
    """The result for images of (ids, segments) each."""
    records, inputs, outputs = [], [], []
    for i, ((ids, segments), (found, parts)) in enumerate(zip(truth, predicted, strict=True)):
        write_png(folder / f"{i}.png", ids)
        files = {"file_name": f"{i}.jpg", "pan_seg_file_name": str(folder / f"{i}.png")}
        records.append(files | {"image_id": i, "segments_info": segments})
        inputs.append({"image_id": i, "file_name": f"{i}.jpg"})
        outputs.append({"panoptic_seg": (torch.tensor(np.asarray(found), dtype=torch.int32), parts)})
    evaluator = PanopticEvaluator(records, NAMES, THINGS, **options)
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()["panoptic_seg"]


# Persons of 6 and 4 pixels, 8 of sky, 2 that nobody has annotated; of one person 5 pixels are found, of the other 2, of
# the sky all and the 2. IoU 5/6; 2/4, no match; 8/8.
TRUTH = ([[1] * 6 + [300] * 4 + [2] * 8 + [0] * 2], [segment(1, 0), segment(2, 2), segment(300, 0)])
FOUND = ([[1] * 5 + [0] + [2] * 2 + [0] * 2 + [3] * 10], [segment(1, 0), segment(2, 0), segment(3, 2)])


def test_panoptic_quality_by_hand(tmp_path):
    found = evaluated(tmp_path, [TRUTH], [FOUND])
    person = {"PQ": 5 / 6 / (1 + 0.5 + 0.5), "SQ": 5 / 6, "RQ": 1 / 2}  # one match, one person not found, one wrong
    for name, value in person.items():
        assert found[f"{name}_th"] == pytest.approx(100 * value)
        assert found[f"{name}_st"] == pytest.approx(100)
        assert found[name] == pytest.approx(100 * (value + 1) / 2)  # cars and roads do not occur


@pytest.mark.parametrize(
    ("label", "on_crowd", "elsewhere", "counts"),
    [(0, 3, 1, False), (0, 2, 2, True), (1, 3, 1, True)],
    ids=["mostly on the crowd", "half on the crowd", "of another class"],
)
def test_what_lies_on_a_crowd_of_its_class_is_no_error(tmp_path, label, on_crowd, elsewhere, counts):
    truth = ([[7] * 5 + [2] * 5], [segment(7, 0, crowd=1), segment(2, 2)])
    predicted = ([[0] * (5 - on_crowd) + [1] * on_crowd + [1] * elsewhere + [2] * (5 - elsewhere)],
                 [segment(1, label), segment(2, 2)])  # fmt: skip
    found = evaluated(tmp_path, [truth], [predicted])
    assert found["PQ_st"] == pytest.approx(100 * (5 - elsewhere) / 5)
    if counts:
        assert found["PQ_th"] == 0
    else:
        assert np.isnan(found["PQ_th"])  # no thing is to be found, and none was found wrongly


def slow_quality(truth, predicted):
    """The rule of panopticapi, segment by segment with sets of pixels."""
    counts = np.zeros((len(NAMES), 4))  # sum of IoU, matches, wrong ones, missing ones
    for (ids, annotated), (found, segments) in zip(truth, predicted, strict=True):
        ids, found = (np.asarray(x).flatten().tolist() for x in (ids, found))
        at = lambda all_ids, number: {p for p, x in enumerate(all_ids) if x == number}  # noqa: E731
        empty, matched = at(ids, 0), set()
        for true in annotated:
            mine, hit = at(ids, true["id"]), False
            for part in segments:
                own = at(found, part["id"])
                union = (own | mine) - (empty & own)
                if true["category_id"] == part["category_id"] and not true["iscrowd"] and mine & own:
                    iou = len(mine & own) / len(union)
                    if iou > 0.5:
                        counts[true["category_id"]] += [iou, 1, 0, 0]
                        matched.add(part["id"])
                        hit = True
            if mine and not hit and not true["iscrowd"]:
                counts[true["category_id"], 3] += 1
        for part in segments:
            own, label = at(found, part["id"]), part["category_id"]
            crowds = [at(ids, x["id"]) for x in annotated if x["iscrowd"] and x["category_id"] == label][-1:]
            if own and part["id"] not in matched and len(own & empty.union(*crowds)) <= len(own) / 2:
                counts[label, 2] += 1
    occurs = counts[:, 1:].sum(1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        quality = counts[:, 0] / (counts[:, 1] + counts[:, 2] / 2 + counts[:, 3] / 2)
    return {
        name: 100 * quality[occurs & kind].mean() if (occurs & kind).any() else np.nan
        for name, kind in {"PQ": np.full(4, True), "PQ_th": np.arange(4) < 2, "PQ_st": np.arange(4) > 1}.items()
    }


def random_segments(dice, numbers):
    """Segments of these ids; of stuff several a class, which COCO has not."""
    labels = [int(dice.integers(4)) for _ in numbers]
    return [segment(x, label, int(label < 2 and dice.random() < 0.3)) for x, label in zip(numbers, labels, strict=True)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_panoptic_quality_is_that_of_a_slow_reference(tmp_path_factory, seed):
    dice, truth, predicted = np.random.default_rng(seed), [], []
    for _ in range(2):
        numbers = [3, 4, 500, 70000, 9]
        ids = np.repeat(np.repeat(dice.choice([0, *numbers], (3, 4)), 3, 0), 3, 1)
        annotated = [x for x in random_segments(dice, numbers) if x["id"] in ids]
        found = np.where(dice.random(ids.shape) < 0.25, dice.choice(numbers, ids.shape), ids)
        found[dice.random(ids.shape) < 0.1] = 0
        segments = [x | {"iscrowd": 0} for x in annotated if dice.random() < 0.8]
        truth.append((ids, annotated))
        predicted.append((found, [x for x in segments if x["id"] in found]))
    found = evaluated(tmp_path_factory.mktemp("maps"), truth, predicted)
    for name, value in slow_quality(truth, predicted).items():
        assert found[name] == pytest.approx(value, nan_ok=True), name


def test_classes_in_another_order_and_those_that_the_data_set_lacks(tmp_path):
    order = ["road", "person", "tree", "sky"]
    ids, segments = FOUND
    moved = (ids, [x | {"category_id": order.index(NAMES[x["category_id"]])} for x in segments])
    assert evaluated(tmp_path, [TRUTH], [moved], model_classes=order) == evaluated(tmp_path, [TRUTH], [FOUND])
    moved[1][2]["category_id"] = 2  # a tree, which there is none of: the sky is not found
    assert evaluated(tmp_path, [TRUTH], [moved], model_classes=order)["PQ_st"] == 0


def evaluate_one_image_a_rank(folder):
    rank = torch.distributed.get_rank()
    records = json.loads((folder / "records.json").read_text())
    evaluator = PanopticEvaluator(records, NAMES, THINGS)
    evaluator.process([records[rank]], [{"panoptic_seg": (torch.tensor(FOUND[0]), FOUND[1])}])
    found = evaluator.evaluate()
    semantic = SemanticEvaluator(records, NAMES)
    semantic.reset()
    semantic.process([records[rank]], [{"sem_seg": torch.eye(4)[:, TRUTH_LABELS][:, None]}])
    both = semantic.evaluate()
    assert (found is None) == (both is None) == (rank == 1)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps([found, both["sem_seg"]["mIoU"]]))


TRUTH_LABELS = [0] * 10 + [2] * 10


def test_two_ranks_give_what_one_gives(tmp_path):
    write_png(tmp_path / "0.png", TRUTH[0])
    files = {"pan_seg_file_name": str(tmp_path / "0.png"), "segments_info": TRUTH[1]}
    (tmp_path / "records.json").write_text(
        json.dumps([files | {"image_id": i, "file_name": f"{i}.jpg"} for i in range(2)])
    )
    on_ranks(evaluate_one_image_a_rank, tmp_path)
    found, mean = json.loads((tmp_path / "found.json").read_text())
    assert found["panoptic_seg"] == pytest.approx(evaluated(tmp_path, [TRUTH] * 2, [FOUND] * 2))
    assert mean == 100


def test_what_cannot_be_evaluated_is_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=naming("0.png", (1, 20), (2, 10))):
        evaluated(tmp_path, [TRUTH], [(np.reshape(FOUND[0], (2, 10)), FOUND[1])])
    for kind, what in ((PanopticEvaluator, [NAMES, THINGS]), (SemanticEvaluator, [NAMES])):
        with pytest.raises(DatasetError, match=naming("a.jpg", "MASK.OUTPUTS")):
            kind([{"image_id": 1, "file_name": "a.jpg"}], *what)
    write_png(tmp_path / "a.png", TRUTH[0])
    record = {"image_id": 1, "pan_seg_file_name": str(tmp_path / "a.png"), "segments_info": TRUTH[1]}
    with pytest.raises(DatasetError, match=naming(1, 0)):
        PanopticEvaluator([record], NAMES, THINGS).evaluate()  # nothing was seen
    monkeypatch.setattr(panoptic_evaluator, "is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=naming("pip install torchmetrics")):
        PanopticEvaluator([record], NAMES, THINGS)
    assert importlib.util.find_spec("torchmetrics")


def test_segments_of_stuff_match_one_by_one(tmp_path):
    """Two halves of sky, found as one: each has an IoU of one half, which is no match."""
    truth = ([[1] * 10 + [2] * 10], [segment(1, 2), segment(2, 2)])
    assert evaluated(tmp_path, [truth], [([[5] * 20], [segment(5, 2)])])["PQ"] == 0
    assert evaluated(tmp_path, [truth], [truth])["PQ"] == 100


def test_a_pixel_of_a_class_beyond_the_last_is_an_error(tmp_path):
    for highest in (4, 7):
        Image.fromarray(np.array([[0, 1, 255, highest]], np.uint8)).save(tmp_path / "a.png")
        record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}
        with pytest.raises(DatasetError, match=naming("a.png", highest, 4)):
            semantic([record], [{"sem_seg": torch.ones(4, 1, 4)}])


def test_predictions_of_pixels_have_the_ids_of_the_data_set(tmp_path):
    write_png(tmp_path / "a.png", TRUTH[0])
    record = {"file_name": "a.jpg", "pan_seg_file_name": str(tmp_path / "a.png"), "segments_info": TRUTH[1]}
    predicted = torch.eye(4)[:, [0] * 8 + [3] * 4 + [2] * 6 + [1] * 2][:, None]
    semantic([record], [{"sem_seg": predicted}], output_dir=str(tmp_path), category_ids={0: 7, 1: 92, 2: 200, 3: 5})
    written = json.loads((tmp_path / "sem_seg_predictions.json").read_text())
    assert {x["category_id"] for x in written} == {7, 92, 200, 5}


def semantic(records, sem_seg, **options):
    evaluator = SemanticEvaluator(records, NAMES, **options)
    evaluator.reset()
    evaluator.process(records, sem_seg)
    return evaluator.evaluate()["sem_seg"]


def test_the_mean_iou_by_hand(tmp_path):
    """From a semantic map, from the panoptic map that says the same, and with the channels in another order."""
    predicted = torch.eye(4)[:, [0] * 8 + [3] * 4 + [2] * 6 + [1] * 2][:, None]  # (4, 1, 20)
    labels = np.array([TRUTH_LABELS[:18] + [255] * 2], np.uint8)
    Image.fromarray(labels).save(tmp_path / "semantic.png")
    write_png(tmp_path / "panoptic.png", TRUTH[0])
    records = [
        {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "semantic.png")},
        {"file_name": "a.jpg", "pan_seg_file_name": str(tmp_path / "panoptic.png"), "segments_info": TRUTH[1]},
    ]
    for record in records:
        found = semantic([record], [{"sem_seg": predicted}])
        assert found["IoU-person"] == pytest.approx(100 * 8 / 10)
        assert found["IoU-sky"] == pytest.approx(100 * 6 / 8)
        assert found["mIoU"] == pytest.approx(100 * (8 / 10 + 6 / 8) / 2)
        assert found["pACC"] == pytest.approx(100 * 14 / 18)
        assert np.isnan(found["IoU-car"])
        order = ["sky", "tree", "person", "car", "road"]
        moved = torch.stack([predicted[2], 0.5 * torch.ones(1, 20), predicted[0], predicted[1], predicted[3]])
        again = semantic([record], [{"sem_seg": moved}], model_classes=order)
        assert again == pytest.approx(found, nan_ok=True)


def test_semantic_maps_that_do_not_fit(tmp_path):
    Image.fromarray(np.array([[0, 1, 7]], np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}
    with pytest.raises(DatasetError, match=naming("a.png", 7, 4)):
        semantic([record], [{"sem_seg": torch.zeros(4, 1, 3)}])
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=naming("a.png", (1, 3), (3, 1))):
        semantic([record], [{"sem_seg": torch.zeros(4, 3, 1)}])
