"""How the kernel's time grows with each size: what one unit of work costs, relative to a base point."""

import csv
import re
import statistics
import time
from pathlib import Path

import torch

from dn_detr_d2.layers import ms_deform_attn

from .cases import make_case

BASE = {"height": 400, "width": 667}
DECODER = {**BASE, "queries": 300}

# curve -> (label of the point -> sizes of the case); the first point is the base, the others are compared with it
CURVES = {
    "tokens (encoder)": {
        f"{h}x{w}": {"height": h, "width": w}
        for h, w in ((400, 667), (566, 943), (800, 1333), (1131, 1885), (1600, 2666))
    },
    "queries (decoder)": {str(q): {**BASE, "queries": q} for q in (300, 100, 500, 900, 1500)},
    "channels a head": {f"D={d}": {**BASE, "d": d} for d in (32, 16, 48, 64, 33, 71)},
    "heads": {f"H={h}": {**BASE, "h": h} for h in (8, 1, 4, 16)},
    "points": {f"K={k}": {**BASE, "k": k} for k in (4, 1, 8)},
    "levels": {f"L={x}": {**BASE, "levels": x} for x in (4, 1, 2, 3, 5)},
    "batch (decoder)": {f"N={n}": {**DECODER, "n": n} for n in (1, 2, 4, 8, 16)},
    "batch (encoder)": {f"N={n}": {**BASE, "n": n} for n in (1, 2, 4)},
}


def seconds_of(case: dict, backward: bool) -> float:
    """Seconds of one call of the kernel; short calls are repeated until 20 ms are filled."""
    leaves = [case[name].detach().requires_grad_(backward) for name in ("value", "locations", "weights")]
    start, calls = time.perf_counter(), 0
    with torch.set_grad_enabled(backward):
        while calls == 0 or time.perf_counter() - start < 0.02:
            out = ms_deform_attn(leaves[0], case["shapes"], *leaves[1:], "cpu")
            if backward:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            calls += 1
    return (time.perf_counter() - start) / calls


def work_of(case: dict) -> int:
    """Multiplications by a corner: N Q H L K D."""
    return case["weights"].numel() * case["value"].shape[3]


def measure_curve(curve: str, points: dict, rounds: int, threads: dict[str, int]) -> list[dict]:
    """Rows of a curve; all points run interleaved. ``threads``: label -> number of threads, the given one if missing."""
    cases = {label: make_case(**sizes) for label, sizes in points.items()}
    usual, rows, base = torch.get_num_threads(), [], next(iter(points))
    for backward in (False, True):
        times = {label: [] for label in cases}
        for round_ in range(rounds + 1):
            for label, case in cases.items():
                torch.set_num_threads(threads.get(label, usual))
                seconds = seconds_of(case, backward)
                if round_:
                    times[label].append(seconds)
        for label, seconds in times.items():
            share = work_of(cases[label]) / work_of(cases[base])
            ratios = [a / b / share for a, b in zip(seconds, times[base], strict=True)]
            rows.append(
                {
                    "curve": curve,
                    "point": label,
                    "pass": "forward+backward" if backward else "forward",
                    "ms": 1e3 * statistics.median(seconds),
                    "unit_cost": statistics.median(ratios),
                    "unit_cost_min": min(ratios),
                    "unit_cost_max": max(ratios),
                }
            )
            print(
                "{curve:20} {point:12} {pass:17} {ms:9.2f} ms  {unit_cost:5.2f}x a unit "
                "({unit_cost_min:.2f}-{unit_cost_max:.2f})".format(**rows[-1]),
                flush=True,
            )
    torch.set_num_threads(usual)
    return rows


def measure_curves(rounds: int, most_threads: int) -> list[dict]:
    """All curves. Threads: powers of two up to ``most_threads``, the time of one call against that of one thread."""
    rows = []
    for curve, points in CURVES.items():
        rows += measure_curve(curve, points, rounds, {})
    counts = powers_of_two(most_threads)
    for name, sizes in (("threads (encoder)", BASE), ("threads (decoder)", DECODER)):
        labels = {f"{count} threads": count for count in counts}
        rows += measure_curve(name, dict.fromkeys(labels, sizes), rounds, labels)
    return rows


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to ``most``."""
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def write_rows(rows: list[dict], target: Path) -> None:
    """Rows with the same keys as CSV."""
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def size_of(row: dict) -> int:
    """The first number of a point's label, by which the points of a plot are sorted."""
    return int(re.search(r"\d+", row["point"])[0])


def write_curves(rows: list[dict], folder: Path) -> None:
    """``ms_deform_attn_curves_cpu.csv`` and ``.png``, one panel a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "ms_deform_attn_curves_cpu.csv"
    write_rows(rows, target)
    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure, panels = plt.subplots(
        2, -(-len(names) // 2), figsize=(3.1 * -(-len(names) // 2), 6.2), layout="constrained"
    )
    for panel, name in zip(panels.flat, names, strict=False):
        for kind, colour in (("forward", "#4477aa"), ("forward+backward", "#cc6677")):
            chosen = sorted((r for r in rows if r["curve"] == name and r["pass"] == kind), key=size_of)
            cost = [r["unit_cost"] for r in chosen]
            spread = [
                [r["unit_cost"] - r["unit_cost_min"] for r in chosen],
                [r["unit_cost_max"] - r["unit_cost"] for r in chosen],
            ]
            panel.errorbar(
                [r["point"] for r in chosen], cost, yerr=spread, marker="o", capsize=2, label=kind, color=colour
            )
        panel.set_title(name)
        panel.set_ylim(bottom=0)
        panel.axhline(1, color="black", linewidth=0.6)
        panel.tick_params(axis="x", labelrotation=45)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for row in panels:
        row[0].set_ylabel("time a unit of work, relative")
    panels.flat[0].legend()
    figure.savefig(target.with_suffix(".png"), dpi=100)
    print(f"wrote {target} and {target.with_suffix('.png').name}")
