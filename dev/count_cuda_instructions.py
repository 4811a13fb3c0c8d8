"""Counts what the CUDA kernels execute, from their machine code; needs nvcc and cuobjdump, but no GPU.

    python dev/count_cuda_instructions.py --architecture 90

Prints, for each kernel, the instructions that a warp executes for each (query, head) with D = 32 channels and L K =
16 points, the registers of a thread and the bytes that a thread spills. "sorted" and "gather" are the backward pass
under torch.use_deterministic_algorithms(True); gather works on (cell, head), to which 64 corners of points belong if
there are as many queries as cells. "fused" is the form that models call, with reference + offset and the softmax made in
the kernel; but when it sorts, it is the kernel for four levels and four points. Straight code counts once, the loop over
batches of points as often as it runs; both sides of a branch count, so the figure is an upper bound, except for the slow
paths out of line behind the end of the kernel.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dn_detr_d2 import UserError
from dn_detr_d2.command_line import run_command

ROOT = Path(__file__).resolve().parent.parent
CHANNELS, POINTS, CORNERS, WARP = 32, 16, 4, 32
SOURCE = f"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "{ROOT}/csrc/cuda/kernels.cuh"
using namespace dn_detr_d2;
template <bool F, int G, int V, class T> void both(Arguments<T, T> a) {{  // lanes and channels as in launch.cuh, D = 32
  forward_kernel<F, F, G, V, T, T><<<1, kThreads>>>(a);
  backward_kernel<F, F, false, 8, 4, T, T><<<1, kThreads>>>(a);
  backward_kernel<F, false, true, 8, 4, T, T><<<1, kThreads>>>(a);
}}
void all(
    Arguments<float, float> f, Arguments<__nv_bfloat16, __nv_bfloat16> b, Gather<float> gf, Gather<__nv_bfloat16> gb) {{
  gather_kernel<8, 4, float><<<1, kThreads>>>(gf);
  gather_kernel<4, 8, __nv_bfloat16><<<1, kThreads>>>(gb);
  both<false, 8, 4>(f);
  both<true, 8, 4>(f);
  both<false, 4, 8>(b);
  both<true, 4, 8>(b);
}}
"""


def find_cuobjdump() -> str:
    """Path of cuobjdump, on the PATH or in the pip package of triton; "" if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    bundled = Path(torch.__file__).parents[1] / "triton/backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else ""


def compile_kernels(architecture: str, folder: Path) -> tuple[Path, str]:
    """The cubin and what ptxas says about it."""
    source, target = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(SOURCE)
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", target, source]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"nvcc failed:\n{ran.stderr[-3000:]}")
    return target, ran.stderr


def read_usage(report: str) -> dict[str, dict]:
    """Name of each kernel -> its registers, and the bytes of spill stores and loads, from what ptxas says."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    return {name: {"registers": int(used), "spills": int(out) + int(back)} for name, out, back, used in found}


def read_instructions(listing: str) -> list[tuple[int, str]]:
    """(address, text) of a function, up to the jump to itself with which every kernel ends."""
    found = [(int(a, 16), t.strip()) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", listing)]
    exits = [i for i, (_, text) in enumerate(found) if re.search(r"\bEXIT\b", text)]
    return found[: exits[-1] + 1]


def find_loops(instructions: list[tuple[int, str]]) -> list[range]:
    """Indices from the target of each backward branch to the branch; several branches to one target are one loop."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    ends: dict[int, int] = {}
    for i, (address, text) in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$", text)
        if target and int(target[1], 16) < address:
            start = index[int(target[1], 16)]
            ends[start] = max(i, ends.get(start, 0))
    return [range(start, end + 1) for start, end in ends.items()]


def count_executed(instructions: list[tuple[int, str]], kernel: str, lanes: int, unrolled: bool = False) -> float:
    """Instructions of a warp for each of its 32 / lanes (query, head) pairs; of the gather kernel, for a (cell, head).

    The loop over batches of points is the outermost loop with a shuffle in the backward kernel and the innermost in the
    others, whose loop over channels is around it. The loop over channels runs once. ``unrolled``: there is no loop over
    batches.
    """
    if unrolled:
        if sum("LDG" in text for _, text in instructions) < POINTS * CORNERS:
            raise UserError("the loop over points was not unrolled: the compiler has changed its form")
        return len(instructions) * lanes / WARP
    with_shuffles = [x for x in find_loops(instructions) if any("SHFL" in instructions[i][1] for i in x)]
    if not with_shuffles:
        raise UserError("no loop over points was found in the machine code: the compiler has changed its form")
    batch = (max if kernel == "backward" else min)(with_shuffles, key=len)
    if kernel == "gather":
        return len(instructions) + (POINTS * CORNERS // WARP - 1) * len(batch)
    trips = POINTS // min(lanes, 8)
    return (len(instructions) + (trips - 1) * len(batch)) * lanes / WARP


def count(architecture: str) -> list[dict]:
    """One row a kernel: kernel, form, dtype, instructions, registers, spills (bytes stored and loaded)."""
    cuobjdump = find_cuobjdump()
    if not shutil.which("nvcc") or not cuobjdump:
        raise UserError("needs nvcc and cuobjdump (of the CUDA toolkit, or of the pip package triton)")
    with tempfile.TemporaryDirectory() as folder:
        cubin, report = compile_kernels(architecture, Path(folder))
        text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    usage = read_usage(report)
    rows = []
    for listing in text.split("Function : ")[1:]:
        name = listing.split()[0]
        kernel, flags, lanes = re.search(r"(forward|backward|gather)_kernelI((?:Lb[01]E)*)Li(\d+)E", name).groups()
        usual = flags[6:7] == "1"  # the second flag: the kernels for four levels and four points, which are unrolled
        executed = count_executed(read_instructions(listing), kernel, int(lanes), usual)
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        form = {"": "", "0": "plain", "1": "fused"}[flags[2:3]] + ", sorted" * (flags[10:11] == "1")
        rows.append({"kernel": kernel, "form": form, "dtype": dtype, "instructions": executed, **usage[name]})
    return sorted(rows, key=lambda row: (row["kernel"], row["form"], row["dtype"]))


def report(architecture: str) -> None:
    """Prints the table."""
    for row in count(architecture):
        print(
            "{kernel:9} {form:13} {dtype:9} {instructions:6.0f} instructions a (query, head)  {registers:4} registers  "
            "{spills:3} bytes spilled".format(**row)
        )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="90", help="as in sm_90: 80, 90, 100, ...")
    args = parser.parse_args(argv)
    return run_command(lambda: report(args.architecture))


if __name__ == "__main__":
    sys.exit(main())
