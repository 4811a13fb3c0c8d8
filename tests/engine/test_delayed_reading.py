"""Steps that the host reads one step later end where steps that are read at once do, and where a plain loop ends."""

import copy
import functools
import json
import math

import pytest
import torch
from conftest import make_batch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naming import naming
from ranks import on_ranks
from test_nonfinite import make_step, plant, toy_batch, weights_and_moments
from toy_training import differing, load, make_cfg, train

from dn_detr_d2 import structures
from dn_detr_d2.engine import AverageHook, TrainStep, average_weights
from dn_detr_d2.engine import trainer as trainer_module
from dn_detr_d2.engine.optimizer import ClippedAdamW, ClippedSGD, skips_on_device

FINE, LOSS, GRADIENT, PASS, OVERFLOW = "fine", "loss", "gradient", "pass", "overflow"


class Faulty(torch.nn.Module):
    """A batch norm, random numbers and a weight; each image says what goes wrong with it."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = torch.nn.BatchNorm1d(2), torch.nn.Parameter(torch.ones(3))

    def forward(self, batch):
        kinds = [image["kind"] for image in batch]
        x = self.norm(torch.rand(4, 2) + batch[0]["image"].mean())
        loss = (x.square().sum() * self.weight).sum() + (self.weight * torch.rand(3)).square().sum()
        if PASS in kinds:
            raise FloatingPointError("the matching cost is not finite")
        if OVERFLOW in kinds:
            loss = loss + self.weight.sum() * 1e35  # times a scale of 2^16
        spoiled = {"aux/l1": loss * 0.5, "main/l1": loss + (math.nan if LOSS in kinds else 0)}
        return spoiled | (
            {"dn/l1": (self.weight - self.weight).sqrt().sum() * 0} if GRADIENT in kinds else {"dn/l1": loss}
        )


def batches_of(kinds, images=1):
    return [
        [
            {"image": torch.full((3,), 0.1 * i), "kind": kind if j == 0 else FINE, "file_name": f"{i}_{j}.png"}
            for j in range(images)
        ]
        for i, kind in enumerate(kinds)
    ]


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1, fused=True),
    "clipped adamw": functools.partial(ClippedAdamW, lr=0.1, max_norm=0.5),
    "amsgrad": functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True, fused=True),
    "clipped nesterov": functools.partial(
        ClippedSGD, lr=0.01, max_norm=0.5, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, fused=True),
    "dampened": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.1, fused=True),
    "not fused": functools.partial(torch.optim.AdamW, lr=0.1),
}


def plain_loop(kinds, optimizer_of, dtype):
    """What a training is to be: every step is looked at before the optimizer, with PyTorch's scaler; a bad one is undone."""
    torch.manual_seed(3)
    model, history = Faulty(), []
    optimizer, scaler = optimizer_of(model.parameters()), torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    average = average_weights(model, 0.7)
    for batch in batches_of(kinds):
        buffers = [buffer.clone() for buffer in model.buffers()]
        optimizer.zero_grad()
        failed = False
        try:
            losses = model(batch)
        except FloatingPointError:
            failed = True
        if not failed:
            scaler.scale(sum(losses.values())).backward()
            scaler.unscale_(optimizer)
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            failed = not all(value.isfinite() for value in losses.values())
            failed |= not norm.isfinite() and not (scaler.is_enabled() and scaler.get_scale() >= 1)
        if failed:
            for buffer, kept in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(kept)
            state = scaler.state_dict()
            scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
            if state:
                scaler.load_state_dict(state)
            continue
        if norm.isfinite():
            optimizer.step()
            average.update_parameters(model)
        scaler.update()
        history.append({name: value.item() for name, value in losses.items()})
    return model, optimizer, average, scaler, history


