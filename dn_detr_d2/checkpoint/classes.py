"""What happens to class heads and label embedding when checkpoint and model do not have the same classes.

Shapes: P classes of the model, R of the checkpoint, C channels.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coco import NUM_RAW_CLASSES, RAW_IDS, coco_names, raw_names
from ..errors import CheckpointError

CLASS_HEAD = r"^(decoder|query_source)\.heads\.class_heads\.\d+\.(weight|bias)$"
LABELS = "query_source.label_encoder.embed.weight"


@dataclass
class ClassRows:
    """Where the rows of the model's classes come from.

    Attributes:
        rows: for each of the model's P classes its row in the checkpoint, None where it is new.
        why: what was done, in words: "kept", "raw COCO ids made contiguous", "carried over by name", "new".
    """

    rows: list[int | None]
    why: str


def count_classes(state: dict[str, Tensor]) -> int | None:
    """Rows of the class heads; None if there is none."""
    return next((len(tensor) for name, tensor in state.items() if re.match(CLASS_HEAD, name)), None)


def match_classes(theirs: int, ours: int, their_names: list[str], our_names: list[str]) -> ClassRows:
    """Finds a row for each of our classes.

    Args:
        theirs, ours: number of classes R and P.
        their_names: of the checkpoint, [] if unknown; then 91 classes are taken for raw COCO ids.
        our_names: of the model, [] if unknown.

    Raises:
        CheckpointError: a list of names has another length than there are classes.
    """
    for whose, names, number in (("the checkpoint", their_names, theirs), ("the model", our_names, ours)):
        if names and len(names) != number:
            raise CheckpointError(
                f"{whose} has {number} classes, but {len(names)} class names ({', '.join(names[:4])}, ...): "
                "MODEL.DN_DETR.NUM_CLASSES and CLASS_NAMES must agree"
            )
    if theirs == NUM_RAW_CLASSES and not their_names:
        their_names = list(raw_names())
    raw = their_names == list(raw_names())
    if raw and ours == len(RAW_IDS) and our_names in ([], list(coco_names())):
        return ClassRows(list(RAW_IDS), "raw COCO ids made contiguous")
    if theirs == ours and (not our_names or not their_names or their_names == our_names):
        return ClassRows(list(range(ours)), "kept")
    found = {name: row for row, name in enumerate(their_names)}
    rows = [found.get(name) for name in our_names] if our_names else [None] * ours
    return ClassRows(rows, "carried over by name" if any(row is not None for row in rows) else "new")


def take_rows(
    state: dict[str, Tensor], model_state: dict[str, Tensor], match: ClassRows, theirs: int
) -> dict[str, Tensor]:
    """A copy of ``state`` whose class heads and label embedding have the model's classes; new rows are the model's own.

    The row "unknown" of the label embedding, its last, is kept.
    """
    result = dict(state)
    known = torch.tensor([i for i, row in enumerate(match.rows) if row is not None], dtype=torch.int64)
    source = torch.tensor([row for row in match.rows if row is not None], dtype=torch.int64)
    for name, tensor in state.items():
        if not (re.match(CLASS_HEAD, name) or name == LABELS) or name not in model_state:
            continue
        if tensor.shape[1:] == model_state[name].shape[1:]:  # otherwise the model is another one, which is said later
            fresh = model_state[name].detach().clone().cpu()
            fresh[known] = tensor[source].to(fresh.dtype)
            if name == LABELS and len(tensor) > theirs:
                fresh[-1] = tensor[-1].to(fresh.dtype)
            result[name] = fresh
    return result


def describe(match: ClassRows, our_names: list[str]) -> str:
    """A table of at most twelve lines: class, and "kept", "carried over" or "new"."""
    word = {"carried over by name": "carried over", "new": "carried over"}.get(match.why, "kept")
    lines = [
        f"  {our_names[i] if our_names else f'class {i}':24} {'new' if row is None else f'{word} (row {row})'}"
        for i, row in enumerate(match.rows)
    ]
    new = sum(row is None for row in match.rows)
    shown = lines[:12] + ([f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else [])
    return "\n".join([f"classes: {len(lines) - new} {word}, {new} new ({match.why})", *shown])
