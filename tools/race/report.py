"""What came out of a race, as tables."""

import numpy as np
from plotting.curves import AP, reaching, spread
from plotting.runs import Group, Run

from dn_detr_d2 import UserError

from .variants import DENOISED, HALF, MATCHING

INSTABILITY = r"instability/layer_\d+"
HEADERS = (
    "training", "seeds", "final AP", "iterations to the AP of matching alone", "IS of the last layer", "anchor distance",
    "time of an iteration",
)  # fmt: skip


def rows(groups: list[Group]) -> list[list[str]]:
    """A row of text for each group; the first is the baseline.

    AP and distance are of the last evaluation, IS is the mean over the training; means over seeds, with the lowest and the
    highest behind. An evaluation that is not below the mean final AP of the baseline reaches it. Times are medians, as
    multiples of the baseline's of the same seed, with which the training took turns.
    """
    base = groups[0].runs
    goal = float(np.mean(ends(base, AP)))
    return [
        [
            group.name,
            str(len(group.runs)),
            spread(ends(group.runs, AP), ".1f"),
            reaching(group.runs, goal, ".0%", length(base[0])),
            spread(means(group.runs, INSTABILITY), ".2f"),
            spread(ends(group.runs, r"anchors/distance"), ".3f"),
            spread([pace(run) / pace(first) for run, first in zip(group.runs, base, strict=True)], ".2f"),
        ]
        for group in groups
    ]


def verdicts(groups: list[Group]) -> list[str]:
    """The claims of the paper that the numbers carry, and those they do not, one sentence each."""
    by_name = {group.name: group.runs for group in groups}
    if HALF not in by_name:
        return orders(groups)
    alone, denoised, half = (by_name[name] for name in (MATCHING, DENOISED, HALF))
    ap = [float(np.mean(ends(runs, AP))) for runs in (alone, denoised, half)]
    unstable = [float(np.mean(means(runs, INSTABILITY))) for runs in (alone, denoised)]
    distance = [float(np.mean(ends(runs, r"anchors/distance"))) for runs in (alone, denoised)]
    ratio = float(np.median([pace(a) / pace(b) for a, b in zip(denoised, alone, strict=True)]))
    return [
        claim("ends higher", ap[1] > ap[0], f"AP {ap[1]:.1f} against {ap[0]:.1f}"),
        claim("half the iterations are enough", ap[2] >= ap[0], f"AP {ap[2]:.1f} against {ap[0]:.1f}"),
        claim("matching is more stable", unstable[1] < unstable[0], f"IS {unstable[1]:.2f} against {unstable[0]:.2f}"),
        claim("anchors are nearer", distance[1] < distance[0], f"{distance[1]:.3f} against {distance[0]:.3f}"),
        claim("an iteration takes at most 1.10 times as long", ratio <= 1.10, f"{ratio:.2f}"),
    ]


def orders(groups: list[Group]) -> list[str]:
    """What each ablation does to the AP of the whole denoising, and whether it still is above matching alone."""
    alone, whole, *others = (float(np.mean(ends(group.runs, AP))) for group in groups)
    said = [
        claim(f"{groups[1].name} ends above {groups[0].name}", whole > alone, f"AP {whole:.1f} against {alone:.1f}")
    ]
    for group, ap in zip(groups[2:], others, strict=True):
        numbers = f"AP {ap:.1f}: {ap - whole:+.1f} to the whole, {ap - alone:+.1f} to matching alone"
        said.append(claim(f"{group.name} ends below the whole", ap < whole, numbers))
    return said


def claim(text: str, holds: bool, numbers: str) -> str:
    """One sentence."""
    return f"- {text}: {'yes' if holds else '**no**'} ({numbers})"


def ends(runs: list[Run], pattern: str) -> list[float]:
    """The last value of each run."""
    return [float(run.curve(pattern)[-1, 1]) for run in runs]


def means(runs: list[Run], pattern: str) -> list[float]:
    """The mean value of each run."""
    return [float(run.curve(pattern)[:, 1].mean()) for run in runs]


def ended(groups: list[Group]) -> None:
    """Raises UserError unless every training has come to its end."""
    for run in (run for group in groups for run in group.runs):
        if not (run.folder / "step_seconds.txt").is_file() or run.curve(AP) is None:
            raise UserError(f"{run.folder} has not been trained to its end; train it without --report")


def length(run: Run) -> int:
    """Iterations of a training."""
    return run.config["SOLVER"]["MAX_ITER"]


def pace(run: Run) -> float:
    """Median seconds of a step, the first ten left out."""
    seconds = [float(line) for line in (run.folder / "step_seconds.txt").read_text().split()]
    return float(np.median(seconds[min(10, len(seconds) - 1) :]))
