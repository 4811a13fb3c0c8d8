#!/usr/bin/env python3
"""Measures matching and losses of masks at points against a straightforward loop over prediction sets and images.

    python dev/benchmark_masks.py                            # a table of docs/performance.md, about 10 minutes
    python dev/benchmark_masks.py --cases 2x7 --full         # in the size of a training; 16x40 needs more than 24 GiB

The loop makes the maps of all queries of an image and a set, takes copies of the target masks in floating point, and keeps
everything for the backward pass. Both sides get the same predictions and points, a matching and a denoising part, in
interleaved rounds; printed are medians, their ratio (reference / ours), how much memory a process needs at most for a
forward and backward pass beside the inputs, how often ours waits for the device in a forward pass, and the largest relative
difference of the losses.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.benchmark_criterion import OperatorCount, largest_difference, medians, seconds
from dn_detr_d2 import DenoisingGenerator, HungarianMatcher, SetCriterion
from dn_detr_d2.losses import ClassSoftmax, ClassSoftmaxCost, MaskPointCost, MaskPoints
from dn_detr_d2.structures import Predictions, Targets

SETS, QUERIES, CLASSES, CHANNELS, GROUPS = 10, 100, 80, 256, 5


class Case:
    """Random predictions, targets and points of one size.

    Args:
        images: batch size N.
        objects: ground truths an image.
        size: side of the padded image in pixels, a multiple of 4.
        points: n.
    """

    def __init__(self, images: int, objects: int, size: int = 512, points: int = 3136):
        torch.manual_seed(0)
        self.points = points
        self.drawn = {kind: torch.rand(3 * points, 2) for kind in ("match", "loss", "rest")}
        self.labels = [torch.randint(CLASSES, (objects,)) for _ in range(images)]
        boxes = [torch.rand(objects, 4) * 0.4 + 0.1 for _ in range(images)]
        self.masks = [rectangles(x, size) for x in boxes]
        self.targets = Targets.pad(self.labels, boxes, masks=self.masks)
        self.noised = DenoisingGenerator(num_classes=CLASSES, num_groups=GROUPS)(self.targets)
        total = self.noised.num_queries + QUERIES
        self.embeddings = (torch.randn(SETS, images, total, CHANNELS) / 8).requires_grad_()
        self.features = (torch.randn(images, CHANNELS, size // 4, size // 4) / 8).requires_grad_()
        self.logits = torch.randn(SETS, images, total, CLASSES + 1).requires_grad_()
        self.leaves = (self.embeddings, self.features)
        self.divisor = float(max(images * objects, 1))

    def draw(self, kind: str, num_sets: int, num_points: int, device: torch.device) -> Tensor:
        """The same points for all sets of a kind."""
        return self.drawn[kind][:num_points].expand(num_sets, -1, -1)


def rectangles(boxes: Tensor, size: int) -> Tensor:
    """(n, size, size) bool masks of (n, 4) cxcywh boxes."""
    centre = (torch.arange(size) + 0.5) / size
    x, y = ((centre - boxes[:, i, None]).abs() <= boxes[:, i + 2, None] / 2 for i in (0, 1))
    return y[:, :, None] & x[:, None]


def ours(case: Case) -> dict[str, Tensor]:
    """All losses with the project's matcher and criterion, a (K,) tensor a loss."""
    predictions = Predictions(case.logits, None, case.embeddings, case.features)
    denoising, matching = predictions.split(case.noised.num_queries)
    settings = {"num_points": case.points, "draw": case.draw}
    matcher = HungarianMatcher([ClassSoftmaxCost(2), MaskPointCost(5, 5, **settings)])
    criterion = SetCriterion([ClassSoftmax(2), MaskPoints(5, 5, **settings)])
    found = criterion(matching, case.targets, matcher(matching, case.targets), case.divisor)
    rebuilt = criterion(denoising, case.targets, case.noised.assignment, case.divisor * GROUPS)
    return {f"main/{k}": found[k] for k in ("mask", "dice")} | {f"dn/{k}": rebuilt[k] for k in ("mask", "dice")}


