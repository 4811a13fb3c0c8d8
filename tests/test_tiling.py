import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from naming import naming
from scipy.ndimage import find_objects, label
from torch import nn

from dn_detr_d2 import ConfigError
from dn_detr_d2.data import ResizeShortestEdge
from dn_detr_d2.data.loader import build_test_loader
from dn_detr_d2.engine.trainer import Trainer
from dn_detr_d2.predictor import Predictor
from dn_detr_d2.tiling import TiledDetector, tile_starts, with_tiles


@given(st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.99))
def test_tiles_cover_a_side_inside_of_it_and_overlap(length, size, overlap):
    starts = tile_starts(length, size, overlap)
    width = min(size, length)
    assert (starts[0], starts[-1] + width) == (0, length)
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= math.ceil(max(size * (1 - overlap), 1))).all()  # a tile less the overlap, but for rounding
    assert set(range(length)) == {x for start in starts for x in range(start, start + width)}


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [(100, 100, 0.5, [0]), (101, 100, 0, [0, 1]), (300, 100, 0, [0, 100, 200]), (300, 100, 0.2, [0, 67, 133, 200]),
     (150, 100, 0.5, [0, 50]), (7, 3, 0.99, [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_starts_worked_out_by_hand(length, size, overlap, starts):
    assert tile_starts(length, size, overlap) == starts


class FindsSquares(nn.Module):
    """Finds squares of one colour on black whose side is at least ``smallest`` pixels of what it sees; class = colour / 50.

    Boxes are in pixels of the output, masks are the squares.
    """

    def __init__(self, smallest, masks=False):
        super().__init__()
        self.smallest, self.masks, self.seen = smallest, masks, []

    def forward(self, batched_inputs):
        return [self.look(x) for x in batched_inputs]

    def look(self, record):
        grey = record["image"][0].numpy().astype(float)
        height, width = grey.shape
        self.seen.append((height, width))
        scale = record["height"] / height
        found = []
        for ys, xs in find_objects(label(grey > 25)[0]):
            x0, y0, x1, y1 = xs.start, ys.start, xs.stop, ys.stop
            if min(x1 - x0, y1 - y0) >= self.smallest:
                found.append((round(grey[ys, xs].max() / 50), [x0 * scale, y0 * scale, x1 * scale, y1 * scale]))
        size = record["height"], record["width"]
        out = Instances(
            size, pred_boxes=Boxes(torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4))
        )
        out.scores = torch.tensor([0.9 - 0.1 * i for i in range(len(found))])
        out.pred_classes = torch.tensor([number for number, _ in found], dtype=torch.int64)
        if self.masks:
            out.pred_masks = torch.zeros(len(found), *size, dtype=torch.bool)
            for mask, (_, box) in zip(out.pred_masks, found, strict=True):
                x0, y0, x1, y1 = map(round, box)
                mask[y0:y1, x0:x1] = True
        return {"instances": out}


# Squares of 10 pixels in an image of 200 x 200: (x, y, class); one in each quarter, and one that two tiles show whole.
SQUARES = [(20, 30, 1), (150, 20, 2), (30, 160, 3), (170, 170, 1), (95, 40, 3)]


def mosaic():
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    for x, y, number in SQUARES:
        image[:, y : y + 10, x : x + 10] = 50 * number
    return {"image": image, "height": 200, "width": 200, "file_name": "mosaic.png"}


def tiled(model, size=110, overlap=0.15, side=110, **options):
    return TiledDetector(
        model, size=size, overlap=overlap, resize=ResizeShortestEdge([side] * 2, 9999), **options
    ).eval()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_whole_image_gives_nothing_and_its_tiles_give_all(masks, batch_size):
    """The model resizes to 110 pixels: 10 become 5.5, too small to be found, but stay 10 in tiles of 110."""
    model = FindsSquares(8, masks)
    whole = tiled(model, size=200)([mosaic()])[0]["instances"]
    assert (len(whole), model.seen) == (0, [(110, 110)])
    found = tiled(model, batch_size=batch_size)([mosaic()])[0]["instances"]
    assert model.seen[1:] == [(110, 110)] * 4  # 0 and 90 in both directions
    boxes = [*found.pred_boxes.tensor.tolist()]
    expected = {(x, y, x + 10, y + 10, label) for x, y, label in SQUARES}
    assert len(found) == len(SQUARES)  # that in two tiles is one
    assert {(*map(int, box), label) for box, label in zip(boxes, found.pred_classes.tolist(), strict=True)} == expected
    assert found.image_size == (200, 200)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    if masks:
        for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes, strict=True):
            inside = torch.zeros(200, 200, dtype=torch.bool)
            inside[int(y0) : int(y1), int(x0) : int(x1)] = True
            assert torch.equal(mask, inside)


def test_tiles_that_are_enlarged_give_boxes_in_pixels_of_the_image():
    found = tiled(FindsSquares(16), side=220)([mosaic()])[0]["instances"]
    boxes = sorted(found.pred_boxes.tensor.tolist())
    assert np.array(boxes) == pytest.approx(np.array(sorted([x, y, x + 10, y + 10] for x, y, _ in SQUARES)), abs=1)


def test_objects_of_two_classes_in_one_place_stay():
    class Both(nn.Module):
        def forward(self, batched_inputs):
            fields = {"scores": torch.tensor([0.9, 0.8]), "pred_classes": torch.tensor([0, 1])}
            boxes = Boxes(torch.tensor([[10.0, 10, 30, 30]] * 2))
            return [{"instances": Instances((50, 50), pred_boxes=boxes, **fields)} for _ in batched_inputs]

    record = mosaic()
    found = tiled(Both(), size=50, overlap=0)([record])[0]["instances"]
    assert len(found) == 2 * 16
    assert len(tiled(Both(), size=50, overlap=0, top_k=5)([record])[0]["instances"]) == 5


@pytest.mark.parametrize(("nms", "left"), [(1.0, 2), (0.7, 2), (0.4, 1)])
def test_test_nms_holds_between_tiles_too(toy_cfg, nms, left):
    """Two tiles see parts of one object that overlap by 40 / 90 = 0.44; merged are such above 0.5, or above TEST.NMS."""

    class Whole(nn.Module):
        def forward(self, batched_inputs):
            return [self.box(*x["image"].shape[-2:]) for x in batched_inputs]

        def box(self, height, width):
            box = Boxes(torch.tensor([[0.0, 0, 60, 60]]))
            fields = {"scores": torch.tensor([0.9]), "pred_classes": torch.tensor([0])}
            return {"instances": Instances((height, width), pred_boxes=box, **fields)}

    cfg = toy_cfg("dn_detr", "TEST.NMS", nms, "TEST.TILE.SIZE", 60, "TEST.TILE.OVERLAP", 0.6, "INPUT.MIN_SIZE_TEST", 60)
    record = {"image": torch.zeros(3, 60, 83, dtype=torch.uint8), "height": 60, "width": 83}
    assert len(with_tiles(Whole(), cfg)([record])[0]["instances"]) == left


@pytest.mark.parametrize("system", ["dn_deformable_detr", "mask_dino"])
def test_one_tile_is_the_whole_image_to_the_bit(toy_cfg, toy_model, tmp_path, system):
    torch.save({"model": toy_model(system).state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64]
    image = np.random.default_rng(0).integers(256, size=(48, 70, 3), dtype=np.uint8)
    whole, one, several = (
        Predictor(toy_cfg(system, *options, "TEST.TILE.SIZE", size))(image)["instances"] for size in (0, 70, 40)
    )
    assert torch.equal(one.scores, whole.scores)
    assert torch.equal(one.pred_boxes.tensor, whole.pred_boxes.tensor)
    assert several.image_size == (48, 70)
    assert len(several) > 0
    if system == "mask_dino":
        assert several.pred_masks.shape == (len(several), 48, 70)


def test_known_objects_are_cut_with_their_tiles():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.known = []

        def forward(self, batched_inputs):
            for record in batched_inputs:
                known = record["known"]
                assert known.image_size == tuple(record["image"].shape[-2:])
                self.known.append((known.gt_boxes.tensor.tolist(), known.gt_classes.tolist()))
            return FindsSquares(9)(batched_inputs)

    boxes = Boxes(torch.tensor([[20.0, 20, 60, 40], [90.0, 60, 130, 100], [99.5, 0, 120, 10]]))
    known = Instances((100, 200), gt_boxes=boxes, gt_classes=torch.tensor([4, 5, 6]))
    record = {"image": torch.zeros(3, 100, 200, dtype=torch.uint8), "height": 100, "width": 200, "known": known}
    model = Told()
    tiled(model, size=100, overlap=0, side=200)([record])  # two tiles, enlarged twice
    assert model.known == [
        ([[40.0, 40, 120, 80], [180.0, 120, 200, 200]], [4, 5]),  # half a pixel of the third is none
        ([[0.0, 120, 60, 200], [0.0, 0, 40, 20]], [5, 6]),
    ]


def test_prompts_pass_through_the_predictor_with_tiles(toy_cfg, toy_model, tmp_path):
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64, "TEST.TILE.SIZE", 48]
    predictor = Predictor(toy_cfg("dn_detr", *options))
    image = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    assert set(predictor(image, labels=[1, 3])["instances"].pred_classes.tolist()) == {1, 3}
    ordinary = predictor(image)["instances"]
    told = predictor(image, known=ordinary[:2])["instances"]
    assert not torch.equal(told.scores[: len(ordinary)], ordinary.scores[: len(told)])
    assert torch.equal(predictor(image, known=ordinary[:0])["instances"].scores, ordinary.scores)


def test_what_cannot_be_merged_is_refused_by_name(toy_cfg):
    with pytest.raises(ConfigError, match=naming("TEST.TILE.SIZE", 64, "['panoptic_seg', 'instances']")):
        toy_cfg("mask_dino", "TEST.TILE.SIZE", 64, "MODEL.DN_DETR.MASK.OUTPUTS", ["panoptic_seg", "instances"])

    class Segments(nn.Module):
        def forward(self, batched_inputs):
            return [{"sem_seg": torch.zeros(3, 9, 9)} for _ in batched_inputs]

    with pytest.raises(ConfigError, match=naming("TEST.TILE.SIZE", "['sem_seg']")):
        tiled(Segments())([mosaic()])


@pytest.mark.parametrize(("key", "value"), [("SIZE", -1), ("OVERLAP", 1.0), ("OVERLAP", -0.1), ("OVERLAP", 1.5)])
def test_sizes_and_overlaps_that_are_none(toy_cfg, key, value):
    with pytest.raises(ConfigError, match=naming(f"TEST.TILE.{key}", value)):
        toy_cfg("dn_detr", f"TEST.TILE.{key}", value)


def test_evaluation_looks_at_the_tiles_that_the_predictor_looks_at(toy_cfg, toy_model, tmp_path):
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.DN_DETR.CLASS_NAMES", [], "TEST.TILE.SIZE", 70]
    cfg = toy_cfg("dn_detr", *options, "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0)
    predictor = Predictor(cfg)
    record = next(iter(build_test_loader(cfg, "shapes_val")))[0]
    assert record["image"].shape[-2:] == (record["height"], record["width"])  # not resized
    with torch.no_grad():
        evaluated = with_tiles(predictor.model, cfg)([record])[0]["instances"]
    found = predictor(record["file_name"])["instances"]
    assert torch.equal(evaluated.scores, found.scores)
    assert torch.equal(evaluated.pred_boxes.tensor, found.pred_boxes.tensor)


def test_evaluation_passes_the_trainer_in_tiles(toy_cfg, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "detectron2.engine.DefaultTrainer.test", classmethod(lambda *given: seen.append(given[2]) or {})
    )
    model = nn.Linear(2, 2)
    Trainer.test(toy_cfg("dn_detr"), model)
    Trainer.test(toy_cfg("dn_detr", "TEST.TILE.SIZE", 50), model)
    assert seen[0] is model
    assert isinstance(seen[1], TiledDetector)
    assert seen[1].model is model
