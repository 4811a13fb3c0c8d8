"""Validation losses are those of one batch of all images, whoever counts them, and the training does not notice."""

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import MASK_SYSTEMS, make_batch
from detectron2.modeling import build_model
from detectron2.utils import comm
from naming import naming
from ranks import on_ranks

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.data import build_probe_loader
from dn_detr_d2.diagnostics import build_diagnostics
from dn_detr_d2.diagnostics.validation_loss import validation_losses
from dn_detr_d2.engine import Trainer

QUIET = [f"MODEL.DN_DETR.DENOISING.{key}" for key in ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE")]
NOISELESS = [x for key in QUIET for x in (key, 0.0)] + ["MODEL.DN_DETR.DENOISING.MASK_PADDING", True]
DROPOUT = ["MODEL.DN_DETR.ENCODER.DROPOUT", 0.1, "MODEL.DN_DETR.DECODER.DROPOUT", 0.1]
TRAINING = {
    "DATASETS.TRAIN": ("shapes_train",),
    "DATASETS.TEST": ("shapes_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.DN_DETR.NUM_CLASSES": "auto",
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MIN_SIZE_TEST": 48,
    "INPUT.CROP.ENABLED": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (2,),
}
DATA = list(chain(*TRAINING.items()))


def one_by_one(*counts, masks=False):
    """A batch of images of one size, and a loader that gives one at a time."""
    batch = make_batch(*counts, sizes=((64, 64),), masks=masks)
    for i, record in enumerate(batch):
        record["image_id"] = i
    return batch, [[record] for record in batch]


@pytest.mark.parametrize("system", ["dab_detr", "dn_detr", "dn_deformable_detr"])
def test_they_are_what_the_criterion_says_of_all_images_at_once(toy_model, system):
    """Without noise, which would differ; 3 + 0 + 1 objects, one process: the losses of a training step without dropout."""
    model = toy_model(system, *DROPOUT, *NOISELESS).train()
    batch, loader = one_by_one(3, 0, 1)
    found = validation_losses(model, loader)
    model.eval()
    with torch.no_grad():
        losses = model.losses(model.forward_outputs(batch, model.denoising))
        expected = {name: loss.value.item() for name, loss in losses.items()}
        seen = model.forward_outputs(batch)
        pairs = model.matcher(seen.matching, seen.targets)
        by_hand = model.criterion(seen.matching, seen.targets, pairs, torch.tensor(4.0))
    assert found.pop("total_loss") == pytest.approx(sum(expected.values()), rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-4)
    for term, values in by_hand.items():
        assert found[f"main/{term}"] == pytest.approx(values[-1].item(), rel=1e-4)
        assert found[f"aux/{term}_0"] == pytest.approx(values[0].item(), rel=1e-4)


@pytest.mark.parametrize("system", ["dino", "dino_like", "deformable_detr_two_stage_dn_R50_50ep"])
def test_losses_of_proposals_are_those_of_training(toy_model, system):
    """In the mode of evaluation too, also where every cell has a loss: the same numbers of the same images and weights."""
    model = toy_model(system, "MODEL.DN_DETR.ENCODER.DROPOUT", 0.0, "MODEL.DN_DETR.DECODER.DROPOUT", 0.0)
    batch = make_batch(3, 1, sizes=((64, 64),))
    found = {}
    for mode in (True, False):
        model.train(mode)
        outputs = model.forward_outputs(batch)
        losses = model.losses(outputs)
        found[mode] = {name: loss.value.item() for name, loss in losses.items() if name.startswith("proposal/")}
    assert found[True]
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_a_mean_over_queries_is_averaged_over_the_images(toy_model):
    model = toy_model("detr").eval()
    _, loader = one_by_one(3, 0, 1)
    with torch.no_grad():
        single = [{k: x.value for k, x in model.losses(model.forward_outputs(batch)).items()} for batch in loader]
    found = validation_losses(model, loader)
    assert found["main/class"] == pytest.approx(sum(x["main/class"].item() for x in single) / 3, rel=1e-5)
    # a step divides by at least one object; the second image has none
    assert found["main/l1"] == pytest.approx((3 * single[0]["main/l1"] + single[2]["main/l1"]).item() / 4, rel=1e-5)


def test_the_class_loss_of_denoising_is_a_mean_over_all_noised_objects(toy_model):
    """Also DETR's, whose class loss of matching queries is a mean over queries."""
    model = toy_model("detr", "MODEL.DN_DETR.DENOISING.NAME", "DenoisingGenerator", *NOISELESS).eval()
    batch, loader = one_by_one(3, 0, 1)
    with torch.no_grad():
        expected = model.losses(model.forward_outputs(batch, model.denoising))["dn/class"].value.item()
    assert validation_losses(model, loader)["dn/class"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("system", ["dn_detr", "dino"])
def test_they_are_the_same_each_time_and_leave_no_trace(toy_model, system):
    model = toy_model(system, *DROPOUT).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    _, loader = one_by_one(2, 1)
    stream = torch.get_rng_state()
    first = validation_losses(model, loader)
    assert torch.get_rng_state().equal(stream)
    torch.rand(5)
    assert validation_losses(model, loader[::-1]) == pytest.approx(first, rel=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert validation_losses(model, loader, seed=1)["dn/l1"] != first["dn/l1"]


@pytest.mark.parametrize("system", MASK_SYSTEMS)
def test_losses_of_masks_are_averaged_over_objects_whatever_the_order(toy_model, system):
    """Matched without boxes or with, three objects and none: each image's losses weighted by its objects."""
    model = toy_model(system, *DROPOUT).train()
    _, loader = one_by_one(3, 0, 1, masks=True)
    found = validation_losses(model, loader)
    assert {"main/mask", "main/dice", "aux/mask_0", "dn/mask", "dn/dice"} <= found.keys()
    assert ("main/l1" in found) == (system != "mask2former")
    assert all(math.isfinite(value) for value in found.values())
    assert validation_losses(model, loader[::-1]) == pytest.approx(found, rel=1e-5)
    single = [validation_losses(model, [loader[i]]) for i in (0, 2)]
    for name in ("main/mask", "main/dice"):
        assert found[name] == pytest.approx((3 * single[0][name] + single[1][name]) / 4, rel=1e-4)


def measure(cfg, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    losses = validation_losses(build_model(cfg), build_probe_loader(cfg, "shapes_val", 7))
    if comm.is_main_process():
        Path(folder, f"{comm.get_world_size()}.json").write_text(json.dumps(losses))


def test_two_processes_find_what_one_finds(toy_cfg, tmp_path):
    """Seven images: four and three, with different numbers of objects."""
    cfg = toy_cfg("dn_detr", *DATA)
    measure(cfg, str(tmp_path))
    on_ranks(measure, cfg, str(tmp_path))
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert len(one) > 6
    assert two == pytest.approx(one, rel=1e-5)


def test_a_training_logs_them_and_does_not_notice(toy_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {}))
    weights = {}
    for name, images in (("off", 0), ("on", 3)):
        cfg = toy_cfg("dn_detr", *DATA, *DROPOUT, "TEST.VALIDATION_LOSS", images, "OUTPUT_DIR", str(tmp_path / name))
        cfg.TEST.EVAL_PERIOD, cfg.SEED = 1, 7
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.train()
        weights[name] = trainer.model.state_dict()
    assert [name for name, x in weights["on"].items() if not x.equal(weights["off"][name])] == []
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.json").read_text().splitlines()]
    logged = {k: v for line in lines for k, v in line.items() if k.startswith("validation/")}
    total = logged.pop("validation/total_loss")
    assert {"validation/main/class", "validation/aux/l1_0", "validation/dn/giou"} <= logged.keys()
    assert math.isclose(total, sum(logged.values()), rel_tol=1e-5)
    assert not (tmp_path / "off" / "metrics.json").read_text().count("validation/")


def test_what_cannot_be_measured_is_refused(toy_cfg, toy_model):
    with pytest.raises(ConfigError, match=naming("TEST.VALIDATION_LOSS", 5, "DATASETS.TEST")):
        build_diagnostics(toy_cfg("dn_detr", "TEST.VALIDATION_LOSS", 5))
    with pytest.raises(ConfigError, match=naming("TEST.VALIDATION_LOSS", -2)):
        toy_cfg("dn_detr", "TEST.VALIDATION_LOSS", -2)
    with pytest.raises(DatasetError):
        validation_losses(toy_model("dn_detr"), one_by_one(0)[1])
