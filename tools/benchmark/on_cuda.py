"""The GPU's ceilings, and the scalar kernels of cuda_rivals.cu as a rival; compiled with nvcc at the first use."""

import ctypes
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cuda_rivals.cu")


@cache
def library() -> ctypes.CDLL:
    """Compiles cuda_rivals.cu for the current GPU into build/, and loads it."""
    if not shutil.which("nvcc"):
        sys.exit("error: nvcc is needed to compile the kernels to compare with, and it is not on the PATH")
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
