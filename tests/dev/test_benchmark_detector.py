"""The benchmark of detectors: costs are counted where they arise, and rivals are what they are said to be."""

import csv
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TOY
from detectron2.utils import comm
from PIL import Image
from ranks import on_ranks

from dev import benchmark_detector
from dev.benchmark import compiled, detector_curves, timeline
from dev.benchmark.detectors import Case, build_ours, build_rival, build_transformers, config_of, make_batch
from dev.benchmark.timeline import BACKWARD, FORWARD, STEP, Timeline
from dev.benchmark_criterion import OperatorCount
from dn_detr_d2.diagnostics.model_analysis import measure_memory

DEFORMABLE = str(ROOT / "configs" / "dn_dab_deformable.yaml")
CASE = Case(DEFORMABLE, tuple(TOY), size=(64, 96), objects=3)


class Planted(timeline.Meter):
    """Counts what :class:`Plant` adds."""

    total = 0

    def now(self):
        return Planted.total

    def between(self, first, last):
        return last - first


class Plant(torch.autograd.Function):
    """The identity; one of its passes adds 1."""

    @staticmethod
    def forward(ctx, x, which):
        ctx.which = which
        Planted.total += which == FORWARD
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Planted.total += ctx.which == BACKWARD
        return gradient, None


@pytest.fixture(scope="module")
def detector():
    found = build_ours(CASE)
    found.step()  # the first one makes the optimizer's state
    return found


def first_layer(model, part):
    """A module inside of the part that gets and gives one tensor."""
    names = {
        "backbone": "res2.0.conv1",
        "neck": "projections.3.0",
        "encoder": "layers.0.ffn.linear1",
        "decoder": "layers.0.ffn.linear1",
    }
    return model.get_submodule(f"{part}.{names[part]}")


@pytest.mark.parametrize("which", [FORWARD, BACKWARD])
@pytest.mark.parametrize("part", ["backbone", "neck", "encoder", "decoder"])
def test_costs_are_counted_where_they_arise(detector, part, which):
    layer = first_layer(detector.model, part)
    handle = layer.register_forward_hook(lambda module, given, output: Plant.apply(output, which))
    costs = Timeline(detector.model, Planted(), detector.optimizer).costs(detector.step)
    handle.remove()
    assert {key: cost for key, cost in costs.items() if cost} == {(part, which): 1}


def test_parts_add_up_to_all_operators_of_a_step(detector):
    with OperatorCount() as count:
        detector.step()
    costs = Timeline(detector.model, timeline.operators(), detector.optimizer).costs(detector.step)
    assert sum(costs.values()) == count.total
    for part in ("backbone", "neck", "encoder", "decoder", timeline.LOSSES):
        assert costs[part, FORWARD] > 0, part
        assert costs[part, BACKWARD] > 0, part
    assert costs[timeline.OPTIMIZER, STEP] > 0


def test_hooks_are_gone_afterwards(detector):
    matcher = detector.model.matcher
    Timeline(detector.model, timeline.Meter(), detector.optimizer).costs(detector.step)
    assert detector.model.matcher is matcher
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in detector.model.modules())


def test_a_step_reads_for_the_matcher_and_inference_for_the_detections(detector):
    costs = Timeline(detector.model, timeline.reads(), detector.optimizer).costs(detector.step)
    assert costs[timeline.MATCHER, FORWARD] == 1
    found = Timeline(detector.model, timeline.reads()).costs(detector.detect)
    assert {key: value for key, value in found.items() if value} == {(timeline.OUTPUT, FORWARD): 1}


def test_the_floor_is_a_part_of_the_time(detector):
    meter = timeline.Floor(timeline.Meter())
    floor = Timeline(detector.model, meter, detector.optimizer).costs(detector.step)
    spent = sum(meter.context.meter.between(*pair) for pair in meter.context.marks)
    assert sum(floor.values()) == pytest.approx(spent)
    assert floor["encoder", FORWARD] > 0
    assert floor["encoder", BACKWARD] > 0
    assert floor["backbone", FORWARD] > 0
    assert floor.get((timeline.OPTIMIZER, STEP), 0.0) == floor.get((timeline.MATCHER, FORWARD), 0.0) == 0.0


