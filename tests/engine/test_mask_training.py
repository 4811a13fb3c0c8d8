"""The trainer with Mask2Former and Mask DINO: parts, processes, resumes, and that they learn."""

import json

import pytest
import torch
from conftest import MASK_SYSTEMS, make_batch
from gradients import COUNTS, HIDDEN, QUIET, distance, gradients, in_float64, of_this_rank, same_points
from naming import naming
from PIL import Image
from ranks import on_ranks
from toy_training import LEARNING, differing, learn, load, make_cfg, stop_at, train

from dn_detr_d2 import ConfigError, DatasetError

INSTANCE_SYSTEMS = ("mask2former", "mask_dino")
every_system = pytest.mark.parametrize("system", INSTANCE_SYSTEMS)


def mask_cfg(folder, system, *overrides):
    return make_cfg(folder, "INPUT.IMAGE_SIZE", 64, *overrides, config=MASK_SYSTEMS[system])


@pytest.mark.parametrize("counts", COUNTS)
@every_system
def test_parts_give_the_gradient_of_the_batch(toy_model, monkeypatch, system, counts):
    monkeypatch.setattr("dn_detr_d2.modeling.points.random_points", same_points)
    with in_float64():
        model, batch = toy_model(system, *QUIET), make_batch(*counts, sizes=((64, 64),), masks=True)
        whole, terms = gradients(model, batch, 1)
        for accumulation in (2, 4):
            parts, part_terms = gradients(model, batch, accumulation)
            assert distance(parts, whole) < 1e-9
            assert part_terms == pytest.approx(terms, rel=1e-9, abs=1e-12)


@every_system
def test_two_gloo_processes_give_the_gradient_of_one(toy_cfg, tmp_path, system):
    """With as many objects on each, since a process's class loss is a mean, and as many in its fullest image."""
    cfg = toy_cfg(system, *QUIET, *HIDDEN, "MODEL.DN_DETR.DENOISING.NUM_QUERIES", 0)
    for processes in (1, 2):
        on_ranks(of_this_rank, cfg, str(tmp_path), 1, [(3, 1, 1, 3)], True, True, ranks=processes)
    one, two = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("1_1", "2_1"))
    assert distance(two[0], one[0]) < 1e-9


@every_system
def test_a_process_without_objects_takes_part(toy_cfg, tmp_path, system):
    """No parameter is without gradient, for which the other process would wait."""
    on_ranks(of_this_rank, toy_cfg(system), str(tmp_path), 1, [(0, 0, 1, 4)], True, True)
    (found,) = torch.load(tmp_path / "2_1.pth", weights_only=True)
    assert found.isfinite().all()
    assert found.norm() > 0


@every_system
def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, system):
    options = ["DATALOADER.NUM_WORKERS", 2]
    train(mask_cfg(tmp_path / "whole", system, *options))
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    assert train(mask_cfg(tmp_path / "stopped", system, *options), resume=True, seed=99).start_iter == 3
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.json").read_text().splitlines()]
    assert all(line["main/mask"] > 0 and line["dn/dice"] > 0 for line in lines if "main/class" in line)


@every_system
def test_losses_of_both_parts_fall(tmp_path, system):
    history = learn(mask_cfg(tmp_path, system, *LEARNING), 40, "main/dice", "dn/dice")
    assert (history[-5:].mean(0) < 0.85 * history[:5].mean(0)).all(), history[[0, -1]]


def test_masks_that_are_not_there_are_told_before_the_training(tmp_path):
    options = ["DATASETS.COCO_JSON", [["test_bare", str(tmp_path / "set.json"), str(tmp_path)]]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 48}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 1, "bbox": [8, 8, 22, 22]}],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    options += ["MODEL.DN_DETR.NUM_CLASSES", 1, "INPUT.CROP.ENABLED", False]
    with pytest.raises(DatasetError, match=naming("annotation", 7, "MODEL.DN_DETR.MASK.ENABLED")):
        train(mask_cfg(tmp_path / "out", "mask2former", *options, "DATASETS.TRAIN", ("test_bare",)))


@pytest.mark.parametrize(
    ("key", "named"),
    [("KNOWN_FRACTION", ["DENOISING", "MaskDinoQueries"]), ("LABEL_PROMPTS", ["labels", "MODEL.DN_DETR.MASK.ENABLED"])],
)
def test_prompts_that_queries_do_not_take_are_refused(toy_model, key, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_model("mask_dino", f"MODEL.DN_DETR.DENOISING.{key}", 0.5 if key == "KNOWN_FRACTION" else True)
