"""Times deformable attention against what PyTorch offers, and writes a CSV and a plot.

    python dev/benchmark_ms_deform_attn.py --device cpu --quick
    python dev/benchmark_ms_deform_attn.py --device cpu --curves
    python dev/benchmark_ms_deform_attn.py --device cuda

All rivals of a row run in this process on the same inputs, on the CPU interleaved; a ratio is the median of the rounds'
ratios, with its smallest and largest value. On a GPU the kernels are timed and not Python: a CUDA graph holds one call for
each of several input sets, more than the L2 cache holds, and forward and backward pass are timed
apart. "error" is the relative L2 distance to the float64 result. Rivals: ``grid_sample``, one call a level; reads of
the four corners under ``torch.compile``, by gather and by index; the unfused module arithmetic; on a GPU also a
kernel with one thread a channel, after the GPU's measured ceilings. ``--curves`` measures how our time grows with
each size. Times in ms are of this machine; compare ratios.
"""

import argparse
import csv
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dev.benchmark import on_cuda
from dev.benchmark.cases import gather_corners, grid_sample_composite, make_case
from dev.benchmark.curves import measure_curves, write_curves
from dn_detr_d2 import UserError
from dn_detr_d2.command_line import run_command
from dn_detr_d2.layers import missing_kernel, ms_deform_attn, ms_deform_attn_fused
from dn_detr_d2.layers.ms_deform_attn import locations_from_boxes, locations_from_points

RIVALS = ("grid_sample", "compiled gather", "compiled indexing", "scalar kernel", "unfused")


@functools.cache
def compiled_gather(shapes: tuple, by_index: bool):
    """The compiled form of :func:`gather_corners`, the same function for all input sets."""
    return torch.compile(lambda v, x, w: gather_corners(v, list(shapes), x, w, by_index))


def rivals_of(case: dict, compiled: bool) -> dict:
    """Name -> (function of leaf tensors, leaf tensors)."""
    plain = (case["value"], case["locations"], case["weights"])
    raw = (case["value"], case["offsets"], case["logits"])
    shapes, reference, device = case["shapes"], case["reference"], case["value"].device.type
    locate = locations_from_boxes if reference.shape[-1] == 4 else locations_from_points

    def unfused(value, offsets, logits):
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        return ms_deform_attn(value, shapes, locate(reference, offsets, shapes), weights, device)

    rivals = {
        "kernel": (lambda v, x, w: ms_deform_attn(v, shapes, x, w, device), plain),
        "grid_sample": (lambda v, x, w: grid_sample_composite(v, shapes, x, w), plain),
        "fused": (lambda v, o, x: ms_deform_attn_fused(v, shapes, reference, o, x, device), raw),
        "unfused": (unfused, raw),
    }
    if compiled:
        rivals["compiled gather"] = (compiled_gather(tuple(shapes), False), plain)
        rivals["compiled indexing"] = (compiled_gather(tuple(shapes), True), plain)
    if device == "cuda":
        rivals["scalar kernel"] = (lambda v, x, w: on_cuda.ScalarAttention.apply(v, x, w, shapes), plain)
    return rivals