def test_inference_has_a_floor_too(detector):
    floor = Timeline(detector.model, timeline.Floor(timeline.Meter())).costs(detector.detect)
    assert floor["backbone", FORWARD] > 0
    assert floor["decoder", FORWARD] > 0


def test_kept_bytes_are_those_of_model_analysis():
    case = replace(CASE, batch=1, objects=7)
    detector = build_ours(case)
    costs = Timeline(detector.model, timeline.kept_bytes(detector.model), detector.optimizer).costs(detector.step)
    torch.manual_seed(0)
    expected = measure_memory(config_of(case), *case.size)
    assert sum(costs.values()) == pytest.approx(expected, rel=0.03)  # boxes that coincide are kept once there


@pytest.mark.parametrize("name", ["dn_dab_deformable", "mask2former_dn_R50_instance_12ep"])
def test_tables_name_all_parts(capsys, name):
    pytest.importorskip("tabulate")
    config = str(ROOT / "configs" / f"{name}.yaml")
    given = [*["--size", "64", "64", "--rounds", "1", "--batch", "1", "--objects", "2"], *map(str, TOY)]
    assert benchmark_detector.main(["--config-file", config, *given]) == 0
    training, inference = capsys.readouterr().out.split("Inference")
    assert "\ndata: " in training
    for part in ("backbone", "neck", "encoder", "decoder", "matcher", "losses", "guard", "optimizer", "all"):
        assert f"| {part} " in training
    assert "| postprocess " in inference
    assert "| optimizer " not in inference
    assert ("| pixel_decoder " in training) == name.startswith("mask")


