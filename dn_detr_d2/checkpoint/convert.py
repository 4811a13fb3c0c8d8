"""A state dict of another code becomes one of ours; every tensor is used or named."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CheckpointError
from .classes import LABELS, ClassRows, count_classes, describe, match_classes, take_rows
from .names import Source, identify, rename_all
from .timm_names import BODY, to_timm_backbone

# Names that hold no weight of a model: counters of BatchNorm, what detrex registers beside its models, and anchors in older
# checkpoints of Detectron2.
NOTHING = re.compile(r"num_batches_tracked$|^criterion\.|^pixel_(mean|std)$|anchor_generator\.cell_anchors")

# What only a Swin has, and the norms of its maps, which only a detector's Swin has.
SWIN_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
SWIN_NORMS = re.compile(r"norm\d\.")

DETECTRON2S = "a detector of Detectron2"

# Where backbones keep the network that ImageNet has trained: FPN; ViTDet's pyramid and networks of timm.
BODIES = ("backbone.bottom_up.", BODY)


@dataclass
class Conversion:
    """A converted state dict and how it came about.

    Attributes:
        state: tensors under our names.
        source: what the file was.
        log: sentences for the user, in order.
        new_classes: names (or "class 3") of the model's classes that have no row in the file.
        absent: names of the model's tensors that the file lacks, or has in another shape; none unless that was allowed.
    """

    state: dict[str, Tensor]
    source: Source
    log: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def convert(
    state: dict[str, Tensor],
    model_state: dict[str, Tensor],
    their_names: list[str] | tuple = (),
    our_names: list[str] | tuple = (),
    least_matched: float = 1.0,
) -> Conversion:
    """Renames tensors, removes tied copies, brings the classes into line, and compares all with the model.

    A file that holds a backbone alone is compared with the model's backbone.

    Args:
        state: as the file has it.
        model_state: of the model that it is for.
        their_names, our_names: class names of file and model in order of their ids, empty if unknown.
        least_matched: share of the model's tensors that the file must hold, in [0, 1]; below 1, what is in the file alone
            and what has another shape is left out, and the log names it.

    Raises:
        CheckpointError: the file fits nothing known or another model; the text says what it looks like and lists missing,
            left-over and wrongly shaped tensors.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    state = {key: tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor) for key, tensor in state.items()}
    if (found := _of_classifier(state, model_state, least_matched)) is not None:
        return found
    source = identify(state) or _by_model(state, model_state)
    if source is None:
        raise CheckpointError(
            f"this is not a checkpoint of a known system: its tensors are named {_some(state) or 'nothing at all'}; name "
            "one of this project, or of the authors' codes, detrex or torchvision, that MODEL_ZOO.md lists"
        )
    log = []
    if source.system == DETECTRON2S:
        state = {key: x for key, x in state.items() if not NOTHING.search(key)}
    if source.code != "this project":
        log.append(f"the checkpoint is one of {source}; its names were converted")
        state = _rename({key: x for key, x in state.items() if not NOTHING.search(key)}, source, log)
        if _has_no_object(source, model_state):
            state = _part_no_object(state)
    if "backbone" in source.system or source.system == "ImageNet ResNet":
        state, wanted = _fit_backbone(state, model_state)
        state, absent = _compare(state, wanted, source, None, None, least_matched, log)
        return Conversion(state, source, log, absent=absent)

    theirs, ours = count_classes(state), count_classes(model_state)
    match = _match(theirs, ours, their_names, our_names, source)
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
    state, absent = _compare(state, model_state, source, theirs, ours, least_matched, log)
    rows = match.rows if match else []
    new = [our_names[i] if our_names else f"class {i}" for i, row in enumerate(rows) if row is None]
    return Conversion(state, source, log, new, absent)


def _match(theirs, ours, their_names, our_names, source: Source) -> ClassRows | None:
    """Rows of the model's classes in the file; None if one of the two has no class head."""
    if not theirs or not ours:
        return None
    raw_ids = source.system != DETECTRON2S  # a detector of Detectron2 counts its classes from 0 to 79
    return match_classes(theirs, ours, list(their_names), list(our_names), raw_ids=raw_ids)


