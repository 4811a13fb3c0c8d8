"""What is wrong with masks is found, counted and repaired, and costs boxes nothing."""

import copy

import numpy as np
from conftest import valid_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from dn_detr_d2.data.check import annotated_sizes, check_content
from dn_detr_d2.data.issues import Issue
from dn_detr_d2.data.mask_check import VERDICTS, cut_polygon, judge_masks, measure_runs, with_repaired_masks
from dn_detr_d2.data.masks import draw_polygons, polygons
from dn_detr_d2.data.report import Report

SIZE = (20, 30)  # of the image, height and width
BOX = [5, 5, 15, 14]
SQUARE = [5, 5, 15, 5, 15, 14, 5, 14]


def runs(bits, **changes):
    found = mask_util.encode(np.asfortranarray(bits, np.uint8))
    return {"size": list(bits.shape), "counts": found["counts"].decode()} | changes


def filled(x0, y0, x1, y1, size=SIZE):
    bits = np.zeros(size, bool)
    bits[y0:y1, x0:x1] = True
    return bits


MASKS = [
    ([SQUARE], None),
    ([SQUARE, [6, 6, 8, 6, 8, 8]], None),
    (runs(filled(*BOX)), None),
    ({"size": [20, 30], "counts": [0, 600]}, Issue.MASK_BOX),
    ([], Issue.NO_MASK),
    (None, Issue.NO_MASK),
    ("x", Issue.MASK_FORM),
    ([SQUARE[:4]], Issue.MASK_FORM),
    ([SQUARE, SQUARE[:7]], Issue.MASK_FORM),
    ([[*SQUARE[:7], "14"]], Issue.MASK_FORM),
    ([[*SQUARE[:7], float("nan")]], Issue.MASK_FORM),
    ([[*SQUARE[:7], 10**400]], Issue.MASK_FORM),
    (SQUARE, Issue.MASK_FORM),
    (runs(filled(*BOX), counts="~"), Issue.MASK_FORM),
    ({"size": [20, 30], "counts": [599]}, Issue.MASK_FORM),
    ({"size": [20, 30], "counts": [-1, 601]}, Issue.MASK_FORM),
    (runs(filled(*BOX, size=(30, 20))), Issue.MASK_SIZE),
    (runs(filled(0, 0, 0, 0)), Issue.MASK_EMPTY),
    ([[5, 5, 15, 5, 5, 5]], Issue.MASK_EMPTY),
    ([[x + 40 for x in SQUARE]], Issue.MASK_EMPTY),
    ([[5, 5, 33, 5, 33, 14, 5, 14]], Issue.MASK_OUTSIDE),
    ([[5, -4, 15, -4, 15, 14, 5, 14]], Issue.MASK_OUTSIDE),
    ([[20, 5, 28, 5, 28, 14, 20, 14]], Issue.MASK_BOX),
    (runs(filled(5, 5, 9, 9)), Issue.MASK_BOX),
]


def judged(masks, box=BOX, size=SIZE):
    count = len(masks)
    sizes, boxes = np.tile(np.float64(size), (count, 1)), np.tile(np.float64(box), (count, 1))
    return [VERDICTS[code] for code in judge_masks(masks, sizes, boxes)]


def test_each_fault_is_found():
    assert judged([mask for mask, _ in MASKS]) == [kind for _, kind in MASKS]
    assert judged([]) == []


def test_where_sizes_and_boxes_are_not_known_nothing_is_said_of_them():
    verdicts = judged([mask for mask, _ in MASKS], [np.nan] * 4, [np.inf] * 2)
    assert not {Issue.MASK_BOX, Issue.MASK_SIZE} & set(verdicts)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_masks_are_measured_as_they_are_drawn(seed):
    rng = np.random.RandomState(seed)
    bits = rng.rand(*SIZE) < rng.choice([0.01, 0.3, 0.9])
    x, y, w, h = mask_util.toBbox(mask_util.encode(np.asfortranarray(bits, np.uint8)))
    assert measure_runs(runs(bits), np.array(SIZE, float)) == ([x, y, x + w, y + h], bits.sum())
    assert judged([runs(bits)], [x, y, x + w, y + h]) == [None if bits.any() else Issue.MASK_EMPTY]


