"""Groups of runs as one picture and one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .runs import AXES, Group, Run
from .style import colour, line_style, new_figure, save

# Of masks where a training has them, for that name comes last; else of boxes. Of the weights, not of their average.
AP = r"((?!ema/).*/)?(bbox|segm)/AP"
AP50 = (r"((?!ema/).*/)?(bbox|segm)/AP50", "AP50 (0 to 100)")
AVERAGED_AP = (r"ema/(.*/)?(bbox|segm)/AP", "AP of the averaged weights\n(0 to 100)")
# What a row of panels shows: (pattern of the key, label of the axis)
ROWS = (
    (AP, "AP (0 to 100)"),
    AP50,
    AVERAGED_AP,
    (r"loss_main", "matching loss,\nlast layer"),
    (r"loss_dn", "denoising loss,\nall layers"),
    (r"instability/layer_\d+", "instability IS, last layer\n(changed queries an image)"),
    (r"anchors/distance", "anchor distance\n(L1 of cxcywh in [0, 1])"),
)
UNITS = {"iterations": "iterations", "seconds": "seconds of training"}
HEADERS = ("group", "runs", "final AP", "best AP", "iterations to the baseline's final AP", "seconds an iteration")


def draw(groups: list[Group], path: str | Path, rows: Sequence[tuple[str, str]] = ROWS) -> Path:
    """Writes a picture: AP, AP50, losses, instability and anchor distance against iterations and seconds.

    A group of several runs is its mean with a band from the lowest to the highest run. Panels without data are left out.

    Args:
        groups: the first is the baseline; at least one.
        path: of the picture; its folder is made if need be.
        rows: of panels: a pattern of keys and the label of the axis.

    Raises:
        UserError: no group has any of the values, or the picture cannot be written.
    """
    shown = [[(row, axis) for axis in AXES if any(g.band(row[0], axis) is not None for g in groups)] for row in rows]
    shown = [panels for panels in shown if panels]
    if not shown:
        names, keys = [group.name for group in groups], [pattern for pattern, _ in rows]
        raise UserError(f"none of the runs {names} has a value to draw; metrics.json must hold one of {keys}")
    columns = max(map(len, shown))
    figure, panels = new_figure(len(shown), columns, (5.2, 2.5))
    for i, row in enumerate(shown):
        for panel, (quantity, axis) in zip(panels[i * columns :], row, strict=False):
            _draw_panel(panel, groups, *quantity, axis)
        for panel in panels[i * columns + len(row) : (i + 1) * columns]:
            panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2), frameon=False)
    return save(figure, Path(path))


def _draw_panel(panel, groups: list[Group], pattern: str, label: str, axis: str) -> None:
    for i, group in enumerate(groups):
        band = group.band(pattern, axis)
        name = group.name if len(group.runs) == 1 else f"{group.name}: mean, band min to max of {len(group.runs)} runs"
        x, mean, low, high = band.T if band is not None else np.empty((4, 0))
        panel.plot(x, mean, line_style(i), color=colour(i), label=name, marker="o", markersize=3, linewidth=1.5)
        if len(group.runs) > 1:
            panel.fill_between(x, low, high, color=colour(i), alpha=0.2, linewidth=0)
    panel.set(xlabel=UNITS[axis], ylabel=label)
    panel.set_xlim(left=0)
    top = panel.get_ylim()[1]  # its margin is a share of the values' range, which may be small
    panel.set_ylim(0, 1.03 * top)
    panel.grid(alpha=0.3)


def table(groups: list[Group]) -> list[list[str]]:
    """A row of text for each group, see ``HEADERS``; "-" where nothing was logged.

    Values are means over the runs, with the lowest and highest behind. The baseline is the first group; its final AP is the
    mean over its runs, and a run reaches it at its first evaluation that is not below.
    """
    finals = [_of_curves(groups[0].runs, lambda curve: curve[-1, 1])]
    goal = float(np.mean(finals[0])) if finals[0] else None
    rows = []
    for group in groups:
        final = _of_curves(group.runs, lambda curve: curve[-1, 1])
        best = _of_curves(group.runs, lambda curve: curve[:, 1].max())
        seconds = [x for run in group.runs if (x := run.seconds_an_iteration) is not None]
        pace = f"{np.median(seconds):.3g}" if seconds else "-"
        rows.append([group.name, str(len(group.runs)), spread(final), spread(best), _reached(group.runs, goal), pace])
    return rows


def _of_curves(runs: list[Run], value) -> list[float]:
    """``value`` of the AP curve of every run that has one."""
    return [float(value(curve)) for run in runs if (curve := run.curve(AP)) is not None]


def _reached(runs: list[Run], goal: float | None) -> str:
    """Mean number of iterations until the AP is at least ``goal``, over the runs that get there."""
    if goal is None:
        return "-"
    if all(run.curve(AP) is None for run in runs):
        return "-"
    return reaching(runs, goal, ".0f")


def reaching(runs: list[Run], goal: float, form: str, whole: int = 1) -> str:
    """Iterations until the AP is at least ``goal``, in units of ``whole``, over the runs that get there."""
    curves = [curve for run in runs if (curve := run.curve(AP)) is not None]
    first = [curve[curve[:, 1] >= goal - 1e-9][0, 0] / whole for curve in curves if curve[:, 1].max() >= goal - 1e-9]
    missing = f", {len(first)} of {len(runs)} runs" if len(first) < len(runs) else ""
    return spread(first, form) + missing if first else "not reached"


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean (lowest to highest); the value alone of one, "-" of none."""
    if not values:
        return "-"
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} ({low:{form}} to {high:{form}})"
