"""The compiled operators as PyTorch sees them: opcheck, threads, instruction sets, autocast, compile, export, backends."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from naming import naming
from op_cases import make_fused_inputs, make_inputs

from dn_detr_d2.layers import (
    MultiScaleDeformableAttention,
    kernels,
    missing_kernel,
    ms_deform_attn,
    ms_deform_attn_fused,
)
from dn_detr_d2.layers.ms_deform_attn import ms_deform_attn_torch

LIBRARY = ROOT / "dn_detr_d2" / "_C.abi3.so"
needs_kernel = pytest.mark.skipif(bool(missing_kernel("cpu")), reason=missing_kernel("cpu") or "-")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 6), (2, 3)]
# 40 sizes, each dimension also 0.
SIZES = [
    *({"d": d} for d in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 71)),
    *({"n": n, "d": 32} for n in (0, 2, 3)),
    *({"q": q} for q in (0, 1, 2, 17)),
    *({"h": h} for h in (0, 1, 3, 8)),
    *({"k": k} for k in (0, 1, 3, 4, 5)),
    *({"shapes": shapes} for shapes in ([], [(1, 1)], [(3, 3)] * 3, [(1, 9)], [(9, 1), (2, 2)], [(0, 4), (2, 2)])),
    {"d": 0},
    {"n": 2, "q": 5, "h": 4, "d": 16, "k": 4},
    {"n": 3, "q": 2, "h": 2, "d": 5, "k": 2},
]
assert len(SIZES) >= 40


def flatten(shapes):
    return [size for shape in shapes for size in shape]


@needs_kernel
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_opcheck(sizes, dtype):
    """With and without gradients: 40 sizes x 4 dtypes x 2 = more than 300 samples of four checks."""
    for needs_grad in (False, True):
        value, shapes, loc, weights = make_inputs(dtype=dtype, **sizes)
        tensors = [x.requires_grad_(needs_grad) for x in (value, loc, weights)]
        torch.library.opcheck(torch.ops.dn_detr_d2.ms_deform_attn.default, (tensors[0], flatten(shapes), *tensors[1:]))


@needs_kernel
@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_of_the_fused_form(dims, needs_grad):
    value, shapes, *rest = make_fused_inputs(dims)
    value, *rest = (x.requires_grad_(needs_grad) for x in (value, *rest))
    torch.library.opcheck(torch.ops.dn_detr_d2.ms_deform_attn_fused.default, (value, flatten(shapes), *rest))


def all_results(**sizes):
    """Output and gradients of both forms, in float32."""
    value, shapes, loc, weights = make_inputs(dtype=torch.float32, **sizes)
    inputs = [x.requires_grad_() for x in (value, loc, weights)]
    out = ms_deform_attn(value, shapes, loc, weights, "cpu")
    results = [out, *torch.autograd.grad(out, inputs, torch.sin(torch.arange(out.numel()).float()).view_as(out))]
    value, shapes, *rest = make_fused_inputs(4, **sizes)
    inputs = [x.float().requires_grad_() for x in (value, *rest)]
    out = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], "cpu")
    return [*results, out, *torch.autograd.grad(out, inputs, torch.cos(torch.arange(out.numel()).float()).view_as(out))]


LARGE = {"n": 2, "q": 200, "h": 4, "d": 32, "k": 4, "shapes": [(20, 30), (10, 15)]}


@needs_kernel
def test_the_same_bits_for_any_number_of_threads_and_in_every_run():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8, 1):
            torch.set_num_threads(count)
            results.append(all_results(**LARGE))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_deterministic_mode_has_nothing_to_object_to():
    torch.use_deterministic_algorithms(True)
    try:
        all_results()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["default", "avx2", "avx512"])
def instruction_set(request):
    """Runs a test with one of the kernel's instruction sets, as far as this processor has it."""
    use = torch.ops.dn_detr_d2.cpu_capability
    try:
        assert use(request.param) == request.param
    except RuntimeError:
        pytest.skip(f"no {request.param} here, or ATEN_CPU_CAPABILITY forbids it")
    yield request.param
    use("best")


