#!/usr/bin/env python3
"""Measures matcher and criterion against a straightforward per-layer reference.

    python dev/benchmark_criterion.py                        # the table of docs/performance.md, about 3 minutes
    python dev/benchmark_criterion.py --cases 16x7 --rounds 9

The reference does what most DETR code does: one layer after another, costs between all images, one copy to the host a
layer, one-hot class targets, and the diagonal of the full GIoU matrix. Both sides get the same predictions in the same
process, in interleaved rounds; printed are medians, their ratio (reference / ours), bytes kept for backward, operators
dispatched, and the largest relative difference of the losses.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dn_detr_d2 import DenoisingGenerator, HungarianMatcher, SetCriterion, cxcywh_to_xyxy
from dn_detr_d2.diagnostics.model_analysis import KeptBytes
from dn_detr_d2.structures import Predictions, Targets

LAYERS, QUERIES, CLASSES, GROUPS = 6, 300, 91, 5


class Case:
    """Random predictions and targets of one size.

    Args:
        images: batch size N.
        objects: ground truths an image.
        seed: of all draws.
    """

    def __init__(self, images: int, objects: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
        self.labels = [torch.randint(CLASSES, (objects,), generator=generator) for _ in range(images)]
        self.boxes = [
            torch.cat([rand(objects, 2) * 0.6 + 0.2, rand(objects, 2) * 0.3 + 0.05], 1) for _ in range(images)
        ]
        self.targets = Targets.pad(self.labels, self.boxes)
        torch.manual_seed(seed)
        self.noised = DenoisingGenerator(
            num_classes=CLASSES, num_groups=GROUPS, label_noise_prob=0.2, center_noise_scale=0.4, size_noise_scale=0.4
        )(self.targets)
        total = self.noised.num_queries + QUERIES
        self.logits = (rand(LAYERS, images, total, CLASSES) * 4 - 4).requires_grad_()
        centre, size = rand(LAYERS, images, total, 2) * 0.6 + 0.2, rand(LAYERS, images, total, 2) * 0.3 + 0.05
        self.predicted = torch.cat([centre, size], -1).requires_grad_()
        self.leaves = (self.logits, self.predicted)
        self.normalizer = torch.tensor(float(max(images * objects, 1)))


def ours(case: Case) -> dict[str, Tensor]:
    """All losses with the project's matcher and criterion, a (K,) tensor a term."""
    denoising, matching = Predictions(case.logits, case.predicted).split(case.noised.num_queries)
    matcher, criterion = HungarianMatcher(), SetCriterion()
    divisor = case.normalizer * GROUPS
    rebuilt = criterion(denoising, case.targets, case.noised.assignment, divisor)
    found = criterion(matching, case.targets, matcher(matching, case.targets), case.normalizer)
    return {f"main/{k}": v for k, v in found.items()} | {f"dn/{k}": v for k, v in rebuilt.items()}


def reference(case: Case) -> dict[str, Tensor]:
    """The same losses layer by layer and image by image."""
    d = case.noised.num_queries
    slots = case.noised.assignment.per_image(len(case.labels))
    terms = {}
    for k in range(LAYERS):
        found = reference_matcher(case.logits[k, :, d:], case.predicted[k, :, d:], case.labels, case.boxes)
        main = reference_losses(case.logits[k, :, d:], case.predicted[k, :, d:], found, case, case.normalizer)
        rebuilt = reference_losses(
            case.logits[k, :, :d], case.predicted[k, :, :d], slots, case, case.normalizer * GROUPS
        )
        for group, values in (("main", main), ("dn", rebuilt)):
            for name, value in values.items():
                terms.setdefault(f"{group}/{name}", []).append(value)
    return {name: torch.stack(values) for name, values in terms.items()}


@torch.no_grad()
def reference_matcher(logits: Tensor, boxes: Tensor, labels: list[Tensor], target_boxes: list[Tensor]) -> list:
    """Pairs of one layer from a cost matrix between all queries and all targets of the batch."""
    n, q, _ = logits.shape
    prob, flat, every = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1), torch.cat(target_boxes)
    negative, positive = 0.75 * prob**2 * -(1 - prob + 1e-8).log(), 0.25 * (1 - prob) ** 2 * -(prob + 1e-8).log()
    index = torch.cat(labels)
    cost = 5 * torch.cdist(flat, every, p=1) + 2 * (positive[:, index] - negative[:, index])
    cost = cost - 2 * generalized_box_iou(cxcywh_to_xyxy(flat), cxcywh_to_xyxy(every))
    blocks = cost.view(n, q, -1).cpu().split([len(x) for x in labels], -1)
    return [tuple(map(torch.as_tensor, linear_sum_assignment(block[i]))) for i, block in enumerate(blocks)]