def run_once(function, leaves, backward: bool) -> float:
    """Seconds of one call, with the backward pass if asked for."""
    leaves = [x.detach().requires_grad_(backward) for x in leaves]

    def call():
        out = function(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    with torch.set_grad_enabled(backward):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def time_rivals(rivals: dict, backward: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round, after one round that is not counted."""
    times = {name: [] for name in rivals}
    for round_ in range(rounds + 1):
        for name, (function, leaves) in rivals.items():
            seconds = run_once(function, leaves, backward)
            if round_:
                times[name].append(seconds)
    return times


def error_of(function, leaves, case: dict) -> float:
    """Relative L2 distance of the output to the float64 result of the definition."""
    with torch.no_grad():
        locations, weights = case["locations"].double(), case["weights"].double()
        exact = ms_deform_attn(case["value"].double(), case["shapes"], locations, weights, "torch")
        return ((function(*leaves).double() - exact).norm() / exact.norm()).item()


def measure(title: str, rounds: int, compiled: bool = False, **sizes) -> list[dict]:
    """Rows of one workload on the CPU: forward and forward + backward of every rival, as ratios to ours."""
    case = make_case(**sizes)
    rivals = rivals_of(case, compiled)
    rows = []
    for backward in (False, True):
        times = time_rivals(rivals, backward, rounds)
        errors = {name: error_of(function, leaves, case) for name, (function, leaves) in rivals.items()}
        rows += make_rows(title, "forward+backward" if backward else "forward", times, errors)
    return rows


def measure_kernels(title: str, rounds: int, compiled: bool = False, record=on_cuda.Graph, **sizes) -> list[dict]:
    """Rows of one workload on a GPU: forward and backward pass of every rival apart, as ratios to ours.

    Args:
        title: of the rows.
        rounds: of each rival, one rival after the other: the graphs of all of them would not fit beside each other.
        compiled: whether to time the compiled rivals too.
        record: makes what is replayed, see :func:`benchmark.on_cuda.seconds_by_graph`.
        sizes: of :func:`benchmark.cases.make_case`, and ``device``.
    """
    device, cache = sizes.pop("device"), torch.cuda.get_device_properties().L2_cache_size
    cases = [on_device(make_case(**sizes), device)]
    count = on_cuda.count_sets(cases[0]["value"].nbytes, cache)
    cases += [on_device(make_case(**sizes, seed=seed), device) for seed in range(1, count)]
    sets = [rivals_of(case, compiled) for case in cases]
    errors = {name: error_of(function, leaves, cases[0]) for name, (function, leaves) in sets[0].items()}
    rows = []
    for backward in (False, True):
        times = {
            name: on_cuda.seconds_by_graph([on_cuda.calls_of(*x[name], backward) for x in sets], rounds, record)
            for name in sets[0]
        }
        rows += make_rows(title, "backward" if backward else "forward", times, errors)
    return rows


def on_device(case: dict, device: str) -> dict:
    """The case with its tensors on ``device``."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.items()}


def make_rows(title: str, what: str, times: dict[str, list[float]], errors: dict[str, float]) -> list[dict]:
    """One printed row a rival; ``what`` was timed: the name of the pass. ``times``: seconds of each round."""
    rows = []
    for name, seconds in times.items():
        ours = "fused" if name == "unfused" else "kernel"
        ratios = [b / a for a, b in zip(times[ours], seconds, strict=True)]
        rows.append(
            {
                "workload": title,
                "pass": what,
                "rival": name,
                "ms": 1e3 * statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "error": errors[name],
            }
        )
        print(
            "{workload:36} {pass:17} {rival:16} {time}  {ratio:6.2f}x ({ratio_min:.2f}-{ratio_max:.2f})  "
            "error {error:.1e}".format(**rows[-1], time=as_text(rows[-1]["ms"])),
            flush=True,
        )
    return rows


def as_text(ms: float) -> str:
    """A time with three digits or more: microseconds below one millisecond."""
    return f"{ms:9.2f} ms" if ms >= 1 else f"{1e3 * ms:9.1f} us"


def compare(title: str, rounds: int, variants: dict, rival_of: str) -> list[dict]:
    """Our kernel in several variants: name -> (case, what to do before the call), as ratios to ``rival_of``."""
    rows = []
    for backward in (False, True):
        times = {name: [] for name in variants}
        for round_ in range(rounds + 1):
            for name, (case, prepare) in variants.items():
                prepare()
                function, leaves = rivals_of(case, False)["kernel"]
                seconds = run_once(function, leaves, backward)
                if round_:
                    times[name].append(seconds)
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times[rival_of], strict=True)]
            row = {
                "workload": title,
                "pass": "forward+backward" if backward else "forward",
                "rival": name,
                "ms": 1e3 * statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "error": float("nan"),
            }
            rows.append(row)
            print(
                "{workload:36} {pass:17} {rival:16} {ms:9.2f} ms  {ratio:6.2f}x ({ratio_min:.2f}-{ratio_max:.2f})".format(
                    **row
                ),
                flush=True,
            )
    torch.ops.dn_detr_d2.cpu_capability("best")
    return rows