@needs_kernel
@pytest.mark.parametrize("sizes", [{"d": 3}, {"d": 16, "h": 4}, {"n": 2, "q": 9, "h": 4, "d": 33, "k": 4}], ids=str)
def test_each_instruction_set_equals_pytorchs_operators_in_float64(instruction_set, sizes):
    """And the same bits whatever the number of threads."""
    results, threads = [], torch.get_num_threads()
    try:
        for backend, count in (("torch", 1), ("cpu", 1), ("cpu", 3)):
            torch.set_num_threads(count)
            value, shapes, loc, weights = make_inputs(**sizes)
            leaves = [x.requires_grad_() for x in (value, loc, weights)]
            out = ms_deform_attn(value, shapes, loc, weights, backend)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for wanted, found, again in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
        assert torch.equal(found, again)


@needs_kernel
@pytest.mark.parametrize("flush", [False, True])
def test_every_float16_is_read_as_it_is(instruction_set, flush):
    """All 65536 patterns; also where float32 flushes subnormals to 0, in which those of float16 are ordinary numbers."""
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(1, 1, 1, -1)
    arguments = [(1, 1)], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
    torch.set_flush_denormal(flush)
    try:
        found = ms_deform_attn(value, *arguments, "cpu").flatten()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.nan_to_num(7.0), value.flatten().nan_to_num(7.0))


@needs_kernel
def test_instruction_sets_agree():
    use = torch.ops.dn_detr_d2.cpu_capability
    best = use("best")
    names = ["default", "avx2", "avx512"][: ["default", "avx2", "avx512"].index(best) + 1]
    try:
        results = []
        for name in names:
            assert use(name) == name
            results.append(all_results(**LARGE))
    finally:
        use("best")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    with pytest.raises(RuntimeError, match=naming("cpu_capability", "avx1024")):
        use("avx1024")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_neither_lowers_nor_lifts_anything(dtype):
    value, shapes, loc, weights = make_inputs(dtype=torch.float32)
    for x in (value, value.to(dtype)):
        with torch.autocast("cpu", dtype):
            inside = ms_deform_attn(x, shapes, loc, weights)
        assert inside.dtype == x.dtype
        assert torch.equal(inside, ms_deform_attn(x, shapes, loc, weights))


@needs_kernel
def test_module_trains_under_autocast():
    layer = MultiScaleDeformableAttention(32, 4, 2, 2)
    query, tokens, reference = torch.randn(2, 5, 32), torch.randn(2, 30, 32), torch.rand(2, 5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, reference, tokens, torch.zeros(2, 30, dtype=torch.bool), SHAPES)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@needs_kernel
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiles_to_one_graph(backend, dynamic):
    compiled = torch.compile(ms_deform_attn_fused, fullgraph=True, dynamic=dynamic, backend=backend)
    for queries in (3, 5):
        value, shapes, *rest = make_fused_inputs(4, q=queries)
        inputs = [x.requires_grad_() for x in (value, *rest)]
        ours, eager = (f(inputs[0], shapes, *inputs[1:]) for f in (compiled, ms_deform_attn_fused))
        torch.testing.assert_close(ours, eager)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, eager)), strict=True):
            torch.testing.assert_close(a, b)


@needs_kernel
def test_exports():
    class Attention(torch.nn.Module):
        def forward(self, value, loc, weights):
            return ms_deform_attn(value, SHAPES, loc, weights)

    value, _, loc, weights = make_inputs(q=3)
    queries = torch.export.Dim("queries", min=2, max=100)
    program = torch.export.export(Attention(), (value, loc, weights), dynamic_shapes=(None, {1: queries}, {1: queries}))
    assert "dn_detr_d2.ms_deform_attn" in str(program.graph)
    value, shapes, loc, weights = make_inputs(q=9)
    torch.testing.assert_close(program.module()(value, loc, weights), ms_deform_attn(value, shapes, loc, weights))


@needs_kernel
def test_second_derivatives_are_refused_with_the_way_out():
    value, shapes, loc, weights = make_inputs()
    value.requires_grad_()
    (grad,) = torch.autograd.grad(ms_deform_attn(value, shapes, loc, weights).sum() ** 2, value, create_graph=True)
    with pytest.raises(NotImplementedError, match=naming("OP_BACKEND torch")):
        grad.sum().backward()


def saved_bytes(function):
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return sum(kept.values()), out