def reference_losses(logits: Tensor, boxes: Tensor, pairs: list, case: Case, normalizer: Tensor) -> dict[str, Tensor]:
    """One layer's losses with a one-hot target and the diagonal of the GIoU matrix."""
    onehot = torch.zeros_like(logits)
    for i, (query, target) in enumerate(pairs):
        onehot[i, query, case.labels[i][target]] = 1
    predicted = torch.cat([boxes[i, query] for i, (query, _) in enumerate(pairs)])
    wanted = torch.cat([case.boxes[i][target] for i, (_, target) in enumerate(pairs)])
    overlap = torch.diag(generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)))
    return {
        "class": sigmoid_focal_loss(logits, onehot, 0.25, 2.0, reduction="sum") / normalizer,
        "l1": 5 * (predicted - wanted).abs().sum() / normalizer,
        "giou": 2 * (1 - overlap).sum() / normalizer,
    }


class OperatorCount(TorchDispatchMode):
    """Counts dispatched operators, and among them those that would make the host wait for a device."""

    # In inference mode aten.item is seen itself, else the first that it is made of.
    WAITING = (
        "aten._local_scalar_dense",
        "aten.item",
        "aten.nonzero",
        "aten.masked_select",
        "aten.is_nonzero",
        "aten._unique2",
    )

    def __init__(self):
        super().__init__()
        self.total = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        self.total += 1
        self.waits += str(func).startswith(self.WAITING)
        return func(*args, **(kwargs or {}))


def saved_bytes(function, case: Case) -> int:
    """Bytes of distinct storages that autograd keeps for the backward of ``function``."""
    with KeptBytes() as kept:
        result = function(case)
    del result
    return kept.total


def seconds(function, case) -> tuple[float, float]:
    """(forward, forward and backward) time of one call."""
    start = time.perf_counter()
    total = sum(v.sum() for v in function(case).values())
    middle = time.perf_counter()
    total.backward()
    end = time.perf_counter()
    for leaf in case.leaves:
        leaf.grad = None
    return middle - start, end - start


def medians(sides: dict, case, rounds: int) -> dict[str, float]:
    """Median times of each side, as ``{side}_forward`` and ``{side}_both``, in interleaved rounds."""
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(seconds(function, case))
    return {
        f"{name}_{part}": statistics.median(t[i] for t in times[name])
        for name in sides
        for i, part in enumerate(("forward", "both"))
    }


def largest_difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Of the losses of the two sides, relative to the reference."""
    return max(((ours[k] - v).abs() / v.abs().clamp(min=1e-6)).max().item() for k, v in reference.items())


def measure(images: int, objects: int, rounds: int) -> dict[str, float]:
    """Both sides on one case, in interleaved rounds."""
    case = Case(images, objects)
    sides = {"ours": ours, "reference": reference}
    results = {name: function(case) for name, function in sides.items()}
    row = {"difference": largest_difference(results["ours"], results["reference"])} | medians(sides, case, rounds)
    for name, function in sides.items():
        row[f"{name}_saved"] = saved_bytes(function, case)
        with OperatorCount() as count:
            function(case)
        row[f"{name}_operators"] = count.total
    return row


def main(argv: list[str] | None = None) -> int:
    """Command line; prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description="Benchmark matcher and criterion against a per-layer reference.")
    parser.add_argument(
        "--cases", nargs="+", default=["16x7", "16x20", "16x60", "2x7", "2x60"], metavar="IMAGESxOBJECTS"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1:
        parser.error(f"--rounds and --threads must be positive, got {args.rounds} and {args.threads}")
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {LAYERS} layers, {QUERIES} queries, {GROUPS} groups, seed 0"
    )
    print(
        "| images x objects | forward ms | ratio | forward+backward ms | ratio | saved MB | ratio | operators | difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in args.cases:
        r = measure(*map(int, case.split("x")), args.rounds)
        print(
            f"| {case} | {1e3 * r['reference_forward']:.0f} -> {1e3 * r['ours_forward']:.0f} "
            f"| {r['reference_forward'] / r['ours_forward']:.1f}x "
            f"| {1e3 * r['reference_both']:.0f} -> {1e3 * r['ours_both']:.0f} "
            f"| {r['reference_both'] / r['ours_both']:.1f}x "
            f"| {r['reference_saved'] / 1e6:.0f} -> {r['ours_saved'] / 1e6:.0f} "
            f"| {r['reference_saved'] / r['ours_saved']:.1f}x "
            f"| {r['reference_operators']} -> {r['ours_operators']} | {r['difference']:.0e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
