"""Random calls of the deformable attention kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python dev/fuzz_ms_deform_attn.py --cases 1000000

Builds dev/fuzz/ with the kernels of csrc/ (every instruction set of this processor, and the CUDA kernels on an emulator
that runs them on the CPU), and compares each call with slow loops in float64. A case is made from its number: what a
report names can be repeated with ``--first NUMBER --cases 1``. Exit code 1: a mismatch or a sanitizer's report.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import UserError
from dn_detr_d2.command_line import run_command

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted(ROOT.glob("csrc/cpu/kernels_*.cpp")),
    ROOT / "dev" / "fuzz" / "cuda_on_cpu.cpp",
    ROOT / "dev" / "fuzz" / "main.cpp",
]
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-DDN_DETR_SANITIZED"]
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-clobbered", "-Wno-unknown-pragmas"]


def find_compiler() -> str:
    """Name of a C++ compiler, "" if there is none."""
    return next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and shutil.which(name)), "")


def build(jobs: int = 2, *, sanitize: bool = True) -> Path:
    """Compiles what has changed since the last time; returns the program. Without sanitizers it is soon built."""
    sanitizers = SANITIZE if sanitize else []
    compiler = find_compiler()
    if not compiler:
        raise UserError("no C++ compiler was found (g++ or clang++, or set CXX)")
    headers = [
        *ROOT.glob("csrc/*.h"),
        *ROOT.glob("csrc/cpu/*.h"),
        *ROOT.glob("csrc/cuda/*.cuh"),
        *ROOT.glob("dev/fuzz/*.h"),
    ]
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, *sanitizers]).encode())
    for path in sorted([*SOURCES, *headers]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "fuzz" / digest.hexdigest()[:16]
    program = folder / "fuzz"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, *sanitizers, "-c", str(source), "-o", target], check=True)
        return target

    print(f"building {program} ({len(SOURCES)} files{', with sanitizers: about a minute' * sanitize})", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    subprocess.run([compiler, *sanitizers, *objects, "-o", str(program)], check=True)
    return program


def run(
    program: Path, seed: int, first: int, cases: int, cuda_every: int, jobs: int = 1, plant: str = ""
) -> tuple[int, str]:
    """Runs the cases in ``jobs`` processes; returns (worst exit code, what they printed)."""
    share = -(-cases // jobs)
    commands = [
        [str(program), str(seed), str(start), str(min(share, first + cases - start)), str(cuda_every), plant]
        for start in range(first, first + cases, share)
    ]
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in started]
    return max(abs(process.returncode) for process in started), "".join(outputs)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--cuda-every", type=int, default=500, help="also emulate the CUDA kernels for every n-th case; 0: never"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args(argv)


def fuzz(args: argparse.Namespace) -> int:
    """Runs the cases and prints what they report; 1 if one of them failed."""
    if args.cases < 1 or args.jobs < 1 or args.cuda_every < 0:
        raise UserError("--cases and --jobs must be positive, --cuda-every not negative")
    code, output = run(build(args.jobs), args.seed, args.first, args.cases, args.cuda_every, args.jobs)
    print(output, end="")
    return 1 if code else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: fuzz(args))


if __name__ == "__main__":
    sys.exit(main())
