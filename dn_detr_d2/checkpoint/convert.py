"""A state dict of another code becomes one of ours; every tensor is used or named."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CheckpointError
from .classes import LABELS, count_classes, describe, match_classes, take_rows
from .names import Source, identify, rename_all

# Names that hold no weight of a model: counters of BatchNorm, and what detrex registers beside its models.
NOTHING = re.compile(r"num_batches_tracked$|^criterion\.|^pixel_(mean|std)$")

# Where feature pyramids of Detectron2 keep the network that ImageNet has trained: FPN, and that of ViTDet.
BODIES = ("backbone.bottom_up.", "backbone.net.")


@dataclass
class Conversion:
    """A converted state dict and how it came about.

    Attributes:
        state: tensors under our names.
        source: what the file was.
        log: sentences for the user, in order.
        new_classes: names (or "class 3") of the model's classes that have no row in the file.
    """

    state: dict[str, Tensor]
    source: Source
    log: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)


def convert(
    state: dict[str, Tensor],
    model_state: dict[str, Tensor],
    their_names: list[str] | tuple = (),
    our_names: list[str] | tuple = (),
) -> Conversion:
    """Renames tensors, removes tied copies, brings the classes into line, and compares all with the model.

    Args:
        state: as the file has it.
        model_state: of the model that it is for.
        their_names, our_names: class names of file and model in order of their ids, empty if unknown.

    Raises:
        CheckpointError: the file fits nothing known or another model; the text says what it looks like and lists missing,
            left-over and wrongly shaped tensors.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    state = {key: tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor) for key, tensor in state.items()}
    source = identify(state)
    if source is None:
        raise CheckpointError(
            f"this is not a checkpoint of a known system: its tensors are named {_some(state) or 'nothing at all'}"
        )
    log = []
    if source.code != "this project":
        log.append(f"the checkpoint is one of {source}; its names were converted")
        state = _rename({key: x for key, x in state.items() if not NOTHING.search(key)}, source, log)
    if "backbone" in source.system or source.system == "ImageNet ResNet":
        return Conversion(_fit_backbone(state, model_state, source), source, log)

    theirs, ours = count_classes(state), count_classes(model_state)
    match = match_classes(theirs, ours, list(their_names), list(our_names)) if theirs and ours else None
    if match is not None and (match.why != "kept"):
        state = take_rows(state, model_state, match, theirs)
        log.append(describe(match, list(our_names)))
    if (
        LABELS in state
        and LABELS in model_state
        and len(state[LABELS]) == ours
        and len(model_state[LABELS]) == ours + 1
    ):
        state[LABELS] = torch.cat([state[LABELS], torch.zeros_like(state[LABELS][:1])])
        log.append("the label embedding has no row for 'unknown', which DINO never uses; it was filled with zeros")
    if LABELS in state and not any("label_encoder" in name for name in model_state):
        del state[LABELS]
        log.append("the label embedding was left out: the model is built without denoising")
    _compare(state, model_state, source, theirs, ours)
    rows = match.rows if match else []
    new = [our_names[i] if our_names else f"class {i}" for i, row in enumerate(rows) if row is None]
    return Conversion(state, source, log, new)


def _fit_backbone(state: dict[str, Tensor], model_state: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Weights of a whole backbone, or of the body inside a feature pyramid, whose own layers may then start at random."""
    body = next((x for x in BODIES if any(name.startswith(x) for name in model_state)), "backbone.")
    if not any(name.startswith(body) for name in state):
        state = {body + name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    whole = all(name.startswith(body) for name in state)
    wanted = {name: x for name, x in model_state.items() if name.startswith(body if whole else "backbone.")}
    _compare({name: x for name, x in state.items() if not NOTHING.search(name)}, wanted, source, None, None)
    return state


def _rename(state: dict[str, Tensor], source: Source, log: list[str]) -> dict[str, Tensor]:
    """Our names. Of copies of one tensor the last counts, as it does where a file is loaded into tied parameters."""
    result, origin, differing = {}, {}, []
    names = rename_all(list(state), source)
    # The official codes register the decoder, which has a second copy of the heads, before the heads.
    for key in sorted(names, key=lambda key: not key.startswith("transformer.decoder.")):
        name = names[key]
        if name in result and not torch.equal(result[name], state[key]):
            differing.append(f"{origin[name]} and {key}")
        result[name], origin[name] = state[key], key
    if source.system == "DETR":
        result = _part_no_object(result)
    if differing:
        log.append(f"copies that should be equal differ, the second of each pair was taken: {_some(differing)}")
    return _share_heads(result) if source.system in ("DINO", "Deformable-DETR", "Anchor DETR") else result


def _part_no_object(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DETR's class head has a last row for "no object"; here it is a head of its own."""
    head, parted = "decoder.heads.class_heads.", "decoder.heads.no_object_heads."
    heads = {name: x for name, x in state.items() if name.startswith(head)}
    return {
        **state,
        **{name: x[:-1] for name, x in heads.items()},
        **{name.replace(head, parted): x[-1:] for name, x in heads.items()},
    }


def _share_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO and plain Deformable DETR save six copies of heads that their layers share; one is left where they are equal."""
    heads = re.compile(r"^(decoder\.heads\.(?:class|box)_heads)\.(\d+)\.(.*)$")
    first = {m[1] + m[3]: x for name, x in state.items() if (m := heads.match(name)) and m[2] == "0"}
    matches = [(heads.match(name), x) for name, x in state.items()]
    if any(m and not (m[1] + m[3] in first and torch.equal(x, first[m[1] + m[3]])) for m, x in matches):
        return state
    return {name: x for name, x in state.items() if not (m := heads.match(name)) or m[2] == "0"}


def _compare(state: dict[str, Tensor], model_state: dict[str, Tensor], source: Source, theirs, ours) -> None:
    """Raises CheckpointError unless names and shapes agree."""
    missing = [name for name in model_state if name not in state and not NOTHING.search(name)]
    left_over = [name for name in state if name not in model_state and not NOTHING.search(name)]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(model_state[name].shape)}"
        for name in state
        if name in model_state and state[name].shape != model_state[name].shape
    ]
    if not (missing or left_over or shapes):
        return
    parts = [f"{title}: {_some(names)}" for title, names in
             (("missing", missing), ("left over", left_over), ("wrong shape", shapes)) if names]  # fmt: skip
    classes = f", with {theirs} classes for the model's {ours}" if theirs != ours else ""
    raise CheckpointError(
        f"the checkpoint does not fit the model: it looks like {source}{classes}. {'; '.join(parts)}. "
        "Choose the config of that system, and compare its NUM_QUERIES and NUM_CLASSES"
    )


def _some(names, most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
