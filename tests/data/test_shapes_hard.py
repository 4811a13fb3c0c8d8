"""The harder embedded data set: what is drawn is what its description says, on every machine."""

import hashlib

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util
from test_shapes import Loaded

from dn_detr_d2.data import records_of, shapes, shapes_hard
from dn_detr_d2.data.shapes import Dice

# SHA-256 over the pixels and boxes of the first 3 training scenes; pins the drawing on every machine and version.
FIRST_SCENES = "b8c2aa331c8d32933e88b02ec60b8517e43a7afb9d96ad1c25e5b3f362dfae14"
SCENES = 25


@pytest.fixture(scope="module")
def scenes():
    return [shapes_hard.draw_scene(Dice([22, i])) for i in range(SCENES)]


def test_the_same_bytes_on_every_machine():
    digest = hashlib.sha256()
    for image_id in range(3):
        pixels, boxes, labels, _ = shapes_hard.draw_scene(Dice([21, image_id]))
        digest.update(pixels.tobytes())
        digest.update(repr((pixels.shape, boxes, labels)).encode())
    assert digest.hexdigest() == FIRST_SCENES


def test_scenes_are_as_large_and_as_full_as_described(scenes):
    counts = [len(labels) for _, _, labels, _ in scenes]
    assert min(counts) >= 5
    assert max(counts) <= 25
    assert np.mean(counts) == pytest.approx(15, abs=3)
    assert {pixels.shape for pixels, *_ in scenes} == {(256, 256, 3)}
    assert {label for _, _, labels, _ in scenes for label in labels} == set(range(12))


def test_boxes_are_those_of_the_masks(scenes):
    for _, boxes, _, masks in scenes:
        runs = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
        found = [[x, y, x + w, y + h] for x, y, w, h in mask_util.toBbox(runs).tolist()]
        assert found == [list(box) for box in boxes]


def test_two_fifths_of_each_object_stay_visible_and_some_are_hidden_in_part(scenes):
    visible = []
    for _, _, _, masks in scenes:
        above = np.zeros((256, 256), bool)
        for mask in masks[::-1]:
            visible.append((mask & ~above).sum() / mask.sum())
            above |= mask
    assert min(visible) >= 0.4
    assert 0.1 < np.mean(np.array(visible) < 0.9) < 0.8


def colours_of(texture, shape, seed):
    """How many of an object's inner pixels have each of its colours, without the noise of the scene."""
    rng = Dice([seed])
    mask, box = shapes.draw_object(rng, shape, 256, 256, shapes_hard.SIDES)
    pixels = shapes_hard.paint(rng, texture, np.array([200, 40, 100]), box)[mask]
    return np.unique(pixels, axis=0, return_counts=True)


@pytest.mark.parametrize("shape", range(4))
def test_textures_show_one_colour_or_two_that_differ_clearly(shape):
    for seed in range(20):
        assert len(colours_of(0, shape, seed)[0]) == 1
        for texture in (1, 2):
            colours, counts = colours_of(texture, shape, seed)
            assert len(colours) == 2
            assert abs(colours[0] - colours[1]).min() == shapes_hard.TEXTURE_CONTRAST
            assert counts.min() > 0.15 * counts.sum()


def test_a_worked_rhombus():
    mask, box = shapes.draw_object(Loaded(8, 100, 0, 0), 3, 9, 16, (2, 8))
    assert mask.sum(1).tolist() == [2, 4, 6, 8, 8, 6, 4, 2, 0]
    assert box == (0, 0, 8, 8)


def test_classes_and_files(tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("shapes_hard_train")
    assert len(metadata.thing_classes) == 12
    assert {"plain circle", "striped rhombus", "dotted triangle"} <= set(metadata.thing_classes)
    split = shapes.Split(tmp_path / "few", 22, 3, shapes_hard.draw_scene, shapes_hard.CLASSES)
    shapes.register_split("test_few_hard", split)
    try:
        records = records_of("test_few_hard", masks=True)
        drawn = [shapes_hard.draw_scene(Dice([22, i])) for i in range(3)]
        assert [[x["category_id"] for x in r["annotations"]] for r in records] == [labels for _, _, labels, _ in drawn]
        assert all("segmentation" in x for r in records for x in r["annotations"])
    finally:
        DatasetCatalog.remove("test_few_hard")
        MetadataCatalog.remove("test_few_hard")
