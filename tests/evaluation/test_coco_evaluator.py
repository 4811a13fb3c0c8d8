"""The law of evaluation: perfect predictions for a file that is accepted have AP 100; and Detectron2's numbers otherwise."""

import contextlib
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.commands import check as check_dataset
from dn_detr_d2.data import records_of, register_coco_json
from dn_detr_d2.data.check import annotated_sizes, check_content
from dn_detr_d2.data.coco_custom import load_with_categories, read_content
from dn_detr_d2.data.issues import Issue, Severity
from dn_detr_d2.data.normalise import objects_of
from dn_detr_d2.data.report import Report
from dn_detr_d2.engine import Trainer
from dn_detr_d2.evaluation import RecordsEvaluator, TolerantCOCOEvaluator

ODD = Path(__file__).resolve().parent.parent / "data" / "odd_files"
SIZES = {"a.png": (48, 64), "b.png": (100, 40), "c é 图.png": (480, 640), "d.png": (1, 3)}  # (height, width)


def instances(size, boxes, labels, scores=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores, dtype=torch.float32)
    return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=torch.tensor(labels, dtype=torch.int64))


def usable(annotation, size):
    """The corners of a box that training uses, in plain arithmetic; None for any other."""
    box = [float(x) for x in annotation["bbox"]]
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    corners = np.float32(box).tolist()
    x0, y0, x1, y1 = corners
    height, width = size
    if annotation.get("iscrowd") or not all(map(math.isfinite, corners)) or x1 <= x0 or y1 <= y0:
        return None
    inside = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    return (corners, inside) if inside[2] > inside[0] and inside[3] > inside[1] else None


def oracle(evaluator, records, clipped, sizes=None):
    """(results, classes that have objects) of perfect predictions, as annotated or clipped to the image."""
    evaluator.reset()
    present = set()
    for record in records:
        size = (sizes or SIZES)[Path(record["file_name"]).name]
        pairs = [(usable(x, size), x["category_id"]) for x in record.get("annotations", [])]
        found = [(boxes[clipped], label) for boxes, label in pairs if boxes]
        present |= {label for _, label in found}
        predicted = instances(size, [box for box, _ in found], [label for _, label in found])
        image = {"image_id": record["image_id"], "height": size[0], "width": size[1]}
        evaluator.process([image], [{"instances": predicted}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate(), present


def assert_perfect(records, names, sizes=None, **options):
    for clipped in (0, 1):
        evaluator = RecordsEvaluator(records, names, detections_per_image=300, **options)
        results, present = oracle(evaluator, records, clipped, sizes)
        if not present:
            continue
        assert results["bbox"]["AP"] == pytest.approx(100, abs=1e-9)
        if len(names) > 1:
            for label in present:
                assert results["bbox"][f"AP-{names[label]}"] == pytest.approx(100, abs=1e-9)


IMAGE_IDS = [0, 1, "a1", 2**60, -3, 7.0, "7x", "ü"]
CATEGORY_IDS = [0, 5, 2.0, "x", 10**12]
POSITION = st.sampled_from([10, 0, 0.5, 2, 30, 39.5, 600.25, 5e-4, -3])
LENGTH = st.sampled_from([12, 1, 2.5, 9.75, 300, 1e-3, 0.3])
BOX = st.tuples(POSITION, POSITION, LENGTH, LENGTH).map(list)
ODD_BOX = st.tuples(POSITION, POSITION, LENGTH, st.sampled_from([0, -2, float("nan"), 1e400, 10**400])).map(list)


@st.composite
def files(draw):
    """Annotation files with what files of users have."""
    image_ids = draw(st.permutations(IMAGE_IDS))[: draw(st.integers(1, 4))]
    category_ids = draw(st.permutations(CATEGORY_IDS))[: draw(st.integers(1, 4))]
    images = []
    for identifier, (name, (height, width)) in zip(image_ids, SIZES.items(), strict=False):
        known = [{"height": height, "width": width}, {"height": float(height), "width": width}, {"width": width}]
        size = draw(st.sampled_from([*known, {}, {"height": -1, "width": -1}, {"height": None, "width": 0}]))
        images.append({"id": identifier, "file_name": name} | size)
    entry = st.fixed_dictionaries(
        {
            "image_id": st.sampled_from([*image_ids, *image_ids, *image_ids, 999, None]),
            "category_id": st.sampled_from(category_ids),
            "bbox": st.integers(0, 9).flatmap(lambda i: ODD_BOX if i == 9 else BOX),
        },
        optional={
            "area": st.sampled_from([None, "704", -1, 0, 5, 1e12, 1e400, float("nan"), 10**400, True, []]),
            "iscrowd": st.sampled_from([0, None, False, 0.0, 0, 0, 1, True, 1.0]),
            "segmentation": st.sampled_from([[], None, [[1, 2]], "x"]),
        },
    )  # fmt: skip
    annotations = draw(st.lists(entry, min_size=draw(st.sampled_from([4, 1, 0])), max_size=9))
    annotations += [dict(x) for x in annotations[:1]] * draw(st.sampled_from([0, 0, 1, 130]))
    annotations = [x | {"id": draw(st.sampled_from([i, float(i)])) if i < 5 else i} for i, x in enumerate(annotations)]
    names = draw(st.permutations(["nut", "bolt", "hex ü", "7", "7" if draw(st.booleans()) else "nail"]))
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, names, strict=False)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(path / name)
    return path


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=files(), bom=st.booleans())
def test_oracle_perfect_predictions_for_every_accepted_file_have_ap_100(folder, content, bom):
    logging.disable(logging.WARNING)
    path = folder / "set.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig" if bom else "utf-8")
    report, read = Report(), read_content(path)
    listed = objects_of(read, "images")
    sizes = annotated_sizes(listed)
    for row, image in zip(
        sizes, listed, strict=True
    ):  # the reader looks into the files where the sizes are not annotated
        if np.isinf(row).any() and image.get("file_name") in SIZES:
            row[:] = SIZES[image["file_name"]]
    check_content(read, report, sizes)
    stopping = {kind for kind in report.counts if kind.severity is Severity.STOPS} - {Issue.NOTHING, Issue.ALL_CROWDS}
    try:
        if stopping:
            with pytest.raises(DatasetError):
                load_with_categories(path, folder)
            return
        records, categories = load_with_categories(path, folder)
        assert_perfect(records, list(categories.values()))
    finally:
        logging.disable(logging.NOTSET)