@needs_kernel
def test_backward_keeps_the_inputs_and_nothing_else():
    shapes = [(50, 84), (25, 42), (13, 21), (7, 11)]
    q = sum(a * b for a, b in shapes)
    value, shapes, loc, weights = make_inputs(q=q, h=8, d=32, k=4, shapes=shapes, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (value, loc, weights)]
    ours, _ = saved_bytes(lambda: ms_deform_attn(value, shapes, loc, weights, "cpu"))
    theirs, _ = saved_bytes(lambda: ms_deform_attn_torch(value, shapes, loc, weights))
    assert ours == sum(x.numel() * 4 for x in inputs)
    assert ours <= 0.15 * theirs


def test_a_backend_that_is_not_there_is_refused():
    value, shapes, loc, weights = make_inputs()
    with pytest.raises(ValueError, match=naming("backend", "'gpu'")):
        ms_deform_attn(value, shapes, loc, weights, "gpu")
    with pytest.raises(ValueError, match=naming("backend", "'cuda'", "cpu")):
        ms_deform_attn(value, shapes, loc, weights, "cuda")
    if missing_kernel("cuda"):
        with pytest.raises(ValueError, match=naming("backend", "'cuda'")):
            kernels.uses_kernel("cuda", "cuda")


def test_the_choice_is_said_once(caplog):
    kernels._announce.cache_clear()
    value, shapes, loc, weights = make_inputs()
    with caplog.at_level(logging.INFO, "dn_detr_d2"):
        for _ in range(3):
            ms_deform_attn(value, shapes, loc, weights)
            ms_deform_attn(value, shapes, loc, weights, "torch")
    assert [r.message.startswith("ms_deform_attn on cpu: ") for r in caplog.records] == [True, True]


