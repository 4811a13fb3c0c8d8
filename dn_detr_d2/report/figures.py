"""Curves of a training and of its last evaluation as figures of matplotlib.

Shapes: T IoU thresholds, R recalls, K classes.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.precision_recall import PrecisionRecall
from ..visualization.runs import Run
from ..visualization.style import colour, line_style, new_figure

PANEL = (5.4, 3.2)  # inches
NAMED = 18  # curves with a place in the legend; more are drawn without names
SPARSE = 40  # curves of fewer points have markers
# Titles of the panels of losses, and which keys of metrics.json each shows.
LOSSES = {
    "sums of the groups": r"total_loss|loss_\w+|(.*/)?validation/total_loss",
    "main: matching queries, last layer": r"main/.*",
    "aux: matching queries, the other layers": r"aux/.*",
    "dn: denoising queries, last layer": r"dn/[a-z0-9]*[a-z]\d?",
    "proposal: cells of the encoder": r"proposal/.*",
    "unlabeled: matching queries, last layer": r"unlabeled/main/.*",
    "unlabeled: denoising queries, last layer": r"unlabeled/dn/[a-z0-9]*[a-z]\d?",
    "pseudo labels": r"pseudo_labels/.*",
}
DIAGNOSTICS = {
    "instability IS (changed queries an image)": r"instability/layer_\d+",
    "anchor distance (L1 of cxcywh in [0, 1])": r"anchors/distance.*",
    "restored labels of denoising queries": r"denoising/accuracy@.*",
    "IoU of restored boxes": r"denoising/iou@.*",
}
METRICS = {"AP, PQ or mIoU (0 to 100)": r"(.*/)?((bbox|segm)/AP|panoptic_seg/PQ|sem_seg/mIoU)"}


def curves(run: Run, panels: dict[str, str]) -> Figure | None:
    """A panel for each title whose pattern fits keys of metrics.json, against iterations; None if none does."""
    found = {title: _matching(run, pattern) for title, pattern in panels.items()}
    found = {title: keys for title, keys in found.items() if keys}
    if not found:
        return None
    columns = min(len(found), 2)
    figure, axes = new_figure(-(-len(found) // columns), columns, PANEL)
    for axis, (title, keys) in zip(axes, found.items(), strict=False):
        for i, key in enumerate(keys):
            points = run.curves[key]
            marker = "o" if len(points) < SPARSE else ""
            style = {"marker": marker, "markersize": 3, "linewidth": 1.2}
            axis.plot(*points.T, linestyle=line_style(i), color=colour(i), label=key, **style)
        axis.set(title=title, xlabel="iterations")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        _finish(axis, len(keys))
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    return figure


def _matching(run: Run, pattern: str) -> list[str]:
    """Keys in the order of their numbers."""
    return sorted((key for key in run.curves if re.fullmatch(pattern, key)), key=lambda key: (len(key), key))


def class_bars(values: dict[str, float], label: str) -> Figure:
    """{class: AP} as bars, best first; classes without objects, whose AP is not a number, stay out."""
    ranked = sorted(((x, name) for name, x in values.items() if np.isfinite(x)), reverse=True)
    figure, (axis,) = new_figure(1, 1, (8, 0.9 + 0.2 * len(ranked)))
    numbers, names = [x for x, _ in ranked], [name for _, name in ranked]
    bars = axis.barh(range(len(names)), numbers, color=colour(0))
    axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel=label, xlim=(0, 105), ylim=(len(names) - 0.4, -0.6))
    return figure


def precision_recall(found: PrecisionRecall) -> Figure:
    """Precision against recall: the mean over classes at some IoU thresholds, and each class at IoU 0.5."""
    figure, (left, right) = new_figure(1, 2, PANEL)
    for i, threshold in enumerate((0.5, 0.75, 0.9)):
        left.plot(found.recalls, found.mean_at(threshold), color=colour(i), label=f"IoU {threshold}")
    left.plot(found.recalls, found.mean(), color=colour(3), linestyle="--", label="mean, 0.5 to 0.95")
    left.set(title="mean over the classes")
    at_half = found.at(0.5)
    for i in found.with_objects():
        alpha = 1 if len(found.classes) <= NAMED else 0.35
        right.plot(found.recalls, at_half[:, i], color=colour(i), label=found.classes[i], alpha=alpha, linewidth=1.2)
    right.set(title="each class, IoU 0.5")
    for axis, count in ((left, 4), (right, len(found.classes))):
        axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        _finish(axis, count)
    return figure


def _finish(axis, count: int) -> None:
    axis.grid(alpha=0.3)
    if count <= NAMED:
        axis.legend(fontsize=7, frameon=False, ncols=1 + count // 10)


def last_values(run: Run) -> dict[str, float]:
    """{key: its last value that is a number}."""
    return {key: float(points[-1, 1]) for key, points in run.curves.items()}


def command_lines(log: Path) -> Iterable[str]:
    """How a training was started, and each time it was resumed, from its log.txt."""
    if log.is_file():
        with log.open(errors="backslashreplace") as file:
            for line in file:
                if match := re.search(r"Command line arguments: (.*)", line):
                    yield match[1].rstrip()