def run(kinds, optimizer_of, dtype, folder, *, delayed, accumulation=1):
    """The same as a training of TrainStep: (model, optimizer, average, step, losses by iteration)."""
    torch.manual_seed(3)
    model = Faulty()
    optimizer = optimizer_of(model.parameters())
    data = batches_of(kinds, accumulation)
    options = {"may_skip": len(kinds), "accumulation": accumulation, "delayed": delayed}
    step = TrainStep(model, data, optimizer, dtype, str(folder), **options)
    hook = AverageHook(average_weights(model, 0.7), model)
    hook.trainer = type("Trainer", (), {"_trainer": step, "start_iter": 0})
    history = {}
    with EventStorage() as storage:
        for i in range(len(kinds)):
            step.iter = storage.iter = i
            step.run_step()
            hook.after_step()
        step.settle()
        for name in ("main/l1", "aux/l1", "dn/l1", "data_time", "gradient_norm"):
            if name in storage.histories():
                for value, i in storage.history(name).values():
                    history.setdefault(int(i), {})[name] = value
    return model, optimizer, hook.averaged, step, history


def assert_same(a, b):
    """Bitwise equal; what an optimizer has made for a step that it left out is zeros."""
    assert differing(a.state_dict(), b.state_dict()) == []


def state_of(optimizer):
    """Without states of zeros, which a step that is left out may leave where there was none."""
    state = {i: s for i, s in optimizer.state_dict()["state"].items() if any(bool(x.any()) for x in s.values())}
    return {"state": copy.deepcopy(state)}


@pytest.fixture
def no_reports(monkeypatch):
    """Their files are synced, which takes longer than all the rest."""
    monkeypatch.setattr("dn_detr_d2.engine.train_step.write_report", lambda *_: None)


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_ends_where_a_plain_loop_ends(tmp_path, optimizer, dtype, delayed):
    """The first, the last, and two steps in a row are bad; what follows a bad one draws the same numbers."""
    kinds = [LOSS, FINE, PASS, GRADIENT, FINE, FINE, OVERFLOW, FINE, LOSS]
    if dtype is not torch.float16:
        kinds.remove(OVERFLOW)
    if dtype is torch.float16:
        kinds.remove(GRADIENT)  # an overflow for it
    expected = plain_loop(kinds, OPTIMIZERS[optimizer], dtype)
    found = run(kinds, OPTIMIZERS[optimizer], dtype, tmp_path, delayed=delayed)
    assert_same(found[0], expected[0])
    assert_same(found[2], expected[2])
    assert differing(state_of(found[1]), state_of(expected[1])) == []
    step = found[3]
    assert step.scaler.state_dict() == expected[3].state_dict()
    assert step.skipped == sum(kind in (LOSS, PASS, GRADIENT) for kind in kinds)
    assert step.overflows == kinds.count(OVERFLOW)
    good = [i for i, kind in enumerate(kinds) if kind in (FINE, OVERFLOW)]
    assert sorted(found[4]) == good  # each under its own iteration
    for i, losses in zip(good, expected[4], strict=True):
        assert {name: found[4][i][name] for name in losses} == pytest.approx(losses, rel=1e-6)


@pytest.mark.usefixtures("no_reports")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from([FINE, LOSS, GRADIENT, PASS, OVERFLOW]), min_size=1, max_size=7),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from([None, torch.float16]),
    accumulation=st.sampled_from([1, 2]),
)
def test_reading_later_changes_nothing(tmp_path, kinds, optimizer, dtype, accumulation):
    at_once, later = (
        run(kinds, OPTIMIZERS[optimizer], dtype, tmp_path, delayed=delayed, accumulation=accumulation)
        for delayed in (False, True)
    )
    assert_same(later[0], at_once[0])
    assert_same(later[2], at_once[2])
    assert differing(later[1].state_dict()["state"], at_once[1].state_dict()["state"]) == []
    for result in (at_once, later):
        for losses in result[4].values():
            losses.pop("data_time")
    assert later[4].keys() == at_once[4].keys()
    assert repr(later[4]) == repr(at_once[4])
    assert later[3].state_dict()["scaler"] == at_once[3].state_dict()["scaler"]
    assert (later[3].skipped, later[3].overflows) == (at_once[3].skipped, at_once[3].overflows)


