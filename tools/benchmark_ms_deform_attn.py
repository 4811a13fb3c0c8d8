"""Times deformable attention on the CPU against what PyTorch offers, and writes a CSV and a plot.

    python tools/benchmark_ms_deform_attn.py --device cpu --quick

All rivals of a row run interleaved in this process on the same inputs; a ratio is the median of the rounds' ratios, with its
smallest and largest value. "error" is the relative L2 distance to the float64 result. Rivals: ``grid_sample``, one call a
level; a gather of the four corners under ``torch.compile``; the unfused module arithmetic. Times in ms are of this
machine; compare ratios.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr_d2.layers import missing_kernel, ms_deform_attn, ms_deform_attn_fused
from dn_detr_d2.layers.ms_deform_attn import locations_from_boxes, locations_from_points

Shapes = list[tuple[int, int]]


def pyramid(height: int, width: int) -> Shapes:
    """Level sizes at strides 8 to 64, as in Deformable DETR."""
    return [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64)]


def make_case(height, width, queries=None, n=1, h=8, d=32, k=4, dtype=torch.float32, seed=0) -> dict:
    """Inputs of an encoder (``queries`` None: one a cell, points around it) or of a decoder (boxes at random)."""
    torch.manual_seed(seed)
    shapes = pyramid(height, width)
    s, levels = sum(a * b for a, b in shapes), len(shapes)
    if queries is None:
        axes = [
            torch.meshgrid((torch.arange(a) + 0.5) / a, (torch.arange(b) + 0.5) / b, indexing="ij") for a, b in shapes
        ]
        centres = torch.cat([torch.stack([x, y], -1).view(-1, 2) for y, x in axes])
        reference = centres[None, :, None].expand(n, -1, levels, -1)
    else:
        reference = torch.cat([torch.rand(n, queries, 1, 2), torch.rand(n, queries, 1, 2) * 0.3 + 0.05], -1)
        reference = reference.expand(-1, -1, levels, -1)
    offsets = 2 * torch.randn(n, reference.shape[1], h, levels, k, 2)
    logits = torch.randn(n, reference.shape[1], h, levels, k)
    locate = locations_from_points if queries is None else locations_from_boxes
    return {
        "value": torch.randn(n, s, h, d).to(dtype),
        "shapes": shapes,
        "locations": locate(reference, offsets, shapes).contiguous(),
        "weights": logits.flatten(3).softmax(-1).view_as(logits),
        "reference": reference.contiguous(),
        "offsets": offsets,
        "logits": logits,
    }


def grid_sample_composite(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One ``grid_sample`` a level and a weighted sum, in the dtype of the values, without any check."""
    n, s, h, d = value.shape
    q = locations.shape[1]
    grids = (2 * locations - 1).to(value.dtype).transpose(1, 2).flatten(0, 1)  # (N*H, Q, L, K, 2)
    shares = weights.to(value.dtype).transpose(1, 2).reshape(n * h, 1, q, -1)
    maps = value.permute(0, 2, 3, 1).reshape(n * h, d, s).split([a * b for a, b in shapes], -1)
    sampled = [
        F.grid_sample(x.view(n * h, d, *shape), grids[:, :, level], align_corners=False)
        for level, (x, shape) in enumerate(zip(maps, shapes, strict=True))
    ]
    return (torch.stack(sampled, -2).flatten(-2) * shares).sum(-1).view(n, h * d, q).transpose(1, 2)