def random_set(seed, classes, images, objects, crowds=0.1):
    """A file without faults, and noisy detections: {image id: (boxes, labels, scores)}."""
    dice = np.random.default_rng(seed)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 3 * i + 1, "name": f"class {i}"} for i in range(classes)]
    found = {}
    for image in range(images):
        content["images"].append({"id": 1000 - image, "file_name": f"{image}.png", "width": 640, "height": 480})
        boxes, labels = [], []
        for _ in range(dice.integers(0, objects)):
            x, y = dice.uniform(0, 500), dice.uniform(0, 350)
            box = np.round([x, y, *dice.uniform(1, 120, 2)], 2).tolist()
            label = int(dice.integers(classes))
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": 1000 - image, "category_id": 3 * label + 1, "bbox": box,
                 "area": round(box[2] * box[3] * float(dice.uniform(0.4, 1)), 2), "iscrowd": int(dice.random() < crowds)}
            )  # fmt: skip
            for _ in range(dice.integers(0, 3)):
                moved = np.array(box) + dice.normal(0, 4, 4)
                boxes.append([moved[0], moved[1], moved[0] + abs(moved[2]) + 1, moved[1] + abs(moved[3]) + 1])
                labels.append(label if dice.random() < 0.9 else int(dice.integers(classes)))
        found[1000 - image] = (boxes, labels, np.round(dice.random(len(boxes)), 2).tolist())
    return content, found