def write(rows: list[dict], folder: Path, device: str) -> None:
    """``ms_deform_attn_DEVICE.csv`` and ``.png``: ratios to our kernel, one bar a row, with their range."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"ms_deform_attn_{device}.csv"
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["rival"] in RIVALS]
    labels = [f"{row['workload']}, {row['pass']}: {row['rival']}" for row in shown]
    ratios = [row["ratio"] for row in shown]
    spread = [[r["ratio"] - r["ratio_min"] for r in shown], [r["ratio_max"] - r["ratio"] for r in shown]]
    figure, axes = plt.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    axes.barh(labels, ratios, xerr=spread, color="#4477aa", ecolor="#555555")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time of the rival / time of our kernel (median, range of the rounds)")
    axes.set_title(f"Deformable attention on {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    figure.savefig(target.with_suffix(".png"), dpi=110)
    print(f"wrote {target} and {target.with_suffix('.png').name}")


def measure_on_cpu(rounds: int, quick: bool) -> list[dict]:
    """The four main rows, and with ``quick`` off the larger ones and the compiled rivals."""
    rows = measure("encoder 400x667", rounds, height=400, width=667)
    rows += measure("decoder Q=500 800x1333", rounds, height=800, width=1333, queries=500)
    use = torch.ops.dn_detr_d2.cpu_capability
    if not quick:
        rows += measure("encoder 400x667 beside compiled code", rounds, compiled=True, height=400, width=667)
        rows += measure("encoder 800x1333", rounds, height=800, width=1333)
        rows += measure("decoder Q=500 800x1333 N=2", rounds, height=800, width=1333, queries=500, n=2)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = {str(x)[6:]: (make_case(400, 667, dtype=x), lambda: use("best")) for x in dtypes}
    rows += compare("encoder 400x667, stored type", 2 * rounds, cases, "float32")
    case = make_case(400, 667)
    names = ["default", "avx2", "avx512"]
    names = names[: names.index(use("best")) + 1]
    sets = {name: (case, lambda name=name: use(name)) for name in names}
    return rows + compare("encoder 400x667, instruction set", 2 * rounds, sets, "default")


def measure_on_cuda(rounds: int, quick: bool) -> list[dict]:
    """The GPU's ceilings are printed first; then encoder and decoder, in float32 and with bfloat16 values."""
    print(torch.cuda.get_device_name())
    for name, rate in on_cuda.measure_ceilings().items():
        print(f"ceiling: {name:28} {rate:8.0f} GB/s", flush=True)
    rows = []
    for n in (1,) if quick else (1, 2, 16):
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {"height": 800, "width": 1333, "n": n, "dtype": dtype, "device": "cuda"}
            kind = f"N={n} {str(dtype)[6:]}"
            rows += measure_kernels(f"encoder 800x1333 {kind}", rounds, compiled=not quick and n == 1, **sizes)
            rows += measure_kernels(f"decoder Q=900 800x1333 {kind}", rounds, queries=900, **sizes)
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="the main rows")
    parser.add_argument("--curves", action="store_true", help="how the time grows with each size, on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; --curves goes up to them")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    return parser.parse_args(argv)


def benchmark(args: argparse.Namespace) -> None:
    """Measures and writes."""
    if reason := missing_kernel(args.device):
        raise UserError(f"there is nothing to time: {reason}")
    if args.rounds < 5 or args.threads < 1:
        raise UserError(f"--rounds must be 5 or more and --threads positive, got {args.rounds} and {args.threads}")
    if args.curves and args.device != "cpu":
        raise UserError("--curves are measured on the CPU only: leave --device cuda out")
    torch.set_num_threads(args.threads)
    print(f"{torch.ops.dn_detr_d2.cpu_capability()}, {args.threads} threads, PyTorch {torch.__version__}, seed 0")
    if args.curves:
        write_curves(measure_curves(args.rounds, args.threads), args.output)
        return
    run = measure_on_cuda if args.device == "cuda" else measure_on_cpu
    write(run(args.rounds, args.quick), args.output, args.device)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