def reference(case: Case) -> dict[str, Tensor]:
    """The same losses set by set and image by image."""
    d, slots, losses = case.noised.num_queries, case.noised.assignment.per_image(len(case.labels)), {}
    for k in range(SETS):
        sums = {"main": torch.zeros(2), "dn": torch.zeros(2)}
        for i, masks in enumerate(case.masks):
            maps = torch.einsum("qc,chw->qhw", case.embeddings[k, i], case.features[i])
            wanted = masks.float()
            pairs = reference_pairs(case, case.logits[k, i, d:], maps[d:], case.labels[i], wanted)
            sums["main"] = sums["main"] + reference_losses(case, maps[d:], wanted, pairs) / case.divisor
            sums["dn"] = sums["dn"] + reference_losses(case, maps[:d], wanted, slots[i]) / (case.divisor * GROUPS)
        for part, (entropy, dice) in sums.items():
            losses.setdefault(f"{part}/mask", []).append(entropy)
            losses.setdefault(f"{part}/dice", []).append(dice)
    return {name: torch.stack(values) for name, values in losses.items()}


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """(T, h, w) maps at (n, 2) or (T, n, 2) points: (T, n)."""
    grid = 2 * points.expand(len(maps), -1, -1)[:, :, None] - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def reference_pairs(case: Case, logits: Tensor, maps: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(queries, objects) of one image and one set."""
    points = case.drawn["match"][: case.points]
    x, t = at_points(maps, points), at_points(wanted, points)
    s = x.sigmoid()
    entropy = (F.softplus(-x) @ t.T + F.softplus(x) @ (1 - t).T) / case.points
    dice = 1 - (2 * s @ t.T + 1) / (s.sum(1)[:, None] + t.sum(1) + 1)
    cost = 5 * entropy + 5 * dice - 2 * logits.softmax(-1)[:, labels]
    return tuple(map(torch.as_tensor, linear_sum_assignment(cost.cpu().numpy())))


def reference_losses(case: Case, maps: Tensor, wanted: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """(2,) weighted sums of cross-entropy and dice over the pairs of one image."""
    maps, wanted, kept = maps[pairs[0]], wanted[pairs[1]], int(0.75 * case.points)
    candidates = case.drawn["loss"]
    best = at_points(maps.detach(), candidates).abs().topk(kept, largest=False).indices
    rest = case.drawn["rest"][: case.points - kept].expand(len(maps), -1, -1)
    points = torch.cat([candidates[best], rest], 1)
    x, t = at_points(maps, points), at_points(wanted, points)
    s = x.sigmoid()
    dice = 1 - (2 * (s * t).sum(1) + 1) / (s.sum(1) + t.sum(1) + 1)
    return 5 * torch.stack([F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum(), dice.sum()])


SIDES = {"ours": ours, "reference": reference}


def growth(side: str, sizes: tuple[int, ...], threads: int) -> int:
    """Bytes by which this process grows at most during a forward and backward pass; Linux, for a process of its own."""
    torch.set_num_threads(threads)
    case = Case(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # what building the case took at its peak is forgotten
    before = resident("VmRSS")
    seconds(SIDES[side], case)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def waits(case: Case) -> int:
    """How often a forward pass of ours waits for the device: copies to the host, and operators that need one."""
    copies, original = [], torch.Tensor.cpu
    torch.Tensor.cpu = lambda self: copies.append(1) or original(self)
    try:
        with OperatorCount() as count:
            ours(case)
    finally:
        torch.Tensor.cpu = original
    return count.waits + len(copies)


def measure(sizes: tuple[int, ...], rounds: int, threads: int) -> dict[str, float]:
    """Both sides on one case: time in interleaved rounds, memory in processes of their own."""
    row = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in SIDES:
            row[f"{name}_memory"] = pool.apply(growth, (name, sizes, threads))
    case = Case(*sizes)
    with torch.no_grad():
        results = {name: function(case) for name, function in SIDES.items()}
    row |= {"difference": largest_difference(results["ours"], results["reference"]), "waits": waits(case)}
    return row | medians(SIDES, case, rounds)


def main(argv: list[str] | None = None) -> int:
    """Command line; prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description="Benchmark matching and losses of masks against a loop over images.")
    parser.add_argument("--cases", nargs="+", default=["2x7", "2x40", "16x7", "16x40"], metavar="IMAGESxOBJECTS")
    parser.add_argument(
        "--full",
        action="store_true",
        help="1024 x 1024 pixels and 12544 points a mask, not half the side and a quarter",
    )
    for name, default, what in (("--rounds", 3, "interleaved rounds"), ("--threads", 1, "CPU threads")):
        parser.add_argument(name, type=int, default=default, help=f"{what} (default {default})")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1:
        parser.error(f"--rounds and --threads must be positive, got {args.rounds} and {args.threads}")
    torch.set_num_threads(args.threads)
    size, points = (1024, 12544) if args.full else (512, 3136)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {SETS} sets, {QUERIES} queries, {GROUPS} groups, images of "
        f"{size} x {size}, {points} points, seed 0"
    )
    headers = ["images x objects", "forward s", "ratio", "forward+backward s", "ratio", "memory MB", "ratio"]
    print("|", " | ".join([*headers, "waits", "difference"]), "|\n" + "|---" * (len(headers) + 2) + "|")
    for case in args.cases:
        images, objects = map(int, case.split("x"))
        r = measure((images, objects, size, points), args.rounds, args.threads)
        pairs = [(r[f"reference_{what}"], r[f"ours_{what}"]) for what in ("forward", "both", "memory")]
        cells = [case]
        for (theirs, ours), unit, digits in zip(pairs, (1, 1, 1e6), (1, 1, 0), strict=True):
            cells += [f"{theirs / unit:.{digits}f} -> {ours / unit:.{digits}f}", f"{theirs / max(ours, 1e-9):.1f}x"]
        print("|", " | ".join([*cells, str(r["waits"]), f"{r['difference']:.0e}"]), "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
