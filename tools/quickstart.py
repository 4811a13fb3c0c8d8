#!/usr/bin/env python3
"""From nothing to a trained detector: what ``make quickstart`` runs once the environment stands.

Trains configs/quickstart.yaml on the embedded data set, evaluates it with COCOEvaluator, draws predictions, and prints
the AP table and where everything lies. Can be run again; it starts afresh, and what was trained before is kept.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONFIG, OUTPUT = ROOT / "configs" / "quickstart.yaml", ROOT / "output" / "quickstart"
NUM_PICTURES = 12


def main(argv: list[str] | None = None) -> int:
    """Runs the three steps; returns the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    start = time.time()
    print(f"== 1/3 Training {CONFIG.relative_to(ROOT)} on generated scenes (under 10 minutes on two cores)")
    code = show([sys.executable, "train_net.py", "--config-file", CONFIG, "OUTPUT_DIR", OUTPUT], "iter:")
    if code:
        return code

    print("== 2/3 Drawing predictions on validation images")
    from dn_detr_d2.data.shapes import cache_folder

    pictures = OUTPUT / "pictures"
    images = sorted((cache_folder() / "shapes_val").glob("*.bmp"))[:NUM_PICTURES]
    command = [sys.executable, "demo.py", "--config-file", OUTPUT / "config.yaml", "--input", *images]
    weights = OUTPUT / "model_final.pth"
    code = show([*command, "--output", pictures, "--json", "MODEL.WEIGHTS", weights], "boxes ->")
    if code:
        return code

    print("== 3/3 Result on shapes_val (COCO metrics, 0 to 100)")
    print_table(OUTPUT / "metrics.json")
    print(f"checkpoint: {weights}\nconfig:     {OUTPUT / 'config.yaml'}\npictures:   {pictures}")
    report = OUTPUT / "report" / "index.html"
    print(
        f"report:     {report if report.is_file() and report.stat().st_mtime >= start else 'not made; the log says why'}"
    )
    print(f"log:        {OUTPUT / 'log.txt'}\ntime:       {(time.time() - start) / 60:.1f} minutes")
    return 0


def show(command: list, pattern: str) -> int:
    """Runs a command, shows the lines that hold ``pattern`` as they come, and its last lines if it fails."""
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = []
    for line in process.stdout:
        last = [*last[-30:], line]
        if pattern in line:
            print("  " + line.split("]: ")[-1].rstrip(), flush=True)
    if process.wait():
        print("".join(last), file=sys.stderr)
    return process.returncode


def print_table(metrics: Path) -> None:
    """The last evaluation in a metrics.json as a Markdown table."""
    evaluations = [line for line in metrics.read_text().splitlines() if '"bbox/AP"' in line]
    values = {k.removeprefix("bbox/"): v for k, v in json.loads(evaluations[-1]).items() if k.startswith("bbox/")}
    print("| " + " | ".join(values) + " |\n|" + "---|" * len(values))
    print("| " + " | ".join(f"{value:.1f}" for value in values.values()) + " |")


if __name__ == "__main__":
    sys.exit(main())