def content_with(masks):
    content = valid_coco()
    image = content["images"][0] | {"height": SIZE[0], "width": SIZE[1]}
    box = {"image_id": image["id"], "category_id": content["categories"][0]["id"], "bbox": [5, 5, 10, 9], "iscrowd": 0}
    annotations = [box | {"id": i, "segmentation": mask} for i, mask in enumerate(masks, 1)]
    return content | {"images": [image], "annotations": annotations}


def report_on(content, **options):
    report = Report(**options)
    check_content(content, report, annotated_sizes(content["images"]))
    return report


def test_faults_are_counted_and_a_problem_only_where_masks_are_trained():
    content = content_with([mask for mask, _ in MASKS])
    plain, trained = report_on(content), report_on(content, masks=True)
    expected = {kind: sum(found is kind for _, found in MASKS) for _, kind in MASKS if kind}
    assert {kind: plain.counts[kind] for kind in expected} == expected
    assert not set(plain.problems()) & set(expected)
    assert {kind: n for kind, n in trained.problems().items() if kind in expected} == expected
    assert plain.classes == trained.classes  # boxes count all the same


def test_crowds_and_files_without_masks_lack_none():
    content = content_with([[SQUARE], []])
    content["annotations"][1]["iscrowd"] = 1
    assert not report_on(content, masks=True).problems()
    empty = content_with([[], []])
    assert not report_on(empty).counts[Issue.NO_MASK]
    assert report_on(empty, masks=True).counts[Issue.NO_MASK] == 2


def test_a_repaired_file_has_masks_that_can_be_used_or_none():
    content = content_with([mask for mask, _ in MASKS])
    before = copy.deepcopy(content)
    fixed, changes = with_repaired_masks(content, annotated_sizes(content["images"]))
    assert content == before
    kinds = [Issue.MASK_FORM, Issue.MASK_SIZE, Issue.MASK_EMPTY, Issue.MASK_OUTSIDE]
    assert changes == {kind: sum(found is kind for _, found in MASKS) for kind in kinds}
    assert set(report_on(fixed, masks=True).problems()) == {Issue.NO_MASK, Issue.MASK_BOX}
    assert [x["bbox"] for x in fixed["annotations"]] == [x["bbox"] for x in content["annotations"]]
    for (mask, kind), entry in zip(MASKS, fixed["annotations"], strict=True):
        if kind not in kinds:
            assert entry["segmentation"] == mask
    two = next(i for i, (mask, _) in enumerate(MASKS) if mask == [SQUARE, SQUARE[:7]])
    assert fixed["annotations"][two]["segmentation"] == [SQUARE]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_a_cut_polygon_covers_the_same_pixels(seed):
    rng = np.random.RandomState(seed)
    ring = (rng.rand(rng.randint(3, 9), 2) * 3 - 1) * SIZE[::-1]
    cut = cut_polygon(ring.reshape(-1).tolist(), SIZE)
    expected = draw_polygons([ring + SIZE[::-1]], (60, 90))[20:40, 30:60]  # drawn with room around
    found = draw_polygons(polygons([cut]), SIZE) if len(cut) >= 6 else np.zeros(SIZE)
    assert all(0 <= x <= 30 for x in cut[::2])
    assert all(0 <= y <= 20 for y in cut[1::2])
    assert (found != expected).mean() < 0.08  # pixels on the outline


def test_a_worked_cut():
    assert cut_polygon([20, 5, 40, 5, 40, 15, 20, 15], SIZE) == [20, 5, 30, 5, 30, 15, 20, 15]
    assert cut_polygon([x + 100 for x in SQUARE], SIZE) == []
