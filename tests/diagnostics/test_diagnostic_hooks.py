"""The diagnostics in trainings of a few iterations: what is logged, what is kept, and that the weights do not notice."""

import json
import logging
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from naming import naming
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dn_detr_d2 import CheckpointError, ConfigError, LeakError
from dn_detr_d2.denoising import NoisedTargets
from dn_detr_d2.diagnostics import build_diagnostics
from dn_detr_d2.diagnostics.diagnostic_hooks import read_assignment, write_assignment
from dn_detr_d2.engine import Trainer

TRAINING = {
    "DATASETS.TRAIN": ("shapes_train",),
    "DATASETS.TEST": ("shapes_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.DN_DETR.NUM_CLASSES": "auto",
    "MODEL.DN_DETR.DECODER.NUM_LAYERS": 2,
    "MODEL.DN_DETR.ENCODER.DROPOUT": 0.1,
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MIN_SIZE_TEST": 48,
    "INPUT.CROP.ENABLED": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": (5,),
    "SOLVER.CHECKPOINT_PERIOD": 4,
    "SEED": 7,
}
DIAGNOSTICS = {
    "TEST.INSTABILITY.NUM_IMAGES": 6,
    "TEST.INSTABILITY.PERIOD": 2,
    "TEST.INSTABILITY.HEALTH_SCALES": [0.4, 1],
    "TEST.INSTABILITY.ATD_K": 3,
    "DEBUG.CHECK_DENOISING": True,
}
SMALL, ON = (list(chain(*overrides.items())) for overrides in (TRAINING, DIAGNOSTICS))
NAMES = {"instability/layer_0", "instability/layer_1", "instability/churn_1", "anchors/distance", "anchors/atd"}
NAMES |= {f"denoising/{which}@{s}" for s in ("0.4", "1") for which in ("accuracy", "iou", "start_iou", "first_iou")}


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch):
    """COCO's evaluation takes longer than all the rest and is not what is looked at here."""
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {}))


@pytest.fixture
def cfg(toy_cfg, tmp_path):
    return toy_cfg("dn_detr", *SMALL, *ON, "OUTPUT_DIR", str(tmp_path / "on"))


def train(cfg, resume=False):
    torch.manual_seed(0)
    np.random.seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def logged(cfg):
    lines = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    return {key: line[key] for line in lines for key in line}


def test_diagnostics_leave_the_training_as_it_is_and_write_the_last_probe(toy_cfg, tmp_path, cfg):
    """Also the check for leaks, dropout and several image sizes, which all draw from the streams of the training."""
    off = train(toy_cfg("dn_detr", *SMALL, "OUTPUT_DIR", str(tmp_path / "off")))
    on = train(cfg)
    theirs = dict(off.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in on.model.named_parameters())
    values = logged(cfg)
    assert values.keys() >= NAMES
    assert not any(name.startswith(("instability", "anchors", "denoising")) for name in logged(off.cfg))
    assert values["anchors/atd"] >= values["anchors/distance"] > 0
    iteration, assignment = read_assignment(Path(cfg.OUTPUT_DIR) / "instability.npz")
    assert iteration == 6
    assert {matched.shape for matched in assignment.values()} == {(2, 9)}
    assert sorted(assignment) == sorted(str(i * 200 // 6) for i in range(6))


@pytest.mark.parametrize(
    ("period", "evaluations", "probed", "compared"),
    [
        (2, 0, [1, 3, 6], [3, 6]),
        (0, 2, [1, 3, 6], [3, 6]),
        (3, 2, [2, 6], [6]),  # evaluations between two probes would shorten the steps
        (2, -1, [1, 3, 6], [3, 6]),
        (0, -1, [6], []),  # no evaluation before the end
        (0, 4, [3, 6], []),  # the last step is half as long as a period
    ],
)
def test_every_probe_is_in_both_logs_and_steps_are_equal(
    toy_cfg, tmp_path, caplog, period, evaluations, probed, compared
):
    """Detectron2 writes every 20 iterations and keeps the last value: two probes between were one."""
    options = [*SMALL, "TEST.INSTABILITY.NUM_IMAGES", 2, "OUTPUT_DIR", str(tmp_path)]
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        train(toy_cfg("dn_detr", *options, "TEST.INSTABILITY.PERIOD", period, "TEST.EVAL_PERIOD", evaluations))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path)).Reload()
    for name, iterations in (("anchors/distance", probed), ("instability/layer_1", compared)):
        assert [line["iteration"] for line in lines if name in line] == iterations
        assert (
            [event.step for event in board.Scalars(name)] == iterations
            if iterations
            else name not in board.Tags()["scalars"]
        )
    shorter = len(probed) > 1 and not compared
    assert bool(naming("no instability", 6, 2, 4).search(caplog.text)) == shorter


