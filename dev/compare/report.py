"""Compared trainings as a table, and which claims of the paper they support."""

import numpy as np

from dn_detr_d2 import UserError
from dn_detr_d2.visualization.curves import AP, reaching, spread
from dn_detr_d2.visualization.runs import Group, Run

from .variants import DENOISED, HALF, MATCHING, NOISES

IN_TURN = "in_turn.txt"  # in the folder of a training: names of the folders of those that it took turns with
INSTABILITY = r"instability/layer_\d+"
MIN_BASELINE_AP = 1.0  # AP below which a baseline has not begun to detect
FLAT = 1.0  # AP that a curve which has flattened gains less than in its last quarter
HEADERS = (
    "training",
    "seeds",
    "final AP",
    "iterations to the AP of matching alone",
    "IS of the last layer",
    "anchor distance",
    "time of an iteration",
)


def table_rows(groups: list[Group]) -> list[list[str]]:
    """A row of text for each group; the first is the baseline.

    AP and distance are of the last evaluation, IS is the mean over the training ("-" for detectors without queries); means
    over seeds, with the lowest and the highest behind. An evaluation that is not below the mean final AP of the baseline
    reaches it. Times are medians, as multiples of the baseline's of the same seed; of trainings that did not take turns with
    it there is none.
    """
    base = groups[0].runs
    goal = float(np.mean(final_values(base, AP)))
    return [
        [
            group.name,
            str(len(group.runs)),
            spread(final_values(group.runs, AP), ".1f"),
            reaching(group.runs, goal, ".0%", num_iterations(base[0])) if goal >= MIN_BASELINE_AP else "-",
            spread(mean_values(group.runs, INSTABILITY), ".2f") if probed(group.runs) else "-",
            spread(final_values(group.runs, r"anchors/distance"), ".3f") if probed(group.runs) else "-",
            time_of(group.runs, base),
        ]
        for group in groups
    ]


def check_claims(groups: list[Group]) -> list[str]:
    """One sentence for each claim of the paper, and whether the numbers support it."""
    by_name = {group.name: group for group in groups}
    alone, denoised = by_name[MATCHING], by_name[DENOISED]
    ratios = relative_times(denoised.runs, alone.runs)
    return [
        *check_ap(alone, denoised, by_name.get(HALF)),
        *(check_queries(alone, denoised) if probed(alone.runs) else []),
        *([check_time(float(np.median(ratios)))] if ratios else []),
        *check_ablations(groups[1:], groups[0]),
    ]


def probed(runs: list[Run]) -> bool:
    """Whether the matching of queries was measured."""
    return all(run.curve(INSTABILITY) is not None for run in runs)


def check_queries(alone: Group, denoised: Group) -> list[str]:
    """Claims about the matching: its stability, and the distance between anchors and objects."""
    distance = [float(np.mean(final_values(group.runs, r"anchors/distance"))) for group in (alone, denoised)]
    return [
        check_stability(alone, denoised),
        claim("anchors are nearer", distance[1] < distance[0], f"{distance[1]:.3f} against {distance[0]:.3f}"),
    ]


def check_ap(alone: Group, denoised: Group, half: Group | None) -> list[str]:
    """Claims about AP, unless the baseline has not begun to detect."""
    goal, whole = (float(np.mean(final_values(group.runs, AP))) for group in (alone, denoised))
    if goal < MIN_BASELINE_AP:
        return [f"- the baseline does not detect yet (AP {goal:.1f}; with denoising {whole:.1f}): AP says nothing here"]
    share = iterations_until(denoised, goal) / num_iterations(alone.runs[0])
    where = f"the mean curve crosses it at {share:.0%}" if np.isfinite(share) else "never"
    late = last_quarter(alone)
    claims = [
        claim(f"the baseline gains less than {FLAT:g} AP in its last quarter", late < FLAT, f"AP {late:+.1f}"),
        claim("ends higher", whole > goal, f"AP {whole:.1f} against {goal:.1f}"),
        claim("half the iterations reach the baseline's final AP", share <= 0.5, where),
    ]
    if half is not None:
        ap = float(np.mean(final_values(half.runs, AP)))
        claims.append(claim("a schedule of half the length is enough", ap >= goal, f"AP {ap:.1f} against {goal:.1f}"))
    return claims


def check_time(ratio: float) -> str:
    """The claim about the time of an iteration."""
    return claim("an iteration takes at most 1.10 times as long", ratio <= 1.10, f"{ratio:.2f}")


def last_quarter(group: Group) -> float:
    """What the mean AP over the runs gains in the last quarter of the iterations, read on straight lines."""
    x, y = group.band(AP)[:, :2].T
    return float(y[-1] - np.interp(0.75 * num_iterations(group.runs[0]), x, y))