def test_a_library_of_another_pytorch_is_not_used():
    assert kernels._other_torch("2.14.1", "2.14.0+cu130") == ""
    assert "built with PyTorch 2.11.0, but 2.14.1 is running" in kernels._other_torch("2.11.0", "2.14.1")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "_C.abi3.so' does not exist".replace("'", "")),
        ({"_build.txt": "no kernels were built: no C++ compiler was found"}, "no C++ compiler was found"),
        ({"_C.abi3.so": "not a library"}, "the compiled library does not load"),
        ({"_build.txt": "no kernels were built: the compiler failed", "_C.abi3.so": LIBRARY}, "the compiler failed"),
    ],
)
def test_without_the_library_the_package_works_and_says_why(tmp_path, files, reason):
    package = tmp_path / "dn_detr_d2"
    for path in (ROOT / "dn_detr_d2").rglob("*.py"):
        target = package / path.relative_to(ROOT / "dn_detr_d2")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    for name, content in files.items():
        shutil.copy(content, package / name) if isinstance(content, Path) else (package / name).write_text(content)
    code = (
        "import logging, sys, torch; logging.basicConfig(level='WARNING')\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]  # it would find the real library\n"
        "from dn_detr_d2.layers import ms_deform_attn\n"
        "arguments = torch.ones(1, 1, 1, 2), [(1, 1)], torch.full((1, 1, 1, 1, 1, 2), .5), torch.ones(1, 1, 1, 1, 1)\n"
        "print('result', ms_deform_attn(*arguments).flatten().tolist())\n"
        "ms_deform_attn(*arguments, 'cpu')\n"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "result [1.0, 1.0]" in ran.stdout
    assert ran.stderr.count(reason) == 2, ran.stderr  # the warning, and the refusal of backend="cpu"
    assert naming("ValueError", "backend 'cpu'").search(ran.stderr)


@pytest.mark.parametrize(("capability", "built", "runs"), [
    ((8, 0), "sm_80,sm_90,compute_90", True),
    ((8, 6), "sm_80,sm_90,compute_90", True),  # code of 8.0 runs on 8.6
    ((8, 0), "sm_86,sm_90", False),  # and not the other way round
    ((7, 5), "sm_80,sm_86,sm_89,sm_90,compute_90", False),
    ((8, 0), "sm_90,compute_90", False),
    ((9, 0), "sm_80,sm_86", False),  # another major number needs PTX
    ((9, 0), "sm_80,compute_80", True),
    ((12, 0), "sm_90,compute_90", True),
    ((12, 1), "sm_75,sm_120,compute_120", True),
    ((10, 0), "sm_120,compute_120", False),
    ((10, 3), "sm_100a", False),
    ((10, 0), "compute_100a", True),
    ((10, 3), "compute_100a", False),
    ((10, 3), "sm_100f", True),
    ((12, 0), "compute_100f", False),
    ((7, 5), "", True),  # a library that does not say
])  # fmt: skip
def test_a_gpu_runs_the_code_that_was_built_for_it(capability, built, runs):
    reason = kernels._no_code_for(capability, built)
    assert bool(reason) != runs
    if reason:
        assert f"{capability[0]}.{capability[1]}" in reason
        assert built in reason


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(capability, built): the current GPU, and what the library was built for."""

    def pretend(capability, built):
        monkeypatch.setitem(kernels._MISSING, "cuda", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(kernels, "_cuda_architectures", lambda: built)
        kernels._announce.cache_clear()

    yield pretend
    kernels._announce.cache_clear()


def test_auto_takes_pytorch_where_the_library_has_no_code_for_the_gpu_and_says_so_once(gpu_of, caplog):
    gpu_of((7, 5), "sm_80,sm_90,compute_90")
    with caplog.at_level(logging.INFO):
        assert [kernels.uses_kernel("auto", "cuda") for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "7.5" in record.message
    assert "sm_80,sm_90,compute_90" in record.message


def test_cuda_by_name_is_an_error_where_the_library_has_no_code_for_the_gpu(gpu_of):
    gpu_of((7, 5), "sm_80,sm_90,compute_90")
    with pytest.raises(ValueError, match=r'7\.5.*TORCH_CUDA_ARCH_LIST="7\.5" pip install'):
        kernels.uses_kernel("cuda", "cuda")
    assert not kernels.uses_kernel("torch", "cuda")


def test_the_kernel_is_taken_where_the_library_has_code_for_the_gpu(gpu_of):
    gpu_of((8, 6), "sm_80,sm_90,compute_90")
    assert missing_kernel("cuda") == ""
    assert kernels.uses_kernel("auto", "cuda")
    assert kernels.uses_kernel("cuda", "cuda")


def test_without_a_gpu_only_the_library_is_asked(monkeypatch):
    monkeypatch.setitem(kernels._MISSING, "cuda", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_kernel("cuda") == ""


def test_tracing_takes_the_gpu_for_a_constant(monkeypatch):
    monkeypatch.setitem(kernels._MISSING, "cuda", "")
    monkeypatch.setattr(kernels, "_cuda_architectures", lambda: "sm_80")
    capabilities = {None: (7, 5), 0: (7, 5), 1: (8, 6)}
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=capabilities.__getitem__)
    standin = SimpleNamespace(cuda=cuda, device=torch.device)
    monkeypatch.setattr(kernels, "torch", standin)  # PyTorch itself must not believe in it
    for device, expected in (("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)):  # unlike GPUs
        traced = torch.compile(
            lambda x, d=device: x + 1 if missing_kernel(d) else x + 2, fullgraph=True, backend="eager"
        )
        assert traced(torch.zeros(1)).item() == expected
        assert bool(missing_kernel(torch.device(device))) == (expected == 1)


@needs_kernel
def test_the_library_says_what_it_was_built_for():
    assert ("cuda" in torch.ops.dn_detr_d2.build_info()) == bool(torch.ops.dn_detr_d2.cuda_architectures())


def test_a_gpu_without_code_is_told_of_where_another_has_it(monkeypatch, caplog):
    """The reason is that of the tensors' GPU, not of the current one."""
    monkeypatch.setitem(kernels._MISSING, "cuda", "")
    monkeypatch.setattr(kernels, "_missing_on_gpu", lambda index: "no code for 7.5" if index == 1 else "")
    kernels._announce.cache_clear()
    with caplog.at_level(logging.INFO, kernels.__name__):
        assert kernels.uses_kernel("auto", torch.device("cuda:0"))
        assert not kernels.uses_kernel("auto", torch.device("cuda:1"))
    kernels._announce.cache_clear()
    assert "no code for 7.5" in caplog.messages[-1]
