"""How a training step grows with objects, image size, queries, batch, threads and processes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from detectron2.utils import comm

from dn_detr_d2.diagnostics.model_analysis import KeptBytes
from dn_detr_d2.engine.launch import launch

from .curves import powers_of_two, write_rows
from .detectors import Case, build_ours, seconds

TIMEOUT = 600.0  # seconds that a process waits for the others
COLOURS = {"time": "#4477aa", "kept": "#cc6677"}


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        label: below the axis.
        changes: fields of :class:`~dev.benchmark.detectors.Case` in place of the base's.
        opts: overrides of the config beside the base's.
        threads: of the CPU.
        processes: that train together, each with a batch of its own.
    """

    label: str
    changes: dict = field(default_factory=dict)
    opts: tuple = ()
    threads: int = 1
    processes: int = 1

    def case(self, base: Case) -> Case:
        """The case of this point."""
        return replace(base, **self.changes, opts=(*base.opts, *self.opts))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# curve -> (label of its axis, its points); the first point is the base, the others are compared with it
CURVES: dict[str, tuple[str, Callable[[], list[Point]]]] = {
    "objects": ("objects an image", lambda: [Point(str(n), {"objects": n}) for n in (7, 0, 1, 20, 60, 100, 200)]),
    "size": ("pixels of a square image", lambda: [Point(str(n), {"size": (n, n)}) for n in (256, 192, 384, 512)]),
    "queries": (
        "matching queries",
        lambda: [Point(str(n), opts=("MODEL.DN_DETR.NUM_QUERIES", n)) for n in (300, 100, 500, 900, 1500)],
    ),
    "batch": ("images a step", lambda: [Point(str(n), {"batch": n}) for n in (2, 1, 4, 8)]),
    "threads": ("CPU threads", lambda: [Point(str(n), threads=n) for n in powers_of_two(cores())]),
    "processes": (
        "processes, each with a batch of its own",
        lambda: [Point(str(n), processes=n) for n in powers_of_two(cores())],
    ),
}
ALONE = ("threads", "processes")  # what needs all cores: measured by the clock, on a machine without other work


def measure_curves(names: list[str], base: Case, rounds: int) -> dict[str, list[dict]]:
    """Rows of each curve, see :func:`measure_curve`."""
    return {name: measure_curve(name, CURVES[name][1](), base, rounds) for name in names}


def measure_curve(name: str, points: list[Point], base: Case, rounds: int) -> list[dict]:
    """One row a point: milliseconds of a training step, MiB kept for the backward pass, both over those of the first point.

    Points take turns; those of several processes run one after another. A ratio is the median over the rounds.
    """
    wall = name in ALONE
    if name == "processes":
        times = {point.label: seconds_together(point, base, rounds) for point in points}
        kept = dict.fromkeys(times, 0.0)
    else:
        detectors = {point.label: build_ours(point.case(base)) for point in points}
        kept = {label: kept_by_step(x) for label, x in detectors.items()}
        times = {label: [] for label in detectors}
        given = torch.get_num_threads()
        for _ in range(rounds):
            for point in points:
                torch.set_num_threads(point.threads if wall else given)
                step = detectors[point.label].step
                times[point.label].append(seconds(step, base.device, wall=wall))
        torch.set_num_threads(given)
    rows, first = [], points[0].label
    for label, took in times.items():
        ratios = [a / b for a, b in zip(took, times[first], strict=True)]
        rows.append(
            {
                "curve": name,
                "point": label,
                "ms": round(1e3 * median(took), 1),
                "ratio": round(median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "kept_MiB": round(kept[label] / 2**20, 1),
                "kept_ratio": round(kept[label] / kept[first], 3) if kept[first] else "",
            }
        )
        print(
            "{curve:10} {point:>6} {ms:9.1f} ms {ratio:6.2f}x ({ratio_min:.2f} to {ratio_max:.2f})".format(**rows[-1]),
            end="",
        )
        print("  kept {kept_MiB:.0f} MiB".format(**rows[-1]), flush=True)
    return rows


def kept_by_step(detector) -> int:
    """Bytes that a step keeps for its backward pass; the first step, which is not timed."""
    with KeptBytes(detector.model.parameters()) as kept:
        detector.step()
    return kept.total


def seconds_together(point: Point, base: Case, rounds: int) -> list[float]:
    """Seconds of each step of the first of so many processes, whose gradients are averaged."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "seconds.json"
        launch(_train, point.processes, 1, 0, "auto", TIMEOUT, (point.case(base), rounds, str(target)))
        return json.loads(target.read_text())


def _train(case: Case, rounds: int, target: str) -> None:
    torch.set_num_threads(1)
    detector = build_ours(case)
    took = [seconds(detector.step, case.device, wall=True) for _ in range(rounds + 1)][1:]
    if comm.is_main_process():
        Path(target).write_text(json.dumps(took))


def write_curves(curves: dict[str, list[dict]], folder: Path) -> None:
    """``detector_NAME.csv`` and ``detector_NAME.png`` for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in curves.items():
        target = folder / f"detector_{name}.csv"
        write_rows(rows, target)
        rows = sorted(rows, key=lambda row: int(row["point"]))
        at, ratio = (
            [row["point"] for row in rows],
            [row["ratio"] for row in rows],
        )  # side by side, whatever their distance
        spread = [[r["ratio"] - r["ratio_min"] for r in rows], [r["ratio_max"] - r["ratio"] for r in rows]]
        figure, panel = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
        panel.errorbar(
            at, ratio, yerr=spread, marker="o", capsize=3, color=COLOURS["time"], label="time of a training step"
        )
        if any(row["kept_ratio"] for row in rows):
            kept = [row["kept_ratio"] for row in rows]
            panel.plot(at, kept, marker="s", color=COLOURS["kept"], label="kept for the backward pass")
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(xlabel=CURVES[name][0], ylabel=f"relative to {next(iter(curves[name]))['point']}")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
        figure.savefig(target.with_suffix(".png"), dpi=100)
        plt.close(figure)
        print(f"wrote {target} and {target.with_suffix('.png').name}")