@pytest.mark.parametrize("kind", [LOSS, GRADIENT, PASS])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("look", ["next step", "settle", "stepped", "state_dict"])
def test_the_error_of_a_step_comes_with_whatever_asks_for_it_first(tmp_path, kind, accumulation, look):
    model = Faulty()
    step = TrainStep(
        model, batches_of([FINE, kind, FINE], accumulation), OPTIMIZERS["adamw"](model.parameters()), None, str(tmp_path),
        accumulation=accumulation, delayed=True,
    )  # fmt: skip
    with EventStorage():
        for step.iter in range(2):
            step.run_step()
            if step.iter == 0:
                step.settle()
                before = copy.deepcopy([model.state_dict(), step.optimizer.state_dict()["state"]])
        step.iter = 2
        with pytest.raises(FloatingPointError, match=naming("iteration 1, rank 0", "1_0.png")):
            {"next step": step.run_step, "settle": step.settle, "state_dict": step.state_dict}.get(
                look, lambda: step.stepped
            )()
    assert not step.stepped
    assert differing(before, [model.state_dict(), step.optimizer.state_dict()["state"]]) == []
    report = json.loads((tmp_path / "iteration_1_rank_0.json").read_text())
    assert (report["iteration"], report["learning_rates"]) == (1, [0.1])


def test_which_optimizers_skip_on_the_device():
    weight = [torch.nn.Parameter(torch.ones(1))]
    found = {name: skips_on_device(make(weight)) for name, make in OPTIMIZERS.items()}
    assert [name for name, able in found.items() if not able] == ["dampened", "not fused"]
    old = torch.optim.AdamW(weight, 0.1).state_dict()
    resumed = OPTIMIZERS["adamw"](weight)
    resumed.load_state_dict(old)
    assert not skips_on_device(resumed)


@pytest.mark.parametrize(("kind", "said"), [(FINE, ""), (LOSS, "iteration 0 was not finite")])
def test_another_error_does_not_hide_the_last_numbers(tmp_path, caplog, kind, said):
    """Nothing is asked of other processes, which may be gone: the cause is not looked for."""
    model = Faulty()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = TrainStep(model, batches_of([kind]), optimizer, None, str(tmp_path), delayed=True)
    with EventStorage() as storage:
        step.run_step()
        with pytest.raises(StopIteration):
            step.run_step()
        step.close()
        step.close()
        assert ("main/l1" in storage.histories()) == (kind == FINE)
    assert said in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("system", "accumulation", "dtype"),
    [
        *((system, 1, None) for system in ("dn_detr", "dn_deformable_detr", "mask_dino")),
        *(("dn_detr", 2, None), ("dn_detr", 1, torch.float16), ("dn_detr", 2, torch.bfloat16)),
    ],
)
def test_a_delayed_step_waits_for_nothing_of_its_own_but_the_matcher(
    toy_model, tmp_path, monkeypatch, system, accumulation, dtype
):
    """What it reads besides was launched in the step before, and is read after the matcher's costs, which came later."""
    launched, reads, inside, now = {}, [], [], 0
    for name in ("cpu", "tolist", "item"):
        original = getattr(torch.Tensor, name)
        counted = lambda self, f=original, name=name: (inside or reads.append(name), f(self))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    start, wait = structures.HostCopy.__init__, structures.HostCopy.wait

    def started(self, tensor):
        launched[self] = now
        start(self, tensor)

    def waited(self):
        reads.append(launched[self])
        inside.append(self)
        result = wait(self)
        inside.pop()
        return result

    monkeypatch.setattr(structures.HostCopy, "__init__", started)
    monkeypatch.setattr(structures.HostCopy, "wait", waited)
    model = toy_model(system)
    batch = make_batch(5, 0, masks="mask" in system)
    optimizer = OPTIMIZERS["clipped adamw"](model.parameters())
    options = {"accumulation": accumulation, "delayed": True}
    step = TrainStep(model, iter([batch] * 3), optimizer, dtype, str(tmp_path), **options)
    with EventStorage():
        for now in range(3):
            reads.clear()
            step.run_step()
            own, earlier = [now] * accumulation, [now - 1] if now else []
            assert reads == own[:1] + earlier + own[1:]


