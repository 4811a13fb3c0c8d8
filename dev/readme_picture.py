#!/usr/bin/env python3
"""Draws the picture at the top of README.md from docs/evidence/.

    python dev/readme_picture.py --output docs/pictures/denoising.png

On the left, noised boxes and what the third decoder layer restores: two panels of visualize_denoising_refinement.png. On the
right, AP with and without denoising: the means of three seeds, from convergence/deformable_ap.csv, which was read off
convergence/deformable.png to 0.2 AP; the bars at the end are the range in convergence/deformable.md.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.image
from matplotlib.figure import Figure

from dn_detr_d2.command_line import run_command
from dn_detr_d2.visualization.style import colour, save

EVIDENCE = Path(__file__).resolve().parent.parent / "docs" / "evidence"
# (title, line below, panel of the picture in pixels: left, top, right, bottom)
PANELS = (
    ("Noised ground truth goes in", "dashed: noised, mean IoU 0.56", (10, 45, 276, 400)),
    ("The decoder restores it", "after 3 layers: mean IoU 0.75", (294, 426, 561, 781)),
)
RANGES = {"matching alone": (10.2, 16.9), "with denoising": (22.1, 36.6)}  # final AP of three seeds


def draw(path: Path) -> Path:
    """Writes the picture; its folder is made if need be."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    *images, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.45])
    picture = matplotlib.image.imread(EVIDENCE / "visualize_denoising_refinement.png")
    for panel, (title, below, (left, top, right, bottom)) in zip(images, PANELS, strict=True):
        panel.imshow(picture[top:bottom, left:right], interpolation="antialiased")
        panel.set_title(title, weight="bold")
        panel.set_xlabel(below)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    with (EVIDENCE / "convergence" / "deformable_ap.csv").open() as file:
        rows = list(csv.DictReader(file))
    iterations = [int(row["iterations"]) for row in rows]
    for i, (name, (low, high)) in reversed(list(enumerate(RANGES.items()))):
        values = [float(row[name]) for row in rows]
        label = f"{name}: {values[-1]}"
        curves.plot(iterations, values, color=colour(i), marker="o", markersize=4, linewidth=2, label=label)
        curves.vlines(iterations[-1], low, high, color=colour(i), linewidth=6, alpha=0.3)
    curves.set_title("AP of the same detector", weight="bold")
    curves.legend(loc="upper left", frameon=False)
    curves.set_xlabel("iterations")
    curves.set_ylim(0)
    curves.grid(alpha=0.3)
    curves.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/pictures/denoising.png", metavar="FILE", help="picture to write")
    args = parser.parse_args(argv)
    return run_command(lambda: print(f"picture: {draw(Path(args.output))}"))


if __name__ == "__main__":
    sys.exit(main())
