"""Keys whose other value no other test sets reach the part that they are for."""

import argparse

import pytest
import torch
from detectron2.modeling import build_model
from toy_training import command, make_cfg, rates_of

from dn_detr_d2.commands import train as program
from dn_detr_d2.engine import Trainer
from dn_detr_d2.engine.pseudo_labels import PseudoLabels
from dn_detr_d2.tiling import with_tiles

MASK, DENOISING = "MODEL.DN_DETR.MASK.", "MODEL.DN_DETR.DENOISING."
MASK_KEYS = [
    ("mask2former", MASK + "SCORE_BY_MASK", False, lambda model: model.postprocess.score_by_mask),
    ("mask_dino", MASK + "TEMPERATURE", 0.5, lambda model: model.postprocess.temperature),
    ("mask_dino", DENOISING + "ATTENTION_MASK", False, lambda model: model.denoising.attention_mask),
    ("dino", DENOISING + "KEEP_CORNER_ORDER", True, lambda model: model.denoising.generator.keep_order),
    ("dino", DENOISING + "CORNER_NOISE_SCALE", 0.7, lambda model: model.denoising.generator.corner_noise_scale),
    ("dn_detr", DENOISING + "CENTER_NOISE_SCALE", 0.7, lambda model: model.denoising.generator.center_noise_scale),
    ("dn_detr", DENOISING + "SIZE_NOISE_SCALE", 0.7, lambda model: model.denoising.generator.size_noise_scale),
]


@pytest.mark.parametrize(("system", "key", "value", "read"), MASK_KEYS, ids=[key for _, key, *_ in MASK_KEYS])
def test_a_key_is_an_attribute_of_a_part(toy_model, system, key, value, read):
    assert read(toy_model(system)) != value
    assert read(toy_model(system, key, value)) == value


def test_random_points_of_masks(toy_model):
    """8 points: 2 x 8 candidates, of which half of 8 are kept and the others drawn anew."""
    keys = [MASK + "NUM_POINTS", 8, MASK + "OVERSAMPLE_RATIO", 2.0, MASK + "IMPORTANCE_SAMPLE_RATIO", 0.5]
    [term] = [x for x in toy_model("mask2former", *keys).criterion.terms if x.name == "mask"]
    assert (term.candidates, term.kept, term.rest) == (16, 4, 4)


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_weight_of_no_object(toy_model, weight):
    """Two queries, one object: the loss of class 0 and of no object, weighted, over the sum of the weights."""
    criterion = toy_model("detr", "MODEL.DN_DETR.LOSS.NO_OBJECT_WEIGHT", weight).criterion
    [term] = [x for x in criterion.terms if x.name == "class"]
    assert term.no_object_weight == weight


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_the_power_of_the_polynomial_schedule(toy_cfg, power):
    keys = ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 2.0]
    cfg = toy_cfg("dn_detr", *keys, "SOLVER.POLY_LR_POWER", power)
    assert rates_of(cfg)[5] == pytest.approx(2 * 0.5**power)


@pytest.mark.parametrize("weighted", [True, False])
def test_weights_of_pseudo_labels(toy_cfg, weighted):
    cfg = toy_cfg("dn_detr", "SEMI_SUPERVISED.WEIGHTED", weighted, "SEMI_SUPERVISED.NOISE_GROWTH", 0.25)
    labels = PseudoLabels.from_config(cfg)
    assert (labels.weighted, labels.noise_growth) == (weighted, 0.25)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar(tmp_path, wanted):
    (tmp_path / "out").mkdir()
    trainer = Trainer(make_cfg(tmp_path / "out", "PROGRESS_BAR", wanted))
    assert trainer._progress.wanted == wanted


@pytest.mark.parametrize("seconds", [7, 1800])
def test_how_long_processes_wait_for_each_other(tmp_path, seconds):
    line = command(tmp_path / "out", overrides=("DIST_TIMEOUT", seconds))[1:]
    args = program.parse_arguments(line)
    assert isinstance(args, argparse.Namespace)
    assert program.check(args) == seconds


@pytest.mark.parametrize(("overlap", "tiles"), [(0.0, 4), (0.5, 9)])
def test_tiles_overlap_as_asked(toy_cfg, overlap, tiles):
    """A square of two by two tiles of 64 pixels; with an overlap of half a tile there are three along each side."""
    cfg = toy_cfg("dn_detr", "TEST.TILE.SIZE", 64, "TEST.TILE.OVERLAP", overlap, "INPUT.MIN_SIZE_TEST", 64)
    detector, seen = with_tiles(build_model(cfg).eval(), cfg), []
    detector.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        detector([{"image": torch.zeros(3, 128, 128, dtype=torch.uint8), "height": 128, "width": 128}])
    assert sum(record["image"].shape[-2:] == (64, 64) for record in seen) >= tiles
    assert len(seen) <= tiles + 1  # and the whole image