# Each on rank 0, 1, 0, ...: seen in the forward pass by the host, in the losses, in the gradient, in a weight.
PLACES = ("boxes", "output of encoder.layers.0.ffn", "loss term dn/class", "gradient of decoder.layers.0.ffn.norm.bias",
          "output of decoder.heads.box_heads.0", "weight decoder.layers.1.ffn.norm.weight", "image")  # fmt: skip


def steps_of_two(cfg, folder, accumulation):
    """In each process: every second step, from the first on, is bad on one rank and is noticed in the next one."""
    results = []
    for delayed in (False, True):
        step, model = make_step(
            cfg, folder / f"report_{delayed}", may_skip=20, delayed=delayed, accumulation=accumulation
        )
        step.optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        with EventStorage() as storage:
            for i, place in enumerate(x for each in PLACES for x in (each, "")):
                batch, planted = toy_batch(), None
                if place and comm.get_rank() == i // 2 % 2:
                    planted = plant(model, batch, place, math.nan)
                step.iter = storage.iter = i
                step.data_loader.append(batch)
                step.run_step()
                if place.startswith(("output", "loss", "gradient", "weight")):
                    step.settle()  # on both; or the plant would be gone when the pass is repeated
                if planted is not None:
                    getattr(planted, "remove", planted)()
            step.settle()
            losses = list(storage.history("main/l1").values()) if comm.is_main_process() else []
        results.append(
            {"model": model.state_dict(), "optimizer": step.optimizer.state_dict()["state"], "losses": losses}
        )
        assert step.skipped == len(PLACES)
    torch.save(results, folder / f"{comm.get_rank()}.pth")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_discard_and_repeat_together(toy_cfg, tmp_path, accumulation):
    on_ranks(steps_of_two, toy_cfg("dn_detr", "MODEL.DN_DETR.ENCODER.NUM_LAYERS", 2), tmp_path, accumulation)
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert differing(*ranks[0]) == []
    assert differing(ranks[0][1]["model"], ranks[1][1]["model"]) == []
    assert [i for _, i in ranks[0][1]["losses"]] == list(range(1, 2 * len(PLACES), 2))
    for delayed in (False, True):
        names = sorted(path.name for path in (tmp_path / f"report_{delayed}").glob("*.json"))
        assert names == sorted(f"iteration_{2 * i}_rank_{i % 2}.json" for i in range(len(PLACES)))


def raise_in_the_next_step(cfg, folder):
    """In each process: the same error, from the step after the bad one; weights as after the last good step."""
    step, model = make_step(cfg, folder / "report", delayed=True)
    with EventStorage():
        for step.iter in range(3):
            batch = toy_batch()
            if step.iter == 1:
                before = copy.deepcopy(weights_and_moments(step, model))
                if comm.get_rank() == 1:
                    plant(model, batch, "boxes", math.nan)
            step.data_loader.append(batch)
            try:
                step.run_step()
            except FloatingPointError as error:
                message = f"{step.iter}: {error}"
        changed = differing(before, weights_and_moments(step, model))
    (folder / f"{comm.get_rank()}.json").write_text(json.dumps([message, changed]))


def test_both_ranks_raise_in_the_next_step(toy_cfg, tmp_path):
    on_ranks(raise_in_the_next_step, toy_cfg("dn_detr"), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0].startswith("2: iteration 1, rank 1: boxes of image_1.png ")
    assert first[1] == []


