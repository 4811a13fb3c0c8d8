import hashlib

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from dn_detr_d2.data import records_of, shapes

# SHA-256 over the pixels and boxes of the first 8 training scenes; pins the drawing on every machine and version.
FIRST_SCENES = "b28814c064104e9d580bda7a730a977418eab4b6eb22bf5e205cf52a06a069ec"


@pytest.fixture(scope="module")
def records():
    return DatasetCatalog.get("shapes_val")


def test_the_same_bytes_on_every_machine():
    digest = hashlib.sha256()
    for image_id in range(8):
        pixels, boxes, labels, _ = shapes.draw_scene(shapes.Dice([shapes.SPLITS["shapes_train"][0], image_id]))
        digest.update(pixels.tobytes())
        digest.update(repr((pixels.shape, boxes, labels)).encode())
    assert digest.hexdigest() == FIRST_SCENES


@pytest.mark.parametrize(
    ("value", "root"), [(None, "home/.cache/dn_detr_d2"), ("", "home/.cache/dn_detr_d2"), ("x", "x")]
)
def test_an_empty_cache_variable_is_none(monkeypatch, value, root):
    """It used to be the current folder."""
    monkeypatch.setenv("HOME", "home")
    monkeypatch.delenv("DN_DETR_CACHE")
    if value is not None:
        monkeypatch.setenv("DN_DETR_CACHE", value)
    assert str(shapes.cache_folder().parent) == root


def test_files_hold_what_was_drawn(records):
    pixels, boxes, _, _ = shapes.draw_scene(shapes.Dice([shapes.SPLITS["shapes_val"][0], 3]))
    assert np.array_equal(np.asarray(Image.open(records[3]["file_name"])), pixels)
    assert [a["bbox"][:2] for a in records[3]["annotations"]] == [list(map(float, box[:2])) for box in boxes]


def test_masks_are_of_the_whole_object_as_their_boxes_are():
    objects = [x for record in shapes.load_shapes("shapes_val", masks=True) for x in record["annotations"]]
    runs = [x["segmentation"] | {"counts": x["segmentation"]["counts"].encode()} for x in objects]
    assert mask_util.toBbox(runs).tolist() == [x["bbox"] for x in objects]
    fills = [mask_util.area(run) / (x["bbox"][2] * x["bbox"][3]) for run, x in zip(runs, objects, strict=True)]
    of_class = [np.mean([f for f, x in zip(fills, objects, strict=True) if x["category_id"] == c]) for c in range(3)]
    assert of_class == pytest.approx([np.pi / 4, 1, 0.5], abs=0.02)  # circle, rectangle, triangle


def test_masks_are_read_only_where_they_are_asked_for(records):
    assert not any("segmentation" in x for record in records for x in record["annotations"])
    assert [[x["bbox"] for x in r["annotations"]] for r in records_of("shapes_val", masks=True)] == [
        [x["bbox"] for x in r["annotations"]] for r in records
    ]


def test_scenes_vary_as_described(records):
    counts = [len(r["annotations"]) for r in records]
    assert len(records) == shapes.SPLITS["shapes_val"][1]
    assert min(counts) == 0
    assert max(counts) == shapes.MAX_OBJECTS
    assert {(r["height"], r["width"]) for r in records} == set(shapes.SIZES)
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0, 1, 2}
    sides = [max(a["bbox"][2:]) for r in records for a in r["annotations"]]
    assert min(sides) < 26
    assert max(sides) > 65


def test_boxes_lie_in_their_image_and_touch_their_object(records):
    for record in records:
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert x >= 0
            assert y >= 0
            assert w > 0
            assert h > 0
            assert x + w <= record["width"]
            assert y + h <= record["height"]


def test_train_and_val_differ():
    first = [shapes.draw_scene(shapes.Dice([seed, 0]))[0] for seed, _ in shapes.SPLITS.values()]
    assert first[0].shape != first[1].shape or not np.array_equal(*first)


class Loaded(shapes.Dice):
    """Dice that fall as told."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def integers(self, low, high=None, size=None):
        return next(self.numbers)


@pytest.mark.parametrize(
    ("label", "throws", "rows"),
    [
        (0, (4, 1, 0), [2, 4, 4, 2]),  # circle of diameter 4 with its corner at (1, 0)
        (1, (4, 50, 1, 0), [4, 4]),  # rectangle 4 wide and half as high
        (2, (4, 100, 1, 0, 1), [2, 2, 4, 4]),  # triangle, apex up: half as wide at half its height
    ],
)
def test_worked_objects(label, throws, rows, monkeypatch):
    monkeypatch.setattr(shapes, "SIDES", (2, 8))
    mask, box = shapes.draw_object(Loaded(*throws), label, 8, 8)
    filled = mask.sum(1)[: len(rows)].tolist()
    assert filled == rows
    assert mask.sum() == sum(rows)
    assert box == (1, 0, 5, len(rows))


def test_an_object_never_hides_most_of_another():
    owner = np.zeros((4, 4), int)
    owner[:2] = 1
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    assert shapes.hides_too_much(owner, mask, [8])  # half of it
    mask[0, :2] = False
    assert not shapes.hides_too_much(owner, mask, [8])  # a quarter


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_scene", lambda rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shapes.generate(tmp_path / "split", 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_there_before_the_images():
    metadata = MetadataCatalog.get("shapes_train")
    assert metadata.thing_classes == list(shapes.CLASSES)
    assert metadata.evaluator_type == "coco"
