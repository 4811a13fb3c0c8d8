"""The GPU's ceilings, and the scalar kernels of cuda_rivals.cu as a rival; compiled with nvcc at the first use."""

import ctypes
import math
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dn_detr_d2 import UserError

SOURCE = Path(__file__).with_name("cuda_rivals.cu")


@cache
def library() -> ctypes.CDLL:
    """Compiles cuda_rivals.cu for the current GPU into build/, and loads it."""
    if not shutil.which("nvcc"):
        raise UserError("nvcc is needed to compile the kernels to compare with, and it is not on the PATH")
    major, minor = torch.cuda.get_device_capability()
    target = SOURCE.parents[2] / "build" / f"cuda_rivals_sm{major}{minor}.so"
    target.parent.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "--shared", "-Xcompiler", "-fPIC"]
    subprocess.run(["nvcc", *flags, "-o", str(target), str(SOURCE)], check=True)
    return ctypes.CDLL(str(target))


def call(name: str, *arguments) -> None:
    """Calls a function of the library on the current stream; tensors are passed as pointers."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    passed = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    if code := getattr(library(), name)(*passed, stream):
        raise RuntimeError(f"the kernel {name!r} of {SOURCE.name} failed with CUDA error {code}")


def as_ints(values) -> ctypes.Array:
    """A C array of ints."""
    values = list(values)
    return (ctypes.c_int * len(values))(*values)


class ScalarAttention(torch.autograd.Function):
    """The operator in float32 with one thread a channel; other types are cast to float32 and back, as AMP users do."""

    @staticmethod
    def forward(ctx, value, locations, weights, shapes):
        """Arguments as those of the operator, in another order."""
        tensors = [x.float().contiguous() for x in (value, locations, weights)]
        n, s, h, d = value.shape
        sizes = as_ints([n, s, h, d, *(locations.shape[i] for i in (1, 3, 4))])
        output = torch.empty(n, locations.shape[1], h * d, device=value.device)
        call("forward", sizes, as_ints(x for shape in shapes for x in shape), *tensors, output)
        ctx.save_for_backward(*tensors)
        ctx.shapes, ctx.sizes, ctx.dtypes = shapes, sizes, [x.dtype for x in (value, locations, weights)]
        return output.to(value.dtype)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of value, locations and weights."""
        grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
        levels = as_ints(x for shape in ctx.shapes for x in shape)
        call("backward", ctx.sizes, levels, grad.float().contiguous(), *ctx.saved_tensors, *grads)
        return *(x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)), None


def seconds_of(function, repeats: int = 20) -> float:
    """Seconds of one call, of ``repeats`` calls in a row after one that is not counted."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def count_sets(size: int, cache: int) -> int:
    """Input sets of ``size`` bytes each to go through in turn, so that none is still in a cache of ``cache`` bytes."""
    return 1 if size > 4 * cache else min(16, 1 + math.ceil(2 * cache / max(1, size)))


def calls_of(function, leaves: list[Tensor], backward: bool) -> tuple:
    """(what is done once, what is timed) for one input set: nothing and the forward pass, or forward and backward pass.

    The second takes what the first returns.
    """
    if not backward:

        def forward(_):
            with torch.no_grad():
                return function(*leaves)

        return (lambda: None), forward
    leaves = [x.detach().requires_grad_() for x in leaves]

    def prepare():
        out = function(*leaves)
        return out, torch.ones_like(out)

    return prepare, lambda made: torch.autograd.grad(made[0], leaves, made[1], retain_graph=True)


class Graph:
    """A CUDA graph of one timed call for each input set; its figures hold no time of the host.

    Everything runs on one stream: a backward pass runs on the stream of its forward pass, which must be the one recorded.
    """

    def __init__(self, jobs: list[tuple]) -> None:
        """``jobs``: of :func:`calls_of`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.made = [prepare() for prepare, _ in jobs]
            for made, (_, timed) in zip(self.made, jobs, strict=True):
                timed(made)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for made, (_, timed) in zip(self.made, jobs, strict=True):
                timed(made)
        self.milliseconds(1)

    def milliseconds(self, repeats: int) -> float:
        """Time of ``repeats`` replays, by the GPU's own clock."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def seconds_by_graph(jobs: list[tuple], rounds: int, record=Graph, least: float = 5.0) -> list[float]:
    """Seconds of one call in each round; a round takes ``least`` milliseconds or more, of 1024 replays at most."""
    graph, repeats = record(jobs), 1
    while repeats < 1024 and graph.milliseconds(repeats) < least:
        repeats *= 2
    return [graph.milliseconds(repeats) / 1e3 / repeats / len(jobs) for _ in range(rounds)]


def measure_ceilings() -> dict[str, float]:
    """GB/s of a copy (read + written), of gathers out of the L2 cache and of DRAM, and of both kinds of reductions."""
    blocks, reads = 4096, 64
    big, small = torch.zeros(2**28, device="cuda"), torch.zeros(2**22, device="cuda")  # 1 GiB, and 16 MiB: inside L2
    sink, target = torch.zeros(blocks * 256 * 4, device="cuda"), torch.empty_like(big)
    moved = blocks * 256 * reads * 16
    jobs = {
        "copy": (2 * big.nbytes, lambda: call("copy", ctypes.c_int64(big.numel() // 4), big, target)),
        "gather of 128 bytes, L2": (moved, lambda: call("gather", small.numel() // 32, reads, blocks, small, sink)),
        "gather of 128 bytes, DRAM": (moved, lambda: call("gather", big.numel() // 32, reads, blocks, big, sink)),
        "reduction, one float, L2": (moved, lambda: call("reduce", 0, small.numel() // 32, reads, blocks, small)),
        "reduction, four floats, L2": (moved, lambda: call("reduce", 1, small.numel() // 32, reads, blocks, small)),
    }
    return {name: size / seconds_of(job) / 1e9 for name, (size, job) in jobs.items()}
