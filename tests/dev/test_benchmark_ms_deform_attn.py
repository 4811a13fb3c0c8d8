"""The operator's measuring tools: what they compare is the same thing, and what they count is in the machine code."""

import shutil
import subprocess

import pytest
import torch
from conftest import ROOT
from ranks import run_program

from dev import benchmark_ms_deform_attn as benchmark
from dev import count_cuda_instructions as counting
from dev.benchmark import curves
from dev.benchmark.cases import gather_corners, grid_sample_composite, make_case
from dev.benchmark.on_cuda import count_sets, seconds_by_graph
from dn_detr_d2 import UserError
from dn_detr_d2.layers import missing_kernel, ms_deform_attn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("queries", [None, 7])
@pytest.mark.parametrize("levels", [1, 4])
def test_every_rival_computes_the_operator(queries, levels):
    case = make_case(64, 80, queries=queries, n=2, h=2, d=4, k=3, levels=levels)
    arguments = (case["value"], case["shapes"], case["locations"], case["weights"])
    expected = ms_deform_attn(*arguments, "torch")
    for rival in (grid_sample_composite, gather_corners, lambda *a: gather_corners(*a, by_index=True)):
        torch.testing.assert_close(rival(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_unit_costs_are_times_over_work(monkeypatch):
    monkeypatch.setattr(curves, "seconds_of", lambda case, backward: case["weights"].shape[1] ** 2)
    points = {str(q): {"height": 32, "width": 32, "queries": q} for q in (2, 4, 8)}
    rows = curves.measure_curve("queries", points, 5, {})
    assert [row["unit_cost"] for row in rows] == [1, 2, 4] * 2  # a quadratic time costs twice a unit when work doubles


class Replay:
    """In the place of a CUDA graph: a replay takes ``TIME`` milliseconds a job."""

    TIME, seen = 0.25, []

    def __init__(self, jobs):
        self.results = [timed(prepare()) for prepare, timed in jobs]
        self.seen.append(self)
        self.asked = []

    def milliseconds(self, repeats):
        self.asked.append(repeats)
        return self.TIME * repeats * len(self.results)


def test_a_round_on_the_gpu_is_long_enough_and_a_figure_is_that_of_one_call():
    Replay.seen = []
    times = seconds_by_graph([(lambda: None, lambda made: made)] * 2, 3, Replay)
    assert Replay.seen[0].asked == [1, 2, 4, 8, 16, 16, 16, 16]  # 16 replays of half a millisecond are over five
    assert times == pytest.approx([0.25e-3] * 3)


@pytest.mark.parametrize(("size", "cache", "sets"), [(10, 50, 11), (25, 50, 5), (201, 50, 1), (1, 50, 16)])
def test_input_sets_are_more_than_the_cache_holds(size, cache, sets):
    assert count_sets(size, cache) == sets


def test_forward_and_backward_are_timed_apart_on_inputs_of_their_own(monkeypatch, capsys):
    Replay.seen = []
    properties = type("Properties", (), {"L2_cache_size": 100_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: properties)
    sizes = {"height": 64, "width": 80, "h": 2, "d": 4, "k": 3, "device": "cpu"}
    if missing_kernel("cpu"):
        pytest.skip(missing_kernel("cpu"))
    rows = benchmark.measure_kernels("small", 5, record=Replay, **sizes)
    assert [(row["pass"], row["rival"]) for row in rows] == [
        (which, rival) for which in ("forward", "backward") for rival in ("kernel", "grid_sample", "fused", "unfused")
    ]
    assert all(row["ms"] == pytest.approx(0.25) and row["ratio"] == 1 for row in rows)
    assert "250.0 us" in capsys.readouterr().out
    # Values of 110 cells x 2 x 4 floats: 16 sets, different ones, and of each rival the same.
    kernel, _, fused, _, gradient, reference = (x.results for x in Replay.seen[:6])
    assert len(kernel) == 16
    assert not any(x.requires_grad for x in kernel)
    assert not torch.equal(kernel[0], kernel[1])
    for a, b in zip(kernel, fused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradient, reference, strict=True):  # of value, locations and weights
        assert len(a) == 3
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rounds", "1"], "--rounds must be 5 or more"),
        (["--threads", "0"], "--threads positive"),
        (["--device", "cuda"], "there is nothing to time"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, text):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = run_program(ROOT / "dev" / "benchmark_ms_deform_attn.py", *arguments)
    assert ran.returncode == 2
    assert text in ran.stderr


def test_instructions_are_counted_by_loops():
    """Ten instructions with the loop over points at 2..4: 16 points in batches of 8 run it twice, a warp has four slots."""
    lines = ["MOV", "MOV", "SHFL", "FFMA", "@P0 BRA 0x20", "FADD", "STG", "STG", "NOP", "EXIT", "BRA 0xa0"]
    listing = "\n".join(f"/*{16 * i:04x}*/   {text} ;" for i, text in enumerate(lines))
    instructions = counting.read_instructions(listing)
    assert len(instructions) == 10
    assert counting.find_loops(instructions) == [range(2, 5)]
    assert counting.count_executed(instructions, "forward", lanes=8) == (10 + 3) / 4
    assert counting.count_executed(instructions, "gather", lanes=8) == 10 + 3
    unrolled = [(16 * i, "LDG.E.128 R4, desc[UR4][R2.64]") for i in range(64)]
    assert counting.count_executed(unrolled, "forward", lanes=8, unrolled=True) == 64 / 4
    with pytest.raises(UserError, match="was not unrolled"):
        counting.count_executed(instructions, "forward", lanes=8, unrolled=True)


@pytest.mark.long
def test_kernels_stay_below_their_budget_of_instructions():
    if not shutil.which("nvcc") or not counting.find_cuobjdump():
        pytest.skip("needs nvcc and cuobjdump")
    rows = counting.count("90")
    forms = {
        "backward": ("fused", "fused, sorted", "plain", "plain, sorted"),
        "forward": ("fused", "plain"),
        "gather": ("",),
    }
    assert [(row["kernel"], row["form"], row["dtype"]) for row in rows] == [
        (kernel, form, dtype) for kernel in forms for form in forms[kernel] for dtype in ("bfloat16", "float32")
    ]
    for row in rows:
        most = {"forward": 400, "backward": 700 if "plain" in row["form"] else 900, "gather": 700}[row["kernel"]]
        if row["kernel"] == "backward" and row["dtype"] == "bfloat16":
            most += 50  # 4 channels a lane: more instructions, and 1.9 times as fast on an H200 (docs/operator.md)
        assert 100 < row["instructions"] <= most
        # 128 registers are 16 warps a multiprocessor. Four loads in flight are worth more than the warps they cost.
        assert row["registers"] <= {"forward": 64, "backward": 128, "gather": 128}[row["kernel"]]
        assert row["spills"] <= 64


def test_registers_and_spills_are_read_from_what_ptxas_says():
    report = """ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    assert counting.read_usage(report) == {
        "one": {"registers": 128, "spills": 20},
        "two": {"registers": 40, "spills": 0},
    }


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_to_compare_with_compile(tmp_path, architecture):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    source = ROOT / "dev" / "benchmark" / "cuda_rivals.cu"
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch=sm_{architecture}",
        "--shared",
        "-Xcompiler",
        "-fPIC",
        "-Werror",
        "all-warnings",
    ]
    ran = subprocess.run([*command, "-o", str(tmp_path / "rivals.so"), str(source)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