def classes_in(state: dict[str, Tensor]) -> int | None:
    """How many classes a state dict of a known system tells apart, without "no object"; None if it does not say."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    source = identify(state)
    if source is None:
        return count_classes(state)  # of a detector of Detectron2
    if source.system == "Mask DINO":  # of its last row the model decides
        return None
    if source.code != "this project":
        state = _rename({key: x for key, x in state.items() if not NOTHING.search(key)}, source, [])
        state = _part_no_object(state) if _has_no_object(source, {}) else state
    return count_classes(state)


def _of_classifier(state: dict[str, Tensor], model_state: dict[str, Tensor], least: float) -> Conversion | None:
    """The conversion of a classifier of timm or of the Swin repository; None if the file is none of the model's network."""
    network, log = "timm", ["the checkpoint is one of timm's; its names were converted"]
    if (found := to_timm_backbone(state, model_state)) is not None:
        wanted = {name: model_state[name] for name in found}
    elif (body := _swin_body(state, model_state)) is not None:
        network, log = "Swin", ["the checkpoint is a classifier of the Swin repository; norms of the maps begin anew"]
        whole = {name: x for name, x in model_state.items() if name.startswith(body)}
        wanted = {name: x for name, x in whole.items() if not SWIN_NORMS.match(name, len(body))}
        found = {body + name: x for name, x in state.items() if body + name in wanted}  # without its head
    else:
        return None
    source = Source("ImageNet network", network)
    state, absent = _compare(found, wanted, source, None, None, least, log)
    return Conversion(state, source, log, absent=absent)


def _swin_body(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> str | None:
    """The prefix of a Swin in the model if the file is a classifier of the Swin repository, whose names have none."""
    if SWIN_TABLE not in state or not any(name.startswith("patch_embed.") for name in state):
        return None
    return next((body for body in ("backbone.bottom_up.", "backbone.") if body + SWIN_TABLE in model_state), None)


def _by_model(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> Source | None:
    """A detector of Detectron2, such as Faster R-CNN, has the names of the model that it is for."""
    common = sum(name in model_state for name in state)
    return Source(DETECTRON2S, "this project") if 2 * common > len(state) else None


def _fit_backbone(
    state: dict[str, Tensor], model_state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a whole backbone, or of the body inside a feature pyramid, whose own layers may then start at random.

    Returns:
        tuple: the weights under our names, and the model's tensors that they are for.
    """
    body = next((x for x in BODIES if any(name.startswith(x) for name in model_state)), "backbone.")
    if not any(name.startswith(body) for name in state):
        state = {body + name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    whole = all(name.startswith(body) for name in state)
    wanted = {name: x for name, x in model_state.items() if name.startswith(body if whole else "backbone.")}
    return state, wanted


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
    if differing:
        log.append(f"copies that should be equal differ, the second of each pair was taken: {_some(differing)}")
    return _share_heads(result) if source.system in ("DINO", "Deformable-DETR", "Anchor DETR") else result


def _has_no_object(source: Source, model_state: dict[str, Tensor]) -> bool:
    """Whether the last row of the file's class heads is "no object"; in a file of Mask DINO the model decides."""
    if source.system == "Mask DINO":
        return any("no_object_heads" in name for name in model_state)
    return source.system in ("DETR", "Mask2Former")


def _part_no_object(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class head of DETR and Mask2Former has a last row for "no object"; here it is a head of its own."""
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


def _compare(
    state: dict[str, Tensor], wanted: dict[str, Tensor], source: Source, theirs, ours, least: float, log: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """What fits and the names that are wanting; says how much it is. Raises CheckpointError if that is too little."""
    counted = {name for name in wanted if not NOTHING.search(name)}
    fits = {name for name in counted if name in state and state[name].shape == wanted[name].shape}
    missing = [name for name in wanted if name in counted and name not in state]
    left_over = [name for name in state if name not in wanted and not NOTHING.search(name)]
    wrong = [name for name in state if name in counted and name not in fits]
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}" for name in wrong]
    matched = f"{len(fits)} of {len(counted)} tensors matched"
    faults = (("missing", missing), ("left over", left_over), ("wrong shape", shapes))
    said = "; ".join(f"{title}: {_some(names)}" for title, names in faults if names)
    if not said:
        log.append(matched)
        return state, []
    if least < 1 and fits and len(fits) >= least * len(counted):
        log.append(f"{matched}, the others start at random ({said})")
        return {name: x for name, x in state.items() if name in fits}, [*missing, *wrong]
    classes = f", with {theirs} classes for the model's {ours}" if theirs != ours else ""
    raise CheckpointError(
        f"the checkpoint does not fit the model: it looks like {source}{classes}; {matched}. {said}. "
        f"Choose the config of that system, and compare its {'' if source.system == DETECTRON2S else 'NUM_QUERIES and '}"
        "NUM_CLASSES; a training may start from a part of "
        "it, see MODEL.WEIGHTS_MATCHED"
    )


def _some(names, most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