def stop_after(cfg, monkeypatch, iterations):
    """A training that breaks in the iteration after so many."""
    with monkeypatch.context() as patch:
        step = Trainer.run_step
        patch.setattr(Trainer, "run_step", lambda self: step(self) if self.iter < iterations else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(cfg)


def test_a_resumed_training_goes_on_with_its_curve(cfg, monkeypatch):
    stop_after(cfg, monkeypatch, 4)
    iteration, _ = read_assignment(Path(cfg.OUTPUT_DIR) / "instability.npz")
    assert iteration == 4
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    [hook] = [hook for hook in resumed._hooks if type(hook).__name__ == "InstabilityHook"]
    resumed.train()
    assert resumed.start_iter == 4
    assert hook.previous is not None
    assert "instability/layer_0" in resumed.storage.latest()  # of the one probe after the resume


def test_a_record_from_after_the_checkpoint_is_not_taken_up(cfg, monkeypatch, caplog):
    stop_after(cfg, monkeypatch, 4)
    record = Path(cfg.OUTPUT_DIR) / "instability.npz"
    write_assignment(record, 5, read_assignment(record)[1])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        trainer.train()
    assert naming("instability.npz", 5, 4).search(caplog.text)
    assert "anchors/atd" in trainer.storage.latest()
    assert "instability/layer_0" not in trainer.storage.latest()


def test_a_record_of_other_images_is_refused_before_the_first_step(cfg):
    record = Path(cfg.OUTPUT_DIR) / "instability.npz"
    write_assignment(record, 3, {"0": np.ones((2, 9), np.int16), "5": np.ones((2, 9), np.int16)})
    hook = build_diagnostics(cfg)[-1]
    hook.trainer = SimpleNamespace(start_iter=4)
    with pytest.raises(ConfigError, match=naming("instability.npz", 2, 6, "TEST.INSTABILITY")):
        hook.before_train()
    hook.trainer.start_iter = 0  # a fresh training does not look at what lies there
    hook.before_train()
    assert hook.previous is None


def test_a_record_of_another_number_of_queries_is_named(cfg, monkeypatch):
    stop_after(cfg, monkeypatch, 4)
    record = Path(cfg.OUTPUT_DIR) / "instability.npz"
    iteration, assignment = read_assignment(record)
    write_assignment(record, iteration, {name: np.full((2, 5), -1, np.int16) for name in assignment})
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    with pytest.raises(ConfigError, match=naming("instability.npz", "(2, 5)", "MODEL.DN_DETR.NUM_QUERIES")):
        trainer.train()


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "instability.npz"
    write_assignment(path, 3, {"b": np.ones((2, 4), np.int16), "a": np.zeros((2, 4), np.int16)})
    iteration, assignment = read_assignment(path)
    assert (iteration, list(assignment)) == (3, ["a", "b"])
    assert assignment["b"].tolist() == [[1] * 4] * 2
    for content in (path.read_bytes()[:200], b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=naming("instability.npz")):
            read_assignment(path)


def test_a_leaking_mask_is_not_trained(cfg, monkeypatch):
    original = NoisedTargets.attention_mask

    def leaking(self, num_matching):
        mask = original(self, num_matching)
        mask[-1, 0] = False
        return mask

    monkeypatch.setattr(NoisedTargets, "attention_mask", leaking)
    trainer = Trainer(cfg)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(LeakError):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("system", "overrides", "named"),
    [
        ("dn_detr", ["DATASETS.TEST", "()"], ["DATASETS.TEST"]),
        ("dab_detr", [], ["HEALTH_SCALES", "[0.4, 1]"]),
        ("dn_detr", ["TEST.INSTABILITY.ATD_K", 0], ["TEST.INSTABILITY.ATD_K", 0]),
        ("dn_detr", ["TEST.INSTABILITY.PERIOD", -1], ["TEST.INSTABILITY.PERIOD", -1]),
        (
            "dn_detr",
            ["TEST.INSTABILITY.HEALTH_SCALES", [0.2, -0.4]],
            ["HEALTH_SCALES", "[0.2, -0.4]"],
        ),
        ("dn_detr", ["TEST.INSTABILITY.HEALTH_SCALES", ["a"]], ["HEALTH_SCALES", "['a']"]),
    ],
)
def test_keys_that_cannot_work_are_refused(toy_cfg, system, overrides, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        build_diagnostics(toy_cfg(system, *SMALL, *ON, *overrides))


def test_without_keys_there_are_no_hooks(toy_cfg):
    assert build_diagnostics(toy_cfg("dab_detr", *SMALL)) == []


def measure(cfg, folder):
    """The scalars of two probes by the hook, the weights moved in between; rank 0 saves them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_ddp_model(build_model(cfg), device_ids=None, broadcast_buffers=False).train()
    [hook] = build_diagnostics(cfg)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(model=model, storage=storage, start_iter=0, iter=3, max_iter=4)
        hook.before_train()
        hook.after_step()  # left to the end of the training
        hook.trainer.max_iter = 6
        hook.after_step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        hook.trainer.iter = 6
        hook.after_train()
        values = {name: value for name, (value, _) in storage.latest().items()}
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if values:
        Path(folder, f"{world}.json").write_text(json.dumps(values))


def test_two_gloo_processes_measure_what_one_measures(toy_cfg, tmp_path):
    """Five images on two processes: three and two."""
    cfg = toy_cfg("dino", *SMALL, *ON, "OUTPUT_DIR", str(tmp_path))
    cfg.TEST.INSTABILITY.NUM_IMAGES, cfg.DEBUG.CHECK_DENOISING = 5, False
    measure(cfg, tmp_path)
    on_ranks(measure, cfg, str(tmp_path))
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one.keys() >= NAMES
    assert one["instability/layer_0"] > 0
    assert two == pytest.approx(one, abs=1e-9)
