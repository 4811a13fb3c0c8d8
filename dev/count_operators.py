#!/usr/bin/env python3
"""Counts the operators that one training step of a config dispatches, by part of the detector and by name.

    python dev/count_operators.py --config-file configs/dn_dab_deformable.yaml
    python dev/count_operators.py --config-file configs/dino_R50_4scale_12ep.yaml --precision fp32 --names 60
    python dev/count_operators.py --config-file configs/dn_dab_deformable.yaml --inside decoder

What is counted is what reaches a device's kernels, below autograd and autocast: forward, backward, clipping and optimizer
of ``engine.TrainStep``. Views launch no kernel, but the host dispatches them too, which is what a small batch on a GPU
waits for; they are counted, and told apart. Images and weights are random and small: the number does not depend on the size.
Exit code 2: bad input.
"""

import argparse
import sys
from bisect import bisect_right
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dev.benchmark.detectors import PRECISIONS, Case, build_ours
from dn_detr_d2 import UserError
from dn_detr_d2.command_line import add_overrides, parse, run_command
from dn_detr_d2.modeling.tensor_model import PARTS

FORWARD, BACKWARD, GRADIENTS = "forward", "backward", "gradients"
LOSSES, OPTIMIZER, REST = "queries and losses", "optimizer", "rest of the step"


class OperatorsByPart(TorchDispatchMode):
    """Counts the operators that are dispatched while the context is open.

    An operator of the forward pass belongs to the innermost module of ``parts`` that is running. One of the backward pass
    belongs to where its autograd node was made: nodes are numbered in the order of the forward pass.

    Args:
        parts: name -> module.
        optimizer: whose steps are a part of their own.

    Attributes:
        counts: (part, pass, operator) -> how often; the pass is "forward", "backward", or "gradients" for the addition of
            gradients to parameters.
    """

    def __init__(self, parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer):
        super().__init__()
        self.counts = Counter()
        self._outer, self._part = [], REST
        self._first_node, self._part_of_node = [0], [REST]
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.enter(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: self.leave()),
        ]
        for name, part in parts.items():
            self._handles.append(part.register_forward_pre_hook(partial(lambda name, *_: self.enter(name), name)))
            self._handles.append(part.register_forward_hook(lambda *_: self.leave()))

    def enter(self, part: str) -> None:
        """What follows belongs to ``part``."""
        self._outer.append(self._part)
        self._switch(part)

    def leave(self) -> None:
        """What follows belongs to the part around it."""
        self._switch(self._outer.pop())

    def _switch(self, part: str) -> None:
        self._part = part
        self._first_node.append(torch.autograd._get_sequence_nr())
        self._part_of_node.append(part)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and passes on."""
        node, place = torch._C._current_autograd_node(), (self._part, FORWARD)
        if node is not None:
            number = node._sequence_nr()
            accumulates = number >= 2**63  # AccumulateGrad has no number of its own
            part = self._part_of_node[bisect_right(self._first_node, number) - 1]
            place = (REST, GRADIENTS) if accumulates else (part, BACKWARD)
        self.counts[(*place, func)] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)


def is_view(operator: torch._ops.OpOverload) -> bool:
    """Whether it launches nothing: its result is another look at its argument."""
    return operator.is_view or operator._schema.name == "aten::_unsafe_view"


def count_step(
    config: str,
    opts: tuple = (),
    *,
    precision: str = "bf16",
    size: tuple[int, int] = (96, 128),
    images: int = 2,
    objects: int = 7,
    inside: str = "",
    seed: int = 0,
) -> Counter:
    """The operators of one training step, see :attr:`OperatorsByPart.counts`; a first step, not counted, makes the state.

    Args:
        config: a config file.
        opts: its overrides.
        precision: a key of :data:`~dev.benchmark.detectors.PRECISIONS`.
        size: (height, width) of the images in pixels.
        images: in the batch.
        objects: in each image.
        inside: a part whose own parts are told apart; "" = the parts of the detector.
        seed: of weights, images and noise.

    Raises:
        UserError: ``inside`` is no part of the model.
    """
    detector = build_ours(Case(config, opts, size, images, objects, precision, seed=seed))
    model = detector.model
    try:
        whole = model.get_submodule(inside)
    except AttributeError as error:
        raise UserError(f"--inside {inside} is no part of the model: {error}") from error
    parts = dict(whole.named_children()) if inside else {x: getattr(model, x) for x in PARTS if getattr(model, x)}
    parts = {f"{inside}.{name}" if inside else name: part for name, part in _with_items(parts).items()}
    detector.step()
    counter = OperatorsByPart({LOSSES: model, **parts}, detector.optimizer)
    with counter:
        detector.step()
    return counter.counts


def _with_items(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The items of module lists in their place: a list has no forward pass."""
    result = {}
    for name, part in parts.items():
        if isinstance(part, nn.ModuleList):
            result |= {f"{name}.{i}": item for i, item in enumerate(part)}
        else:
            result[name] = part
    return result


def part_table(counts: Counter) -> str:
    """A line for each part, the passes beside each other."""
    passes = (FORWARD, BACKWARD, GRADIENTS)
    rows = []
    for part in [*dict.fromkeys(part for part, *_ in counts), None]:
        mine = {key: n for key, n in counts.items() if part in (key[0], None)}
        by_pass = [sum(n for key, n in mine.items() if key[1] == which) for which in passes]
        views = sum(n for key, n in mine.items() if is_view(key[2]))
        casts = sum(n for key, n in mine.items() if str(key[2]).startswith("aten._to_copy"))
        rows.append([part or "all", *by_pass, sum(mine.values()), views, casts])
    return tabulate(rows, ("part", *passes, "all", "views", "casts"), tablefmt="github")


def name_table(counts: Counter, number: int) -> str:
    """The operators that are dispatched most often."""
    names = Counter()
    for (*_, operator), n in counts.items():
        names[str(operator)] += n
    return tabulate(names.most_common(number), ("operator", "times"), tablefmt="github")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16", help="default bf16")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("H", "W"), help="default 96 128")
    parser.add_argument(
        "--inside", default="", metavar="PART", help="tell the parts of this part apart, such as decoder"
    )
    parser.add_argument("--names", type=int, default=25, metavar="N", help="operators in the second table (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and noise (default 0)")
    add_overrides(parser)
    return parse(parser, argv)


def report(args: argparse.Namespace) -> None:
    """Prints both tables."""
    if min(args.size) < 32:
        raise UserError(f"--size must be at least 32 32, got {args.size[0]} {args.size[1]}")
    counts = count_step(
        args.config_file,
        tuple(args.opts),
        precision=args.precision,
        size=tuple(args.size),
        inside=args.inside,
        seed=args.seed,
    )
    print(f"{part_table(counts)}\n\n{name_table(counts, args.names)}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)
    return run_command(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