def differing_terms(folder):
    """One process has a term of another name."""

    class Terms(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {f"main/{comm.get_rank()}": self.weight.sum()}

    model = Terms()
    step = TrainStep(model, [[{}]], torch.optim.SGD(model.parameters(), 0.1), None, str(folder))
    with EventStorage():
        try:
            step.run_step()
        except RuntimeError as error:
            (folder / f"{comm.get_rank()}.txt").write_text(str(error))


def test_processes_with_different_terms_are_refused(tmp_path):
    on_ranks(differing_terms, tmp_path)
    assert naming("loss terms", "main/0").search((tmp_path / "0.txt").read_text())


def delay_all(monkeypatch):
    """Trainers of this process read late, as on a GPU."""
    monkeypatch.setattr(trainer_module, "TrainStep", functools.partial(TrainStep, delayed=True))


def spoil_iterations(monkeypatch, iterations):
    """A NaN in the first box of these iterations."""
    real = TrainStep._parts

    def parts(self, batch):
        if self.iter in iterations:
            batch[0]["instances"].gt_boxes.tensor[:] = math.nan
        return real(self, batch)

    monkeypatch.setattr(TrainStep, "_parts", parts)


SKIPPING = ["SOLVER.NONFINITE", "skip", "SOLVER.NONFINITE_LIMIT", 9, "MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.75]
SKIPPING += [
    "MODEL.DN_DETR.DENOISING.NOISE_SCHEDULE.NAME",
    "linear",
    "SOLVER.CHECKPOINT_PERIOD",
    2,
    "MODEL.RESNETS.NORM",
    "BN",
]


def metrics(folder):
    """What is written of each iteration, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{key: x for key, x in line.items() if "time" not in key and "eta" not in key} for line in lines]


def test_whole_trainings_write_the_same(tmp_path, monkeypatch):
    """Checkpoints, averages, random states and metrics; bad are the first step, one with a checkpoint, and the last."""
    spoil_iterations(monkeypatch, {0, 3, 4, 5})
    train(make_cfg(tmp_path / "at_once", *SKIPPING))
    delay_all(monkeypatch)
    train(make_cfg(tmp_path / "later", *SKIPPING))
    for name in ("model_0000001", "model_0000003", "model_final"):
        first, second = (load(tmp_path / folder, name) for folder in ("at_once", "later"))
        for each in (first, second):
            each.pop("config", None)
        assert differing(first, second) == [], name
    assert metrics(tmp_path / "later") == metrics(tmp_path / "at_once")
    assert load(tmp_path / "later")["model_ema"]["n_averaged"] == 2


def test_a_delayed_training_resumes_to_the_bit(tmp_path, monkeypatch):
    spoil_iterations(monkeypatch, {1, 3})
    delay_all(monkeypatch)
    train(make_cfg(tmp_path / "whole", *SKIPPING, "SOLVER.STEPS", (), "SOLVER.MAX_ITER", 5))
    train(make_cfg(tmp_path / "parts", *SKIPPING, "SOLVER.STEPS", (), "SOLVER.MAX_ITER", 2))
    train(make_cfg(tmp_path / "parts", *SKIPPING, "SOLVER.STEPS", (), "SOLVER.MAX_ITER", 5), resume=True, seed=99)
    assert differing(load(tmp_path / "whole")["model"], load(tmp_path / "parts")["model"]) == []
    assert differing(load(tmp_path / "whole")["trainer"], load(tmp_path / "parts")["trainer"]) == []


def test_the_last_step_of_a_delayed_training_is_checked(tmp_path, monkeypatch):
    spoil_iterations(monkeypatch, {5})
    delay_all(monkeypatch)
    with pytest.raises(FloatingPointError, match=naming("iteration 5, rank 0")):
        train(make_cfg(tmp_path / "out"))
    assert not (tmp_path / "out" / "model_final.pth").exists()
    assert (tmp_path / "out" / "model_0000002.pth").exists()