def check_stability(alone: Group, denoised: Group) -> str:
    """Means over the training, and at how many of the common probes the mean over seeds lies lower."""
    unstable = [float(np.mean(mean_values(group.runs, INSTABILITY))) for group in (alone, denoised)]
    first, second = (group.band(INSTABILITY) for group in (alone, denoised))
    common, i, j = np.intersect1d(first[:, 0], second[:, 0], return_indices=True)
    lower = int((second[j, 1] < first[i, 1]).sum())
    numbers = f"mean IS {unstable[1]:.2f} against {unstable[0]:.2f}; lower at {lower} of {len(common)} probes"
    return claim("matching is more stable all along", lower == len(common), numbers)


def iterations_until(group: Group, goal: float) -> float:
    """Iterations at which the mean AP over the runs, read between evaluations on straight lines, reaches ``goal``."""
    x, y = np.concatenate([np.zeros((1, 2)), group.band(AP)[:, :2]]).T
    above = np.flatnonzero(y >= goal - 1e-9)
    if not len(above):
        return float("inf")
    k = above[0]
    return float(np.interp(goal, y[k - 1 : k + 1], x[k - 1 : k + 1])) if k else 0.0


def check_ablations(groups: list[Group], baseline: Group) -> list[str]:
    """What each ablation does to the AP of the whole denoising, the first of the groups, and where that leaves it."""
    whole, *others = (float(np.mean(final_values(group.runs, AP))) for group in groups)
    alone = float(np.mean(final_values(baseline.runs, AP)))
    claims = []
    for group, ap in zip(groups[1:], others, strict=True):
        if group.name != HALF:
            numbers = f"AP {ap:.1f}: {ap - whole:+.1f} to the whole, {ap - alone:+.1f} to matching alone"
            if group.name in {variant.name for variant in NOISES}:
                claims.append(f"- {group.name}: {numbers}")
            else:
                claims.append(claim(f"{group.name} ends below the whole", ap < whole, numbers))
    return claims


def claim(text: str, holds: bool, numbers: str) -> str:
    """One sentence."""
    return f"- {text}: {'yes' if holds else '**no**'} ({numbers})"


def final_values(runs: list[Run], pattern: str) -> list[float]:
    """The last value of each run."""
    return [float(run.curve(pattern)[-1, 1]) for run in runs]


def mean_values(runs: list[Run], pattern: str) -> list[float]:
    """The mean value of each run."""
    return [float(run.curve(pattern)[:, 1].mean()) for run in runs]


def require_complete(groups: list[Group]) -> None:
    """Raises UserError unless every training has come to its end, over equally many iterations for all seeds."""
    for group in groups:
        for run in group.runs:
            if not (run.folder / "step_seconds.txt").is_file() or not is_evaluated(run, num_iterations(run)):
                raise UserError(f"{run.folder} has not been trained to its end; train it with --resume")
            if num_iterations(run) != num_iterations(group.runs[0]) or (
                group.name != HALF and num_iterations(run) != num_iterations(groups[0].runs[0])
            ):
                raise UserError(
                    f"{run.folder} is a training of {num_iterations(run)} iterations, {groups[0].runs[0].folder} one of "
                    f"{num_iterations(groups[0].runs[0])}; they cannot be compared, so keep trainings of different "
                    "length in folders of their own (--runs)"
                )


def is_evaluated(run: Run, iterations: int) -> bool:
    """Whether a training has logged an AP after so many iterations."""
    ap = run.curve(AP)
    return ap is not None and ap[-1, 0] >= iterations


def time_of(runs: list[Run], base: list[Run]) -> str:
    """The cell of the table."""
    ratios = relative_times(runs, base)
    missing = f", {len(ratios)} of {len(runs)} runs" if 0 < len(ratios) < len(runs) else ""
    return spread(ratios, ".2f") + missing


def relative_times(runs: list[Run], base: list[Run]) -> list[float]:
    """Seconds of a step as a multiple of those of the baseline with the same seed, of the runs that took turns with it.

    Both over the steps that they took in turn: a shorter training has none where the machine may have been busier.
    """
    pairs = [(run, other) for run, other in zip(runs, base, strict=True) if took_turns(run, other)]
    seconds = [(step_seconds(run), step_seconds(other)) for run, other in pairs]
    lengths = [min(map(len, pair)) for pair in seconds]
    return [median_step(a[:n]) / median_step(b[:n]) for (a, b), n in zip(seconds, lengths, strict=True)]


def took_turns(run: Run, other: Run) -> bool:
    """Whether two trainings took turns from the first step on, so that their times can be compared; or are the same."""
    names = [path.read_text().split() if (path := x.folder / IN_TURN).is_file() else [] for x in (run, other)]
    return run.folder == other.folder or (other.folder.name in names[0] and run.folder.name in names[1])


def num_iterations(run: Run) -> int:
    """Iterations of a training."""
    return run.config["SOLVER"]["MAX_ITER"]


def step_seconds(run: Run) -> list[float]:
    """Seconds of each step of a training."""
    return [float(line) for line in (run.folder / "step_seconds.txt").read_text().split()]


def median_step(seconds: list[float]) -> float:
    """The median, the first ten left out."""
    return float(np.median(seconds[min(10, len(seconds) - 1) :]))