@pytest.fixture
def registered(tmp_path):
    """registered(content) -> name of a data set whose images exist."""
    names = []

    def make(content, folder=tmp_path):
        names.append(f"evaluated_{tmp_path.name}_{len(names)}")
        for image in content["images"]:
            if not (folder / image["file_name"]).is_file():
                Image.new("1", (image["width"], image["height"])).save(folder / image["file_name"])
        (tmp_path / f"{names[-1]}.json").write_text(json.dumps(content))
        register_coco_json(names[-1], str(tmp_path / f"{names[-1]}.json"), str(folder))
        return names[-1]

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(("seed", "classes", "crowds"), [(0, 80, 0.1), (1, 3, 0.5), (2, 1, 0)])
def test_evaluator_gives_the_numbers_and_the_file_of_detectron2(registered, tmp_path, seed, classes, crowds):
    content, found = random_set(seed, classes, 12, 25, crowds)
    name = registered(content)
    results = []
    for kind, output in ((COCOEvaluator, "theirs"), (TolerantCOCOEvaluator, "ours")):
        evaluator = kind(name, tasks=("bbox",), output_dir=str(tmp_path / output))
        evaluator.reset()
        for image, (boxes, labels, scores) in found.items():
            predicted = instances((480, 640), boxes, labels, scores)
            evaluator.process([{"image_id": image}], [{"instances": predicted}])
        results.append(evaluator.evaluate()["bbox"])
    assert results[0].keys() == results[1].keys()
    np.testing.assert_array_equal(list(results[0].values()), list(results[1].values()))
    assert 5 < results[0]["AP"] < 95
    written = [json.loads((tmp_path / x / "coco_instances_results.json").read_text()) for x in ("theirs", "ours")]
    assert sorted(map(repr, written[0])) == sorted(map(repr, written[1]))


def test_evaluator_averages_over_the_classes_that_are_asked_for(registered):
    """The mean of their AP of each class; detections and objects of the others count nowhere."""
    content, found = random_set(0, 5, 12, 25, 0.1)
    name, results = registered(content), {}
    names = MetadataCatalog.get(name).thing_classes
    for only in ([], names[3:4], [names[4], names[1]]):
        evaluator = TolerantCOCOEvaluator(name, only=only)
        evaluator.reset()
        for image, (boxes, labels, scores) in found.items():
            evaluator.process([{"image_id": image}], [{"instances": instances((480, 640), boxes, labels, scores)}])
        results[tuple(only)] = evaluator.evaluate()["bbox"]
    every = results[()]
    for only in ([names[3]], [names[4], names[1]]):
        part = results[tuple(only)]
        assert part["AP"] == pytest.approx(np.mean([every[f"AP-{x}"] for x in only]))
        assert {key for key in part if key.startswith("AP-")} == ({f"AP-{x}" for x in only} if len(only) > 1 else set())
    assert len({x["AP"] for x in results.values()}) == 3
    with pytest.raises(DatasetError, match=naming("'nut'", name, "TEST.AP_CLASSES")):
        TolerantCOCOEvaluator(name, only=[names[0], "nut"])


def test_evaluator_counts_more_than_100_objects_of_one_class_and_says_so(tmp_path, caplog):
    Image.new("RGB", (300, 200)).save(tmp_path / "0.png")
    records, categories = load_with_categories(ODD / "dense.json", tmp_path)
    names, sizes = list(categories.values()), {"0.png": (200, 300)}
    assert_perfect(records, names, sizes, name="dense")
    assert any(naming(150, 300).search(message) for message in caplog.messages)
    by_coco = RecordsEvaluator(records, names, detections_per_image=300, max_detections=100)
    results, _ = oracle(by_coco, records, 0, sizes)
    assert results["bbox"]["AP"] == pytest.approx(
        100 * 67 / 101, abs=1e-6
    )  # recalls 0, 0.01 .. 0.66 of 101 reach 100 / 150
    caplog.clear()
    RecordsEvaluator(records, names, detections_per_image=120)
    assert any(naming("DETECTIONS_PER_IMAGE", 120).search(message) for message in caplog.messages)


@pytest.mark.parametrize("value", [-1, 5, 10])
def test_evaluator_limits_that_make_no_sense_are_refused(toy_cfg, value):
    with pytest.raises(ConfigError, match=naming("MAX_DETECTIONS_EVALUATED", 10)):
        toy_cfg("dn_detr", "TEST.MAX_DETECTIONS_EVALUATED", value)


def test_evaluator_leaves_out_what_no_detection_can_match_and_counts_it(folder, caplog):
    box = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    boxes = [[5, 5, 10, 10], [5, 5, 0, 10], [70, 5, 3, 3], [float("nan"), 0, 5, 5], [50, 30, 100, 100]]
    record = {"file_name": "a.png", "image_id": 1, "annotations": [box | {"bbox": x} for x in boxes]}
    assert_perfect([record], ["nut"])  # the size of the image is that of the detections
    text = " ".join(caplog.messages)
    assert all(f"1 x {kind}" in text for kind in (Issue.NOT_FINITE, Issue.NOT_POSITIVE, Issue.BOX_OUTSIDE))


