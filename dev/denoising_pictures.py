#!/usr/bin/env python3
"""Draws the pictures of docs/denoising.md with the matcher, the generator and the attention mask of the package.

    python dev/denoising_pictures.py --output docs/pictures

matching.png: two steps of a made-up training between which the matching changes, and how often it does. noise.png: noised
boxes and labels of a scene of the embedded data set. mask.png: who sees whom.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from dn_detr_d2 import DenoisingGenerator, HungarianMatcher, cxcywh_to_xyxy, xyxy_to_cxcywh
from dn_detr_d2.command_line import run_command
from dn_detr_d2.data import read_image
from dn_detr_d2.structures import Predictions, Targets
from dn_detr_d2.visualization.images import draw_box, image_grid, legend, write
from dn_detr_d2.visualization.style import ON_IMAGE, colour, new_figure, save

OBJECTS = torch.tensor([[0.26, 0.34, 0.3, 0.36], [0.7, 0.68, 0.34, 0.4], [0.68, 0.24, 0.24, 0.24]])  # cxcywh
QUERIES = 6
SCENE = 74  # image of shapes_val


def random_predictions(generator: torch.Generator) -> Tensor:
    """(Q, 4) boxes as an untrained decoder gives them: all over the image, about as large as the objects."""
    centres = 0.2 + 0.6 * torch.rand(QUERIES, 2, generator=generator)
    return torch.cat([centres, 0.2 + 0.2 * torch.rand(QUERIES, 2, generator=generator)], -1)


def matched(boxes: Tensor) -> list[int]:
    """The query that the matcher gives to each object; all queries have the same class scores."""
    predictions = Predictions(torch.zeros(1, 1, len(boxes), 1), boxes[None, None])
    assignment = HungarianMatcher()(predictions, Targets.pad([torch.zeros(3, dtype=torch.int64)], [OBJECTS]))
    [(queries, objects)] = assignment.per_image(1)
    return queries[objects.argsort()].tolist()


def moved(boxes: Tensor, step: float, generator: torch.Generator) -> Tensor:
    """Boxes after a step of training: each number has changed by at most ``step``."""
    return boxes + step * (2 * torch.rand(boxes.shape, generator=generator) - 1)


def example(step: float) -> tuple[Tensor, Tensor]:
    """Predictions before and after a step that changes two matches, with the lowest seed that has such."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        before = random_predictions(generator)
        after = moved(before, step, generator)
        if sum(a != b for a, b in zip(matched(before), matched(after), strict=True)) == 2:
            return before, after
    raise ValueError(f"no step of {step} changes two matches")


def share_of_changes(step: float, trials: int = 300) -> float:
    """How many of the objects get another query by a step, on average."""
    generator, changes = torch.Generator().manual_seed(0), 0
    for _ in range(trials):
        before = random_predictions(generator)
        pairs = zip(matched(before), matched(moved(before, step, generator)), strict=True)
        changes += sum(a != b for a, b in pairs)
    return changes / trials / len(OBJECTS)


def draw_matching() -> Figure:
    """Two panels with predictions, and a curve."""
    figure, panels = new_figure(1, 3, (3.9, 3.9))
    boxes = example(0.03)
    for panel, found, title in zip(panels, boxes, ("one step", "the next step"), strict=False):
        panel.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal", title=title)
        queries = matched(found)
        for box in cxcywh_to_xyxy(found[[i for i in range(QUERIES) if i not in queries]]):
            draw_box(panel, box, "#BBBBBB", ":", 1.0)
        for number, query in enumerate(queries):
            changed = matched(boxes[0])[number] != matched(boxes[1])[number]
            draw_box(panel, cxcywh_to_xyxy(OBJECTS[number]), colour(number, ON_IMAGE), "-", 2.6)
            draw_box(panel, cxcywh_to_xyxy(found[query]), colour(number, ON_IMAGE), "--", 1.4)
            x, y = cxcywh_to_xyxy(found[query])[:2].tolist()
            write(panel, x, y, f"query {query}", marked=changed)
    steps = [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1]
    panels[2].plot(steps, [100 * share_of_changes(step) for step in steps], "o-", color=colour(0), label="matching")
    panels[2].plot(steps, [0.0] * len(steps), "s--", color=colour(1), label="denoising")
    panels[2].set(xlabel="largest change of a coordinate in a step", ylabel="objects with another query (%)")
    panels[2].legend(frameon=False)
    panels[2].grid(alpha=0.3)
    entries = [("object (a colour each)", ON_IMAGE[0], "-"), ("matched prediction", ON_IMAGE[0], "--")]
    legend(figure, [*entries, ("other predictions", "#BBBBBB", ":"), ("bold: the match has changed", "#D55E00", "s")])
    return figure