def gather_corners(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Four gathers a level: the form that ``torch.compile`` fuses best."""
    n, _, h, d = value.shape
    q, k = locations.shape[1], locations.shape[4]
    total, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        x, y = (locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5).unbind(-1)  # (N, Q, H, K)
        maps = value[:, start : start + height * width].transpose(1, 2)  # (N, H, S_l, D)
        for dy in (0, 1):
            for dx in (0, 1):
                cx, cy = x.floor() + dx, y.floor() + dy
                inside = (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
                share = (1 - (x - cx).abs()) * (1 - (y - cy).abs()) * inside * weights[:, :, :, level]
                cell = (cy.clamp(0, height - 1) * width + cx.clamp(0, width - 1)).long()
                cell = cell.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, d)
                corner = maps.gather(2, cell).view(n, h, q, k, d)
                total = total + (corner * share.transpose(1, 2)[..., None].to(value.dtype)).sum(3)
        start += height * width
    return total.transpose(1, 2).flatten(2)


def rivals_of(case: dict, compiled: bool) -> dict:
    """Name -> (function of leaf tensors, leaf tensors)."""
    plain = (case["value"], case["locations"], case["weights"])
    raw = (case["value"], case["offsets"], case["logits"])
    shapes, reference = case["shapes"], case["reference"]
    locate = locations_from_boxes if reference.shape[-1] == 4 else locations_from_points

    def unfused(value, offsets, logits):
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        return ms_deform_attn(value, shapes, locate(reference, offsets, shapes), weights, "cpu")

    rivals = {
        "kernel": (lambda v, x, w: ms_deform_attn(v, shapes, x, w, "cpu"), plain),
        "grid_sample": (lambda v, x, w: grid_sample_composite(v, shapes, x, w), plain),
        "fused": (lambda v, o, x: ms_deform_attn_fused(v, shapes, reference, o, x, "cpu"), raw),
        "unfused": (unfused, raw),
    }
    if compiled:
        gather = torch.compile(lambda v, x, w: gather_corners(v, shapes, x, w))
        rivals["compiled gather"] = (gather, plain)
    return rivals


def run_once(function, leaves, backward: bool) -> float:
    """Seconds of one call, with the backward pass if asked for."""
    leaves = [x.detach().requires_grad_(backward) for x in leaves]
    with torch.set_grad_enabled(backward):
        start = time.perf_counter()
        out = function(*leaves)
        if backward:
            out.backward(torch.ones_like(out))
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
    """Rows of one workload: forward and forward + backward of every rival, as ratios to ours."""
    case = make_case(**sizes)
    rivals = rivals_of(case, compiled)
    rows = []
    for backward in (False, True):
        times = time_rivals(rivals, backward, rounds)
        for name, (function, leaves) in rivals.items():
            ours = "fused" if name == "unfused" else "kernel"
            ratios = [b / a for a, b in zip(times[ours], times[name], strict=True)]
            rows.append(
                {
                    "workload": title,
                    "pass": "forward+backward" if backward else "forward",
                    "rival": name,
                    "ms": 1e3 * statistics.median(times[name]),
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                    "error": error_of(function, leaves, case),
                }
            )
            print("{workload:34} {pass:17} {rival:16} {ms:9.2f} ms  {ratio:6.2f}x ({ratio_min:.2f}-{ratio_max:.2f})  "
                  "error {error:.1e}".format(**rows[-1]), flush=True)  # fmt: skip
    return rows


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
            print("{workload:34} {pass:17} {rival:16} {ms:9.2f} ms  {ratio:6.2f}x ({ratio_min:.2f}-{ratio_max:.2f})"
                  .format(**row), flush=True)  # fmt: skip
    torch.ops.dn_detr_d2.cpu_capability("best")
    return rows


def write(rows: list[dict], folder: Path) -> None:
    """``ms_deform_attn_cpu.csv`` and ``.png``: ratios to our kernel, one bar a row, with their range."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "ms_deform_attn_cpu.csv"
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["rival"] in ("grid_sample", "compiled gather", "unfused")]
    labels = [f"{row['workload']}, {row['pass']}: {row['rival']}" for row in shown]
    ratios = [row["ratio"] for row in shown]
    spread = [[r["ratio"] - r["ratio_min"] for r in shown], [r["ratio_max"] - r["ratio"] for r in shown]]
    figure, axes = plt.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    axes.barh(labels, ratios, xerr=spread, color="#4477aa", ecolor="#555555")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time of the rival / time of our kernel (median, range of the rounds)")
    axes.set_title(f"Deformable attention on the CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    figure.savefig(target.with_suffix(".png"), dpi=110)
    print(f"wrote {target} and {target.with_suffix('.png').name}")


def main() -> None:
    """Parses the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="CUDA kernels have not been timed yet")
    parser.add_argument("--quick", action="store_true", help="the four main rows")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    args = parser.parse_args()
    if reason := missing_kernel(args.device):
        sys.exit(f"error: there is nothing to time: {reason}")
    if args.rounds < 5 or args.threads < 1:
        sys.exit(f"error: --rounds must be 5 or more and --threads positive, got {args.rounds} and {args.threads}")
    torch.set_num_threads(args.threads)
    print(f"{torch.ops.dn_detr_d2.cpu_capability()}, {args.threads} threads, PyTorch {torch.__version__}, seed 0")

    rows = measure("encoder 400x667", args.rounds, compiled=not args.quick, height=400, width=667)
    rows += measure("decoder Q=500 800x1333", args.rounds, height=800, width=1333, queries=500)
    use = torch.ops.dn_detr_d2.cpu_capability
    if not args.quick:
        rows += measure("encoder 800x1333", args.rounds, height=800, width=1333)
        rows += measure("decoder Q=500 800x1333 N=2", args.rounds, height=800, width=1333, queries=500, n=2)
        rows += measure("encoder 400x667 D=48", args.rounds, height=400, width=667, d=48)
        for queries in (100, 300, 900, 1500):
            rows += measure(f"decoder Q={queries} 400x667", args.rounds, height=400, width=667, queries=queries)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = {str(x)[6:]: (make_case(400, 667, dtype=x), lambda: use("best")) for x in dtypes}
    rows += compare("encoder 400x667, stored type", 2 * args.rounds, cases, "float32")
    case = make_case(400, 667)
    names = ["default", "avx2", "avx512"]
    names = names[: names.index(use("best")) + 1]
    sets = {name: (case, lambda name=name: use(name)) for name in names}
    rows += compare("encoder 400x667, instruction set", 2 * args.rounds, sets, "default")
    write(rows, args.output)


if __name__ == "__main__":
    main()