def test_evaluator_takes_records_of_a_function_of_the_user(tmp_path):
    name = f"own_{tmp_path.name}"
    entry = {"bbox": np.array([2, 3, 20, 30]), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    other = {"bbox": (2, 3, 20, 30), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = [
        {"file_name": name, "image_id": i, "height": h, "width": w, "annotations": [entry, other]}
        for i, (name, (h, w)) in zip(("x", 5), list(SIZES.items())[1:3], strict=True)
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["nut", "bolt"])
    try:
        results, present = oracle(TolerantCOCOEvaluator(name), records_of(name), 0)
        assert present == {0, 1}
        assert results["bbox"]["AP-nut"] == results["bbox"]["AP-bolt"] == pytest.approx(100)
        evaluator = RecordsEvaluator(records)  # nobody says how many classes there are: the model may know more
        evaluator.reset()
        for record in records:
            predicted = instances((record["height"], record["width"]), [[2, 3, 20, 30], [2, 3, 22, 33]], [1, 7])
            evaluator.process([{"image_id": record["image_id"]}], [{"instances": predicted}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(50)  # of class 1, nothing of class 0
        again = [records[0], records[0]]
        with pytest.raises(DatasetError, match=naming("image_id", "'x'")):
            RecordsEvaluator(again)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_evaluator_without_annotations_writes_the_predictions_alone(registered, tmp_path, toy_cfg):
    content, found = random_set(0, 2, 2, 9)
    del content["annotations"]
    name = registered(content)
    cfg = toy_cfg("dn_detr", "OUTPUT_DIR", str(tmp_path / "out"))
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.reset()
    for image in found:
        predicted = instances((480, 640), [[1, 2, 30, 40]], [1])
        evaluator.process([{"image_id": image}], [{"instances": predicted}])
    assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert sorted((x["image_id"], x["category_id"]) for x in written) == [(999, 4), (1000, 4)]


# Files that users of other trainers report: whether they are read as they are, and else what the sentence must name.
PICTURES = {f"pic_{i}.jpg": (80, 96) for i in range(4)}
READ = [
    *("ok", "area_null", "area_str", "area_neg", "bom", "mixid", "iscrowd_null", "floatcat", "size_neg", "size_half"),
    *("dupkey", "supercat_same", "orphan", "allcrowd", "noannkey_val", "abs_inside", "bbox_negsize", "valsubset_val"),
    "valswap_val",
]
REFUSED = {"catstr_vs_int": (), "bbox_norm": ("--boxes", "xywh-normalised")}


@pytest.fixture
def odd(tmp_path):
    """odd(name) -> path of an odd file beside its images."""
    for name in PICTURES:
        Image.new("RGB", (96, 80)).save(tmp_path / name)

    def make(name):
        path = tmp_path / f"{name}.json"
        path.write_bytes((ODD / path.name).read_bytes().replace(b"IMAGE_FOLDER", str(tmp_path).encode()))
        return path

    return make


@pytest.mark.parametrize("name", [*READ, *REFUSED])
def test_oracle_on_odd_files_as_they_are_and_repaired(odd, tmp_path, name):
    path = odd(name)
    if name in REFUSED:
        with pytest.raises(DatasetError, match="--fix"):
            load_with_categories(path, tmp_path)
    else:
        records, categories = load_with_categories(path, tmp_path)
        assert_perfect(records, list(categories.values()), PICTURES)
    fixed = tmp_path / "fixed.json"
    code = check_dataset.main([str(path), str(tmp_path), "--fix", str(fixed), *REFUSED.get(name, ())])
    assert code == (name in ("allcrowd", "noannkey_val"))
    records, categories = load_with_categories(fixed, tmp_path)
    assert_perfect(records, list(categories.values()), PICTURES)
    boxes = sum(len(record.get("annotations", [])) for record in records)
    assert boxes >= (3 if name == "valsubset_val" else 0 if name == "noannkey_val" else 6)
    assert not any(Path(image["file_name"]).is_absolute() for image in json.loads(fixed.read_text())["images"])


def test_oracle_files_cover_the_catalogue():
    assert {path.stem for path in ODD.glob("*.json")} == {*READ, *REFUSED, "dense"}