def draw_noise() -> Figure:
    """A scene with three copies of each object at four strengths of noise."""
    record = DatasetCatalog.get("shapes_val")[SCENE]
    names = MetadataCatalog.get("shapes_val").thing_classes
    pixels = read_image(record["file_name"], "RGB")
    size = torch.tensor([pixels.shape[1], pixels.shape[0]] * 2)
    corners = torch.tensor([x["bbox"] for x in record["annotations"]])
    corners[:, 2:] += corners[:, :2]
    labels = torch.tensor([x["category_id"] for x in record["annotations"]])
    targets = Targets.pad([labels], [xyxy_to_cxcywh(corners / size)])
    strengths = [(0.1, 0.0), (0.4, 0.2), (0.8, 0.2), (1.0, 0.5)]
    figure, panels = image_grid(pixels, len(strengths))
    for panel, (scale, flips) in zip(panels, strengths, strict=True):
        torch.manual_seed(3)
        noise = {"center_noise_scale": scale, "size_noise_scale": scale, "label_noise_prob": flips}
        noised = DenoisingGenerator(num_classes=len(names), num_groups=3, **noise)(targets)
        panel.set_title(f"boxes {scale:g}, labels {flips:g}")
        for box, number in zip(corners, range(len(labels)), strict=True):
            draw_box(panel, box, colour(number, ON_IMAGE), "-", 2.4)
        objects = noised.assignment.target[0].tolist()
        for slot, number in zip(noised.assignment.query[0].tolist(), objects, strict=True):
            box = cxcywh_to_xyxy(noised.boxes[0, slot]) * size
            draw_box(panel, box, colour(number, ON_IMAGE), "--", 1.2)
            label = int(noised.labels[0, slot])
            if label != labels[number]:
                write(panel, *box[:2].tolist(), names[label], marked=True)
    entries = [("object (a colour each)", ON_IMAGE[0], "-"), ("noised copies, one a group", ON_IMAGE[0], "--")]
    legend(figure, [*entries, ("flipped label", "#D55E00", "s")])
    return figure


def draw_mask() -> Figure:
    """The self-attention mask of three groups of two objects and five matching queries."""
    groups, objects, matching = 3, 2, 5
    targets = Targets.pad([torch.arange(objects)], [OBJECTS[:objects]])
    noised = DenoisingGenerator(num_classes=3, num_groups=groups)(targets)
    blocked = noised.attention_mask(matching)
    group = noised.groups.of_all(matching)
    # 0 = blocked, 1 = matching key, 2.. = key of a group
    shown = torch.where(blocked, 0, torch.where(group == groups, 1, group + 2)[None].expand(len(group), -1))
    figure, [panel] = new_figure(1, 1, (6.0, 5.4))
    panel.imshow(shown, cmap=ListedColormap(["white", "#BBBBBB", *(colour(i) for i in range(groups))]), vmin=0)
    names = [f"g{i + 1} object {j + 1}" for i in range(groups) for j in range(objects)]
    names += [f"query {i}" for i in range(matching)]
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_xticks([i - 0.5 for i in range(1, len(names))], minor=True)
    panel.set_yticks([i - 0.5 for i in range(1, len(names))], minor=True)
    panel.grid(which="minor", color="#888888", linewidth=0.4)
    panel.tick_params(which="minor", length=0)
    panel.set(xlabel="key: what is looked at", ylabel="query: who looks", title="white = blocked")
    return figure


def draw_all(folder: Path) -> None:
    """Writes the pictures."""
    for name, draw in (("matching", draw_matching), ("noise", draw_noise), ("mask", draw_mask)):
        print(f"picture: {save(draw(), folder / f'{name}.png', 90)}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/pictures", metavar="FOLDER", help="where the pictures go")
    args = parser.parse_args(argv)
    return run_command(lambda: draw_all(Path(args.output)))


if __name__ == "__main__":
    sys.exit(main())
