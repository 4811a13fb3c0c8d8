"""What happens to class heads and label embedding when checkpoint and model do not have the same classes.

Shapes: P classes of the model, R of the checkpoint, C channels; A anchors of a cell (RetinaNet).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coco import NUM_RAW_CLASSES, RAW_IDS, coco_names, raw_names
from ..errors import CheckpointError

CLASS_HEAD = r"^(decoder|query_source)\.heads\.class_heads\.\d+\.(weight|bias)$"
LABELS = "query_source.label_encoder.embed.weight"
# Detectron2's own detectors: R + 1 rows with "background" last, four rows a class, one row a class; A x R rows.
BOX_SCORES = r"^roi_heads\.box_predictor\.(\d+\.)?cls_score\.(weight|bias)$"
BOX_DELTAS = r"^roi_heads\.box_predictor\.(\d+\.)?bbox_pred\.(weight|bias)$"
MASKS = r"^roi_heads\.mask_head\.predictor\.(weight|bias)$"
ANCHOR_SCORES = r"^head\.cls_score\.(weight|bias)$"
ANCHOR_DELTAS = "head.bbox_pred.bias"


@dataclass
class ClassRows:
    """Where the rows of the model's classes come from.

    Attributes:
        rows: for each of the model's P classes its row in the checkpoint, None where it is new.
        why: what was done, in words: "kept", "raw COCO ids made contiguous", "carried over by name", "new".
    """

    rows: list[int | None]
    why: str


@dataclass
class Layout:
    """How the rows of a tensor belong to classes: ``lead`` blocks of R classes of ``each`` rows, then ``tail`` others."""

    lead: int = 1
    each: int = 1
    tail: int = 0


def layout_of(name: str, rows: int, classes: int) -> Layout | None:
    """The layout of a tensor with rows of classes; None of any other, as of heads that all classes share.

    Args:
        name: in a state dict of ours or of Detectron2's detectors.
        rows: of the tensor.
        classes: R.
    """
    found = None
    if re.match(CLASS_HEAD, name) or re.match(MASKS, name):
        found = Layout()
    elif name == LABELS:
        found = Layout(tail=min(1, max(0, rows - classes)))
    elif re.match(BOX_SCORES, name):
        found = Layout(tail=1)
    elif re.match(BOX_DELTAS, name):
        found = Layout(each=4)
    elif re.match(ANCHOR_SCORES, name):
        found = Layout(lead=rows // classes)
    return found if found and found.lead * found.each * classes + found.tail == rows else None


def count_classes(state: dict[str, Tensor]) -> int | None:
    """How many classes the class heads tell apart, without "background"; None if there is no head."""
    anchors = len(state[ANCHOR_DELTAS]) // 4 if ANCHOR_DELTAS in state else 1
    for name, tensor in state.items():
        if re.match(CLASS_HEAD, name):
            return len(tensor)
        if re.match(BOX_SCORES, name):
            return len(tensor) - 1
        if re.match(ANCHOR_SCORES, name):
            return len(tensor) // anchors
    return None


def match_classes(
    theirs: int, ours: int, their_names: list[str], our_names: list[str], *, raw_ids: bool = True
) -> ClassRows:
    """Finds a row for each of our classes.

    Args:
        theirs, ours: number of classes R and P.
        their_names: of the checkpoint, [] if unknown.
        our_names: of the model, [] if unknown.
        raw_ids: whether 91 classes without names are taken for raw COCO ids.

    Raises:
        CheckpointError: a list of names has another length than there are classes.
    """
    for whose, names, number in (("the checkpoint", their_names, theirs), ("the model", our_names, ours)):
        if names and len(names) != number:
            raise CheckpointError(
                f"{whose} has {number} classes, but {len(names)} class names ({', '.join(names[:4])}, ...): "
                "MODEL.DN_DETR.NUM_CLASSES and CLASS_NAMES must agree"
            )
    if raw_ids and theirs == NUM_RAW_CLASSES and not their_names:
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

    The last row of the label embedding, "unknown", and that of Detectron2's box heads, "background", are kept.
    """
    result = dict(state)
    known = torch.tensor([i for i, row in enumerate(match.rows) if row is not None], dtype=torch.int64)
    source = torch.tensor([row for row in match.rows if row is not None], dtype=torch.int64)
    for name, tensor in state.items():
        own = model_state.get(name)
        if own is None or not tensor.dim() or tensor.shape[1:] != own.shape[1:]:
            continue  # where shapes differ the model is another one, which is said later
        before = layout_of(name, len(tensor), theirs)
        after = layout_of(name, len(own), len(match.rows))
        if before is None or after is None or (before.lead, before.each) != (after.lead, after.each):
            continue
        fresh = own.detach().clone().cpu()
        _by_class(fresh, after, len(match.rows))[:, known] = _by_class(tensor, before, theirs)[:, source].to(
            fresh.dtype
        )
        if before.tail and after.tail:
            fresh[-1] = tensor[-1].to(fresh.dtype)
        result[name] = fresh
    return result


def _by_class(tensor: Tensor, layout: Layout, classes: int) -> Tensor:
    """(lead, classes, each, ...): a view of the rows that belong to classes."""
    rows = tensor[: len(tensor) - layout.tail]
    return rows.view(layout.lead, classes, layout.each, *tensor.shape[1:])


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
