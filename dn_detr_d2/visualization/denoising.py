"""Three pictures of one pass with denoising: the noise, what the layers make of it, and who may see whom.

Shapes: K layers, G groups, D denoising queries, Q matching queries, T objects of a group.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..modeling.outputs import ForwardOutputs
from .images import FLIPPED, draw_box, image_grid, legend, to_pixels, write
from .style import ON_IMAGE, PALETTE, colour, new_figure

CROWDED = 8  # in an image with more objects only flipped labels are written, without what they were
SEEN, BLOCKED = "#DCEBF5", "#3A3A3A"  # in the picture of the mask
MANY_GROUPS = 12  # of more groups only the first and the last are named


@dataclass
class Copies:
    """The noised copies of one kind in one group.

    Attributes:
        kind: "noised", or "near" and "far" of contrastive denoising.
        slot: (T,) position on the query axis.
        target: (T,) the object each is a copy of.
    """

    kind: str
    slot: Tensor
    target: Tensor

    @property
    def style(self) -> str:
        """Line style."""
        return ":" if self.kind == "far" else "--"


def copies_of(outputs: ForwardOutputs, group: int) -> list[Copies]:
    """The copies in one group of the first image: one kind, or two of contrastive denoising.

    Args:
        outputs: a pass with denoising.
        group: 0 to G - 1.
    """
    layout = outputs.noised.groups
    slot, target = (x.cpu() for x in outputs.noised.assignment.per_image(1)[0])
    places = [((layout.group == group) & (layout.copy == i)).nonzero()[:, 0].cpu() for i in range(layout.num_copies)]
    mine = torch.isin(slot, places[0])
    position = torch.searchsorted(places[0], slot[mine])  # of the object among the first copies
    kinds = ("noised",) if layout.num_copies == 1 else ("near", "far")
    return [Copies(kind, place[position], target[mine]) for kind, place in zip(kinds, places, strict=True)]


def draw_noise(outputs: ForwardOutputs, pixels: np.ndarray, names: list[str], groups: int) -> Figure:
    """Noised boxes and labels over the clean boxes, one panel for each of at most ``groups`` groups.

    Args:
        outputs: a pass with denoising over one image.
        pixels: (H, W, 3) RGB, the image.
        names: of the classes.
        groups: at least 1.
    """
    count = min(groups, outputs.noised.num_groups)
    clean, noisy = (to_pixels(x.boxes[0], pixels, outputs.memory) for x in (outputs.denoised, outputs.noised))
    figure, panels = image_grid(pixels, count)
    for group, panel in enumerate(panels):
        kinds = copies_of(outputs, group)
        flipped = sum(_draw_copies(panel, outputs, kind, clean, noisy, names) for kind in kinds)
        total = sum(len(kind.slot) for kind in kinds)
        panel.set_title(
            f"group {group + 1} of {outputs.noised.num_groups}: {flipped} of {total} labels flipped", fontsize=9
        )
    entries = [("object (a colour each)", ON_IMAGE[0], "-")]
    entries += [(f"{kind.kind} copy", ON_IMAGE[0], kind.style) for kind in copies_of(outputs, 0)]
    legend(figure, [*entries, ("bold on this colour: flipped label", FLIPPED, "s")])
    return figure


def _draw_copies(panel, outputs: ForwardOutputs, kind: Copies, clean: Tensor, noisy: Tensor, names: list[str]) -> int:
    """Draws one kind of copies with their objects; returns how many labels are flipped."""
    labels, truths = outputs.noised.labels[0].cpu(), outputs.denoised.labels[0].cpu()
    flips = labels[kind.slot] != truths[kind.target]
    for slot, target in zip(kind.slot.tolist(), kind.target.tolist(), strict=True):
        draw_box(panel, clean[target], colour(target, ON_IMAGE), "-", 1.2)
        draw_box(panel, noisy[slot], colour(target, ON_IMAGE), kind.style)
    for slot, target, flip in zip(kind.slot.tolist(), kind.target.tolist(), flips.tolist(), strict=True):
        if flip or len(flips) <= CROWDED:
            truth = f" (is {names[truths[target]]})" if flip and len(flips) <= CROWDED else ""
            far = kind.kind == "far"
            x, y = noisy[slot][[0, 3] if far else [0, 1]].tolist()
            write(panel, x, y, names[labels[slot]] + truth, marked=flip, below=far)
    return int(flips.sum())


def draw_refinement(outputs: ForwardOutputs, pixels: np.ndarray, names: list[str], group: int = 0) -> Figure:
    """What one group starts from and what each decoder layer makes of it, with the mean IoU to the clean boxes.

    Labels that are wrong are written, noised ones first, then those that a layer predicts.

    Args:
        outputs, pixels, names: as for :func:`draw_noise`.
        group: which.
    """
    restored, *far = copies_of(outputs, group)
    clean = to_pixels(outputs.denoised.boxes[0], pixels, outputs.memory)
    truths = outputs.denoised.labels[0].cpu()[restored.target]
    stages = refinement(outputs, pixels, len(names))
    figure, panels = image_grid(pixels, len(stages))
    for i, (panel, (boxes, labels)) in enumerate(zip(panels, stages, strict=True)):
        for slot, target in zip(restored.slot.tolist(), restored.target.tolist(), strict=True):
            draw_box(panel, clean[target], colour(target, ON_IMAGE), "-", 1.2)
            draw_box(panel, boxes[slot], colour(target, ON_IMAGE), restored.style)
        wrong = restored.slot[labels[restored.slot] != truths]
        for slot in wrong.tolist():
            write(panel, *boxes[slot][:2].tolist(), names[labels[slot]], marked=True)
        right = int((labels[restored.slot] == truths).sum())
        iou = mean_iou(boxes[restored.slot], clean[restored.target])
        stage = f"layer {i}" if i else "noised"
        panel.set_title(f"{stage}: mean IoU {iou:.2f}, {right} of {len(truths)} labels right", fontsize=9)
    left_out = "; far copies are not drawn" if far else ""
    first = f"{restored.kind} copy, then what each layer predicts from it{left_out}"
    entries = [("object (a colour each)", ON_IMAGE[0], "-"), (first, ON_IMAGE[0], "--")]
    legend(figure, [*entries, ("bold on this colour: wrong label", FLIPPED, "s")], 2)
    return figure


def refinement(outputs: ForwardOutputs, pixels: np.ndarray, classes: int) -> list[tuple[Tensor, Tensor]]:
    """(D, 4) boxes in pixels and (D,) labels of the denoising queries: as noised, then after each of the K layers.

    Of a model with a class for "no object" the likeliest of the ``classes`` others is the label.
    """
    predictions = outputs.denoising
    memory, first = outputs.memory, predictions.before_layers
    start = (to_pixels(outputs.noised.boxes[0], pixels, memory), outputs.noised.labels[0].cpu())
    return [start] + [
        (to_pixels(boxes[0], pixels, memory), logits[0, :, :classes].argmax(-1).cpu())
        for boxes, logits in zip(predictions.boxes[first:], predictions.logits[first:], strict=True)
    ]


def mean_iou(a: Tensor, b: Tensor) -> float:
    """Mean IoU of (T, 4) xyxy boxes pair by pair; not a number for none."""
    return float(matched_pairwise_iou(Boxes(a), Boxes(b)).mean()) if len(a) else float("nan")


def draw_mask(outputs: ForwardOutputs) -> Figure:
    """The self-attention mask of the decoder, queries by keys, its groups and the matching part outlined and named."""
    blocked = outputs.queries.blocked
    blocked = (blocked[0] if blocked.dim() == 3 else blocked).cpu()
    layout, matching = outputs.noised.groups, len(blocked) - outputs.noised.num_queries
    sizes = layout.of_all(matching).bincount(minlength=layout.num_groups + 1).tolist()  # of the groups, then matching
    starts = [0, *accumulate(sizes)]
    extent = (0, len(blocked), len(blocked), 0)
    figure, (panel,) = new_figure(1, 1, (6.4, 6.4))
    colours = ListedColormap([SEEN, BLOCKED])
    panel.imshow(blocked.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest", extent=extent)
    for i, size in enumerate(sizes):
        edge = PALETTE[0] if i < layout.num_groups else PALETTE[1]
        corner = (starts[i], starts[i])
        panel.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=edge, linewidth=1.6, clip_on=False))
    places, words = _ticks(starts)
    panel.set_xticks(places, words, rotation=90 if len(words) > 5 else 0, fontsize=8)
    panel.set_yticks(places, words, fontsize=8)
    panel.tick_params(length=0)
    panel.set(xlabel=f"key: {outputs.noised.num_queries} denoising, {matching} matching", ylabel="query")
    kind = "one group" if layout.num_copies == 1 else "one group (near copies, then far ones)"
    entries = [
        ("may be seen", SEEN, "s"),
        ("blocked", BLOCKED, "s"),
        (kind, PALETTE[0], "-"),
        ("matching queries", PALETTE[1], "-"),
    ]
    legend(figure, entries, 2)
    return figure


def _ticks(starts: list[int]) -> tuple[list[float], list[str]]:
    """Middle and name of each part of the query axis; of many groups only the first and the last.

    Args:
        starts: of the groups and of the matching queries, and the end of the axis.
    """
    groups = len(starts) - 2
    named = range(groups) if groups <= MANY_GROUPS else (0, groups - 1)
    places = [(starts[i] + starts[i + 1]) / 2 for i in (*named, groups)]
    return places, [*(f"group {g + 1}" for g in named), "matching"]