def test_the_rival_of_transformers_has_our_parameters_and_learns():
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    case = Case(str(ROOT / "configs" / "deformable_detr_R50_50ep.yaml"), size=(64, 64), batch=1)
    ours, theirs = build_ours(case), build_transformers(case)
    assert sum(p.numel() for p in ours.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    before = theirs.model.class_embed[0].weight.clone()
    theirs.step()
    assert not torch.equal(before, theirs.model.class_embed[0].weight)
    found = theirs.detect()
    assert len(found) == 1
    assert len(found[0]["boxes"]) == len(ours.detect()[0]["instances"]) == 100


def test_the_rival_of_torch_computes_the_same_losses(detector):
    rival = build_rival("torch", CASE)
    assert {m.backend for m in rival.model.modules() if hasattr(m, "backend")} == {"torch"}
    table = benchmark_detector.rival_table(detector, CASE, arguments(["--rounds", "2", "--against", "torch"]))
    assert table.count("torch") == 2


def test_settings_are_those_of_inference(capsys):
    size = ["--size", "64", "64", "--rounds", "1", "--batch", "1"]
    settings = ["--setting", "settled", "--setting", "TEST.FOLD_NORMS False"]
    assert benchmark_detector.main(["--config-file", DEFORMABLE, *size, *settings, *map(str, TOY)]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["setting", "as built", "settled", "TEST.FOLD_NORMS False"]


def test_a_setting_that_compiles_is_compiled(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: asked.append(f.__name__) or f)
    size = ["--size", "64", "64", "--rounds", "1", "--batch", "1"]
    settings = ["--setting", "settled TEST.COMPILE True", "--setting", "settled"]
    assert benchmark_detector.main(["--config-file", DEFORMABLE, *size, *settings, *map(str, TOY)]) == 0
    assert asked == ["forward_tensors"]


def test_a_settled_detector_detects_the_same_with_folded_norms(detector):
    settled = build_ours(CASE, settled=True)
    fresh = build_ours(CASE)
    assert "backbone.stem.conv1.norm.weight" in fresh.model.state_dict()
    assert "backbone.stem.conv1.norm.weight" not in settled.model.state_dict()
    first, second = (x.detect()[0]["instances"].scores for x in (fresh, settled))
    assert torch.allclose(first, second, atol=1e-5)


def compile_rows(capsys, *which):
    """The cells of the table of --compile."""
    size = ["--size", "64", "64", "--rounds", "2", "--batch", "1"]
    assert benchmark_detector.main(["--config-file", DEFORMABLE, "--compile", *which, *size, *map(str, TOY)]) == 0
    lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines[1:]]


def test_each_key_is_timed_with_what_it_compiles(capsys, monkeypatch):
    """Encoder: its one layer; all: the backbone, that layer and three of the decoder; inference: the whole pass."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: asked.append(f.__name__) or f)
    rows = compile_rows(capsys)
    assert [row[1] for row in rows[:3]] == [f"MODEL.DN_DETR.COMPILE {x!r}" for x in ("", "encoder", "all")]
    assert [row[1] for row in rows[3:]] == ["TEST.COMPILE False", "TEST.COMPILE True"]
    assert asked == ["_call_impl"] * (1 + 5) + ["forward_tensors"]
    assert [row[0] for row in compile_rows(capsys, "inference")] == ["inference"] * 2


@pytest.mark.long
def test_what_is_compiled_is_told_apart_from_what_is_not(capsys, monkeypatch):
    """By a backend that runs graphs as they are: nothing is compiled without the keys, and "all" is more than "encoder"."""
    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, **_: compile_by(f, dynamic=dynamic, backend="eager"))
    rows = compile_rows(capsys)
    assert [row[1].split()[-1] for row in rows] == ["''", "'encoder'", "'all'", "False", "True"]
    assert [row[0] for row in rows] == ["training"] * 3 + ["inference"] * 2
    plain, encoder, everything, as_built, whole = (int(row[3]) for row in rows)
    assert (plain, encoder, as_built) == (0, 1, 0)
    assert everything > 2
    assert whole >= 1
    assert all(float(row[5].removesuffix("x")) > 0 for row in rows)


def test_a_first_pass_counts_the_compiler_that_it_calls():
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    before = time.process_time()
    took = compiled.first_seconds(lambda: subprocess.run([sys.executable, "-S", "-c", burn], check=True), "cpu")
    assert took > 0.45 + time.process_time() - before


def arguments(given):
    return benchmark_detector.parse_arguments(["--config-file", DEFORMABLE, *given])


def test_curves_are_written_and_grow(tmp_path, capsys):
    given = ["--size", "64", "64", "--rounds", "1", "--curves", "objects", "batch", "--output", str(tmp_path)]
    assert benchmark_detector.main(["--config-file", DEFORMABLE, *given, *map(str, TOY)]) == 0
    for name in ("objects", "batch"):
        rows = list(csv.DictReader((tmp_path / f"detector_{name}.csv").open()))
        assert float(rows[0]["ratio"]) == 1.0
        by_point = {int(row["point"]): row for row in rows}
        kept = [float(by_point[point]["kept_MiB"]) for point in sorted(by_point)]
        assert kept == sorted(kept)
        assert kept[-1] > kept[0]
        with Image.open(tmp_path / f"detector_{name}.png") as picture:
            assert min(picture.size) > 200


def test_processes_train_together_each_with_its_own_batch():
    on_ranks(_weights_stay_equal)


def _weights_stay_equal():
    detector = build_ours(replace(CASE, batch=1))
    detector.step()
    gradients = [p.grad.double().sum().item() for p in detector.model.parameters() if p.grad is not None]
    first, second = comm.all_gather(gradients)
    assert first == second
    assert any(first)
    detector.model.zero_grad()
    alone = detector.model(detector.batch)["main/l1"].item()
    assert len(set(comm.all_gather(alone))) == 2


def test_seconds_together_are_those_of_each_round():
    took = detector_curves.seconds_together(detector_curves.Point("1"), replace(CASE, batch=1), rounds=2)
    assert len(took) == 2
    assert min(took) > 0


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--batch", "0"], "--batch"),
        (["--size", "8", "64"], "8 64"),
        (["--against", "transformers", "--precision", "fp16", "--size", "32", "32", "--rounds", "1"], "--precision"),
    ],
)
def test_bad_input_is_refused(given, value, capsys):
    code = benchmark_detector.main(["--config-file", DEFORMABLE, *given, *map(str, TOY)])
    assert code == 2
    assert value in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert benchmark_detector.main(["--config-file", DEFORMABLE, "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err


def test_images_have_all_sizes_in_turn():
    batch = make_batch(replace(CASE, size=(64, 96), batch=3, others=((96, 64),)), 5)
    assert [tuple(x["image"].shape[-2:]) for x in batch] == [(64, 96), (96, 64), (64, 96)]
    for record in batch:
        boxes = record["instances"].gt_boxes.tensor
        assert (boxes[:, 2] <= record["width"]).all()
        assert (boxes[:, 3] <= record["height"]).all()
