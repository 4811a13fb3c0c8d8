"""Numbers that are not finite, planted everywhere: all ranks stop before a weight changes and name the first cause."""

import copy
import json
import math
import time

import pytest
import torch
from conftest import make_batch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from naming import naming
from ranks import on_ranks
from toy_training import differing

from dn_detr_d2.engine import TrainStep
from dn_detr_d2.engine.nonfinite import tensors

OUTPUTS = (
    *(f"backbone.{stage}" for stage in ("stem", "res2", "res3", "res4", "res5")),
    *("neck.projections.0", "encoder.position_scale", "encoder.layers.0.self_attn", "encoder.layers.0.ffn"),
    *("encoder.layers.0", "encoder.layers.1", "encoder", "query_source.label_encoder", "decoder.position.embed"),
    *("decoder.position", "decoder.layers.0.self_attn", "decoder.layers.0.cross_attn", "decoder.layers.0.ffn"),
    *("decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "decoder.norm", "decoder"),
    *("decoder.heads.class_heads.0", "decoder.heads.box_heads.0"),
)
TERMS = ("main/class", "main/l1", "main/giou", "aux/class_0", "aux/l1_1", "dn/class", "dn/l1", "dn/giou_0")
PARAMETERS = (
    *("backbone.res2.0.conv1.weight", "encoder.layers.0.self_attn.in_proj.weight", "decoder.layers.1.ffn.norm.bias"),
    *("decoder.heads.class_heads.0.bias", "query_source.anchors.weight"),
)
PLACES = [
    *(("image", "image image_1.png"), ("boxes", "boxes of image_1.png")),
    *((f"output of {name}",) * 2 for name in OUTPUTS),
    *((f"loss term {name}",) * 2 for name in TERMS),
    *((f"gradient of {name}",) * 2 for name in PARAMETERS),
    ("weight decoder.layers.1.ffn.norm.weight",) * 2,
]
# Every place once: NaN and Inf by turns, each of them on both ranks by turns.
CASES = [(place, (math.nan, math.inf)[i % 2], i // 2 % 2) for i, (place, _) in enumerate(PLACES)]


def toy_batch():
    """Two small images of this rank."""
    batch = make_batch(2, 1, sizes=((32, 32),), seed=comm.get_rank())
    return [{**image, "file_name": f"image_{i}.png"} for i, image in enumerate(batch)]


def make_step(cfg, folder, **options):
    """(step, model) with weights off their symmetric start, in as many processes as there are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ddp = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    return TrainStep(ddp, [], optimizer, None, str(folder), **options), model  # the list is filled as batches come


def spoil(tensor, value):
    """Puts the value into the first place, behind autograd's back."""
    tensor.data[(0,) * tensor.dim()] = value


def plant(model, batch, place, value):
    """Plants the value; returns what takes it out again."""
    kind, _, name = place.removeprefix("output of ").partition(" ")
    if place == "image":
        batch[1]["image"] = batch[1]["image"].float()
        return spoil(batch[1]["image"], value)
    if place == "boxes":
        return spoil(batch[1]["instances"].gt_boxes.tensor, value)
    if place.startswith("output of "):
        module = model.get_submodule(kind)
        return module.register_forward_hook(lambda *given: spoil(next(tensors(given[-1])), value))
    if place.startswith("loss term "):
        name = place.removeprefix("loss term ")
        return model.register_forward_hook(lambda m, x, losses: {**losses, name: losses[name] + value})
    parameter = model.get_parameter(place.rpartition(" ")[2])
    if place.startswith("gradient of "):
        return parameter.register_hook(lambda gradient: spoil(gradient, value))
    before = parameter.detach().clone()
    spoil(parameter, value)
    return lambda: parameter.data.copy_(before)


def weights_and_moments(step, model):
    return {"model": model.state_dict(), "optimizer": step.optimizer.state_dict()["state"]}


def try_all_places(cfg, folder):
    """In each process: every case in turn; writes what was seen."""
    step, model = make_step(cfg, folder / "nan_report")
    seen = []
    with EventStorage():
        step.data_loader.append(toy_batch())
        step.run_step()  # from here on the optimizer has moments
        before = copy.deepcopy(weights_and_moments(step, model))
        for i, (place, value, victim) in enumerate(CASES):
            batch, planted = toy_batch(), None
            if comm.get_rank() == victim:
                planted = plant(model, batch, place, value)
            step.iter = i
            step.data_loader.append(batch)
            start, message = time.perf_counter(), ""
            try:
                step.run_step()
            except FloatingPointError as error:
                message = str(error)
            seconds = time.perf_counter() - start
            if planted is not None:
                getattr(planted, "remove", planted)()
            changed = differing(before, weights_and_moments(step, model))
            seen.append({"message": message, "seconds": seconds, "changed": changed, "stepped": step.stepped})
    (folder / f"{comm.get_rank()}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(what each rank saw of each case, folder); two gloo processes for all cases."""
    from conftest import ROOT, SYSTEMS, TOY

    from dn_detr_d2 import setup_cfg

    options = [*TOY, "MODEL.DN_DETR.ENCODER.NUM_LAYERS", 2]
    cfg = setup_cfg(str(ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml"), options)
    folder = tmp_path_factory.mktemp("nonfinite")
    on_ranks(try_all_places, cfg, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{p}={v} on {r}".replace(" ", "_") for p, v, r in CASES])
def test_both_ranks_stop_and_name_the_first_cause(seen, number):
    (ranks, folder), (place, _, victim) = seen, CASES[number]
    tensor = dict(PLACES)[place]
    for rank in ranks:
        told = rank[number]
        assert told["message"].startswith(f"iteration {number}, rank {victim}: {tensor} ")
        assert naming("image_0.png", "image_1.png").search(told["message"])
        assert told["seconds"] < 50  # half of what ranks wait for each other
        assert (told["changed"], told["stepped"]) == ([], False)
    assert ranks[0][number]["message"] == ranks[1][number]["message"]
    report = folder / "nan_report" / f"iteration_{number}_rank_{victim}"
    content = json.loads(report.with_suffix(".json").read_text())
    assert (content["tensor"], content["rank"], content["iteration"]) == (tensor, victim, number)
    assert content["statistics"]["nan"] + content["statistics"]["inf"] > 0
    assert len(torch.load(report.with_suffix(".pth"), weights_only=True)["batch"]) == 2
    assert not report.with_name(f"iteration_{number}_rank_{1 - victim}.json").exists()


def test_there_are_at_least_thirty_places():
    assert len(set(PLACES)) == len(PLACES) >= 30


def skip_and_go_on(cfg, folder):
    """In each process: one step in three is bad, on one rank or the other, in the forward pass or only in the gradient."""
    step, model = make_step(cfg, folder / "nan_report", may_skip=2)
    step.optimizer.param_groups[0]["lr"] = 1e-5
    stepped, changed = [], []
    with EventStorage():
        for i, place in enumerate(
            ["", "boxes", "", "gradient of decoder.layers.0.ffn.norm.bias", "", "loss term dn/class"]
        ):
            batch = toy_batch()
            planted = plant(model, batch, place, math.nan) if place and comm.get_rank() == i % 4 // 2 else None
            before = copy.deepcopy(weights_and_moments(step, model))
            step.iter = i
            step.data_loader.append(batch)
            try:
                step.run_step()
            except FloatingPointError as error:
                message = str(error)
            stepped.append(step.stepped)
            changed.append(bool(differing(before, weights_and_moments(step, model))))
            if planted is not None:
                planted.remove()
    result = {"stepped": stepped, "changed": changed, "message": message, "counted": step.state_dict()["skipped"]}
    torch.save({**result, "weights": model.state_dict()}, folder / f"{comm.get_rank()}.pth")


def test_ranks_skip_together_and_stop_at_the_limit(toy_cfg, tmp_path):
    on_ranks(skip_and_go_on, toy_cfg("dn_detr"), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    for told in (first, second):
        assert told["stepped"] == told["changed"] == [True, False] * 3
        assert naming(2, "SOLVER.NONFINITE_LIMIT").search(told["message"])
        assert told["counted"] == 2
    assert differing(first["weights"], second["weights"]) == []
    assert len(list((tmp_path / "nan_report").glob("*.json"))) == 3


class Toy(torch.nn.Module):
    """One weight, a batch norm before it, and a loss that a batch can spoil or make overflow."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = torch.nn.BatchNorm1d(1), torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        factor = batch[0]["factor"]
        draw = self.norm(torch.rand(4, 1) + factor).square().sum() * self.weight.sum()
        return {"main/l1": draw * factor}


def toy_step(tmp_path, factors, dtype=None, model=None, **options):
    batches = [[{"image": torch.zeros(3), "factor": torch.tensor(factor)}] for factor in factors]
    model = model or Toy()
    return TrainStep(model, batches, torch.optim.SGD(model.parameters(), 0.01), dtype, str(tmp_path), **options), model


def test_a_skipped_step_leaves_batch_norm_and_the_random_stream_as_if_it_had_been_looked_at_once(tmp_path):
    ends = []
    for may_skip in (1, 0):
        torch.manual_seed(3)
        step, model = toy_step(tmp_path, [1.0, math.nan, 1.0], may_skip=may_skip)
        with EventStorage():
            step.run_step()
            if may_skip:
                step.run_step()
            else:
                next(step._data_loader_iter)
                torch.rand(4, 1)
            step.run_step()
        ends.append(model.state_dict())
    assert all(value.isfinite().all() for value in ends[0].values())
    assert differing(*ends) == []


class Steep(Toy):
    """A gradient that only a loss scale makes overflow, or one that nothing cures: 0 * inf."""

    def forward(self, batch):
        factor = batch[0]["factor"]
        return {"main/l1": self.weight.sum() * factor if factor else (self.weight - self.weight).sqrt().sum() * 0}


def test_an_overflow_of_fp16_is_counted_and_no_error_while_the_scale_can_fall(tmp_path):
    step, model = toy_step(tmp_path, [1e34], torch.float16, model=Steep())
    with EventStorage() as storage:
        step.run_step()
        assert storage.latest()["overflow_steps"][0] == 1
    assert (step.stepped, step.overflows, model.weight.item()) == (False, 1, 1.0)
    assert step.scaler.get_scale() == 2**15


def test_an_overflow_that_no_scale_cures_is_an_error(tmp_path):
    step, _ = toy_step(tmp_path, [0.0] * 18, torch.float16, model=Steep())
    with EventStorage():
        for _ in range(17):  # the scale goes from 2^16 to 2^-1
            step.run_step()
        with pytest.raises(FloatingPointError, match=naming("gradient of weight")):
            step.run_step()
    assert step.overflows == 17


def test_what_is_not_found_again_is_told_all_the_same(tmp_path):
    class Once(Toy):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            return {"main/l1": self.weight.sum() * (math.nan if self.calls == 1 else 1)}

    step, _ = toy_step(tmp_path, [1.0], model=Once())
    with EventStorage(), pytest.raises(FloatingPointError, match=naming("main/l1", "nan")):
        step.run_step()
    assert json.loads((tmp_path / "iteration_0_rank_0.json").read_text())["tensor"] is None


def test_skipped_steps_are_remembered_in_a_checkpoint(tmp_path):
    step, _ = toy_step(tmp_path, [math.nan], may_skip=5)
    with EventStorage():
        step.run_step()
    other, _ = toy_step(tmp_path, [], may_skip=5)
    other.load_state_dict(step.state_dict())
    assert other.skipped == 1
