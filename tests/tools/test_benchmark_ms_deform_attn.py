"""The operator's measuring tools: what they compare is the same thing, and what they count is in the machine code."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from dn_detr_d2.layers import ms_deform_attn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.mark.parametrize("queries", [None, 7])
@pytest.mark.parametrize("levels", [1, 4])
def test_every_rival_computes_the_operator(tools, queries, levels):
    from benchmark.cases import gather_corners, grid_sample_composite, make_case

    case = make_case(64, 80, queries=queries, n=2, h=2, d=4, k=3, levels=levels)
    arguments = (case["value"], case["shapes"], case["locations"], case["weights"])
    expected = ms_deform_attn(*arguments, "torch")
    for rival in (grid_sample_composite, gather_corners, lambda *a: gather_corners(*a, by_index=True)):
        torch.testing.assert_close(rival(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_unit_costs_are_times_over_work(tools, monkeypatch):
    from benchmark import curves

    monkeypatch.setattr(curves, "seconds_of", lambda case, backward: case["weights"].shape[1] ** 2)
    points = {str(q): {"height": 32, "width": 32, "queries": q} for q in (2, 4, 8)}
    rows = curves.measure_curve("queries", points, 5, {})
    assert [row["unit_cost"] for row in rows] == [1, 2, 4] * 2  # a quadratic time costs twice a unit when work doubles


@pytest.mark.parametrize(("arguments", "text"), [
    (["--rounds", "1"], "--rounds must be 5 or more"),
    (["--threads", "0"], "--threads positive"),
    (["--device", "cuda"], "there is nothing to time"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(arguments, text):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "tools" / "benchmark_ms_deform_attn.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert text in ran.stderr


@pytest.fixture
def counting():
    spec = importlib.util.spec_from_file_location("counting", ROOT / "tools" / "count_cuda_instructions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_instructions_are_counted_by_loops(counting):
    """Ten instructions with the loop over points at 2..4: 16 points in batches of 8 run it twice, a warp has four slots."""
    lines = ["MOV", "MOV", "SHFL", "FFMA", "@P0 BRA 0x20", "FADD", "STG", "STG", "NOP", "EXIT", "BRA 0xa0"]
    listing = "\n".join(f"/*{16 * i:04x}*/   {text} ;" for i, text in enumerate(lines))
    instructions = counting.read_instructions(listing)
    assert len(instructions) == 10
    assert counting.find_loops(instructions) == [range(2, 5)]
    assert counting.count_executed(instructions, lanes=8, backward=False) == (10 + 3) / 4


@pytest.mark.slow
def test_kernels_stay_below_their_budget_of_instructions(counting):
    if not shutil.which("nvcc") or not counting.find_cuobjdump():
        pytest.skip("needs nvcc and cuobjdump")
    rows = counting.count("90")
    assert [(row["kernel"], row["dtype"]) for row in rows] == [
        ("backward", "bfloat16"), ("backward", "float32"), ("forward", "bfloat16"), ("forward", "float32"),
    ]  # fmt: skip
    for row in rows:
        assert 100 < row["instructions"] <= {"forward": 400, "backward": 700}[row["kernel"]]
        assert row["registers"] <= {"forward": 64, "backward": 96}[row["kernel"]]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_to_compare_with_compile(tmp_path, architecture):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    source = ROOT / "tools" / "benchmark" / "cuda_rivals.cu"
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
