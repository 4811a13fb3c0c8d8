"""Reads what trainings have logged, and groups trainings that differ by their seed only.

A run is a folder with the metrics.json of Detectron2's JSONWriter: one JSON object a line, mostly one for every 20
iterations, whose training values are medians of those 20. *Iterations* are iterations done: the line of "iteration" 19
stands at 20.
*Seconds* are seconds of training alone, without evaluations and checkpoints: "time" is the median of the iterations since
the line before, so each line adds that median times their number, and a few slow iterations among them go unseen.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from ..errors import UserError

AXES = ("iterations", "seconds")


@dataclass
class Run:
    """One training.

    Attributes:
        folder: where it lies; its last part is the name.
        config: its config.yaml, None without one.
        curves: {key of metrics.json: (T, 2) iterations done and values, ascending}; values that are not finite left out.
        clock: (T, 2) iterations done and seconds of training until then, from (0, 0); a single row without times.
    """

    folder: Path
    config: dict | None
    curves: dict[str, np.ndarray]
    clock: np.ndarray

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    def curve(self, pattern: str, axis: str = "iterations") -> np.ndarray | None:
        """(T, 2) positions on an axis and values, or None if there are none.

        Args:
            pattern: regular expression of the whole key. Of several keys that fit, the last in the order of their numbers
                is taken, which is the last decoder layer; of several test sets, the first of the config.
            axis: "iterations" or "seconds".
        """
        keys = [key for key in self.curves if re.fullmatch(pattern, key)]
        tests = ((self.config or {}).get("DATASETS") or {}).get("TEST") or []
        preferred = [key for key in keys if tests and key.removeprefix("ema/").startswith(f"{tests[0]}/")]
        if not keys or (axis == "seconds" and len(self.clock) < 2):
            return None
        points = self.curves[max(preferred or keys, key=_by_number)]
        if axis == "iterations":
            return points
        return np.stack([np.interp(points[:, 0], *self.clock.T), points[:, 1]], 1)

    @property
    def seconds_an_iteration(self) -> float | None:
        """Median of the logged times, None without times."""
        return float(np.median(self.curves["time"][:, 1])) if "time" in self.curves else None


@dataclass
class Group:
    """Runs of one config, drawn as one line.

    Attributes:
        name: for the legend.
        runs: at least one.
    """

    name: str
    runs: list[Run]

    def band(self, pattern: str, axis: str = "iterations") -> np.ndarray | None:
        """(T, 4) position, mean, minimum and maximum over the runs; None where no run has the values.

        Runs are compared at equal iterations: at all where one of them has a value, between their points by straight lines,
        from where all that have such values have begun to where the first of them ends. In seconds the position is the mean
        of the times at which the runs were there.
        """
        runs = [run for run in self.runs if run.curve(pattern, axis) is not None]
        if not runs:
            return None
        curves = [run.curve(pattern) for run in runs]
        begin, end = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
        position = np.unique(np.concatenate([c[:, 0] for c in curves]))
        position = position[(position >= begin) & (position <= end)]
        values = np.stack([np.interp(position, *c.T) for c in curves])
        if axis == "seconds":
            position = np.mean([np.interp(position, *run.clock.T) for run in runs], 0)
        return np.stack([position, values.mean(0), values.min(0), values.max(0)], 1)


def read_run(folder: str | Path) -> Run:
    """Reads metrics.json and, if it is there, config.yaml of a run's folder.

    A resumed run repeats iterations: for each iteration and key the last line wins. A last line without its end, as a
    killed run leaves it, is passed over with a warning on stderr.

    Raises:
        UserError: no folder, no metrics.json, an empty or a damaged one; the text names the line.
    """
    folder = Path(folder)
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no metrics.json; name the OUTPUT_DIR of a training")
    by_iteration = {}
    for record in _read_lines(path):
        by_iteration.setdefault(record["iteration"], {}).update(record)
    if not by_iteration:
        raise UserError(f"{path} is empty; the training has not logged anything yet")
    curves = _curves(by_iteration)
    return Run(folder, _read_config(folder / "config.yaml"), curves, _clock(curves.get("time")))


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups runs whose config.yaml is the same but for SEED and OUTPUT_DIR, in order of appearance.

    A run without config.yaml stands alone. A group has the name of its first run, and says how many there are.
    """
    found = {}
    for i, run in enumerate(runs):
        config = {key: value for key, value in (run.config or {"run": i}).items() if key not in ("SEED", "OUTPUT_DIR")}
        found.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(run)
    return [
        Group(members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more", members)
        for members in found.values()
    ]


def _read_lines(path: Path) -> list[dict]:
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_as_record(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                print(f"warning: {path}, line {number} ends in the middle and is left out", file=sys.stderr)
                break
            raise UserError(f"{path}, line {number} is damaged ({error}); delete the line, or repair it") from None
    return records


def _as_record(line: str) -> dict:
    """A line's numbers; raises ValueError if it is not what JSONWriter writes."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        raise ValueError("it is not an object with an iteration")
    if wrong := [key for key, value in record.items() if not isinstance(value, int | float)]:
        raise ValueError(f"{wrong[0]} is {record[wrong[0]]!r}, not a number")
    return record


def _curves(by_iteration: dict[int, dict]) -> dict[str, np.ndarray]:
    """The evaluation after the last step is logged one iteration later than that step, so it counts as that step."""
    last = max(
        (i for i, record in by_iteration.items() if "time" in record or "total_loss" in record), default=math.inf
    )
    points = {}
    for iteration in sorted(by_iteration):
        for key, value in by_iteration[iteration].items():
            if key != "iteration" and math.isfinite(value):
                points.setdefault(key, {})[min(iteration, last) + 1] = value
    return {key: np.array(list(values.items()), dtype=float) for key, values in points.items()}


def _clock(times: np.ndarray | None) -> np.ndarray:
    if times is None:
        return np.zeros((1, 2))
    seconds = np.cumsum(np.diff(times[:, 0], prepend=0) * times[:, 1])
    return np.concatenate([np.zeros((1, 2)), np.stack([times[:, 0], seconds], 1)])


def _read_config(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a config: it holds {type(config).__name__}, not keys; delete it or repair it")
    return config


def _by_number(key: str) -> list:
    """layer_10 comes after layer_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
