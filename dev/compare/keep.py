"""What a report reads of a training, small enough for a repository: so that later seeds join those of another machine."""

import json
import re
import shutil
from pathlib import Path

import yaml

from .report import IN_TURN

# Of the last layer alone the instability is shown.
KEPT = re.compile(r"iteration|time|bbox/AP(50)?|loss_main|loss_dn|total_loss|anchors/distance")
LAYER = re.compile(r"instability/layer_(\d+)")
PARTS = ("DENOISING", "DECODER", "MASK", "INITIALIZATION")  # of MODEL.DN_DETR


def keep(run: Path, target: Path) -> Path:
    """Copies metrics.json, config.yaml, step_seconds.txt and in_turn.txt, cut to what ``dev/compare_runs.py`` reads.

    Args:
        run: the folder of the training.
        target: the folder in which one of its name is made.

    Returns:
        Path: that folder; numbers in it have five digits, seconds three decimals.
    """
    folder = target / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    layers = [int(found[1]) for line in lines for key in line if (found := LAYER.fullmatch(key))]
    last = f"instability/layer_{max(layers, default=0)}"
    with (folder / "metrics.json").open("w") as file:
        for line in lines:
            kept = {key: _short(x) for key, x in sorted(line.items()) if key == last or KEPT.fullmatch(key)}
            if len(kept) > 1:
                file.write(json.dumps(kept) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    data, node = config["DATASETS"], config["MODEL"]["DN_DETR"]
    few = {
        "SEED": config["SEED"],
        "SOLVER": config["SOLVER"],
        "DATASETS": {key: data[key] for key in ("TRAIN", "TEST")},
        "MODEL": {"DN_DETR": {key: node[key] for key in PARTS}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(few))
    seconds = (run / "step_seconds.txt").read_text().split()
    (folder / "step_seconds.txt").write_text("".join(f"{float(x):.3f}\n" for x in seconds))
    if (run / IN_TURN).is_file():
        shutil.copyfile(run / IN_TURN, folder / IN_TURN)
    return folder


def _short(x: float) -> float:
    return x if isinstance(x, int) else float(f"{x:.5g}")
