"""What a detector does with a state dict that Detectron2 loads into it: other codes' names are converted, a part is refused.

Detectron2's DefaultPredictor loads weights through ``load_state_dict`` and nothing else, so both are hooks of the model. Our
own checkpointer, and a user who calls ``load_state_dict``, see to completeness themselves.
"""

import logging
import re
import sys

from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from ..errors import CheckpointError
from .classes import count_classes
from .convert import BODIES, convert, identify

logger = logging.getLogger(__name__)


def add_loading_hooks(model: nn.Module) -> None:
    """Lets ``model.load_state_dict`` take what other codes have saved, and Detectron2's checkpointer nothing incomplete."""
    model.register_load_state_dict_pre_hook(_adapt_names)
    model.register_load_state_dict_post_hook(_refuse_partial_weights)


def _adapt_names(model: nn.Module, state: dict, prefix: str, *_) -> None:
    """Converts a whole state dict of another code, whoever loads it: Detectron2's DefaultPredictor offers no other hook.

    What cannot be converted stays as it is, so that ``load_state_dict`` says what is missing and what is unexpected, as it
    does for every module; in Detectron2's checkpointer it is refused, see :func:`_read_by_detectron2`.
    """
    own = model.state_dict()
    source = identify(state)
    if prefix or source is None or source.code == "this project" or all(name in own for name in state):
        return
    try:
        conversion = convert(state, own)
        if conversion.new_classes:
            raise CheckpointError(
                f"the checkpoint ({source}) lacks {len(conversion.new_classes)} of the model's classes; set "
                "MODEL.DN_DETR.NUM_CLASSES to its number, or train the model from it with train_net.py"
            )
    except CheckpointError:
        if _read_by_detectron2():
            raise
        return
    for sentence in conversion.log:
        logger.info(sentence)
    state.clear()
    state.update(conversion.state)


def _read_by_detectron2() -> bool:
    """Whether a checkpointer that only warns of missing weights is at work, which is how DefaultPredictor loads.

    Completeness is a matter of who reads a file, not of the model: our own checkpointer and a user's ``load_state_dict``
    see to it themselves. Detectron2's cannot be told to, and calls nothing but the model; so the model looks for it among
    its callers.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not FvcoreCheckpointer._load_model.__code__:
        frame = frame.f_back
    return frame is not None and not getattr(frame.f_locals["self"], "refuses_partial_weights", False)


def _refuse_partial_weights(model: nn.Module, incompatible) -> None:
    """Raises CheckpointError when Detectron2's checkpointer leaves a part of the model at random.

    For training, a backbone alone is a fine start. A checkpoint whose class head was left out because its shape differs
    is not, nor is one that fits nowhere. For inference (``model.eval()`` before loading, as DefaultPredictor does)
    everything must be there.
    """
    everything = {name for name, _ in model.named_parameters()}
    missing = everything & set(incompatible.missing_keys)
    if not missing or not _read_by_detectron2():
        return
    ours = {name for name in missing if not name.startswith("backbone.")}
    backbone_only = ours == {name for name in everything if not name.startswith("backbone.")}
    pyramid = {
        name for name in everything if re.match(r"backbone\.(?!bottom_up\.|net\.)", name)
    }  # around a body, or all
    fresh = pyramid if any(name.startswith(BODIES) for name in everything) else set()
    if model.training and backbone_only and missing - ours <= fresh:
        return
    shown = ", ".join(sorted(ours or missing)[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    classes = count_classes(model.state_dict())  # None with a decoder of somebody else
    raise CheckpointError(
        f"the checkpoint does not fit the model: {shown} are missing or have another shape; "
        + (f"the model has MODEL.DN_DETR.NUM_CLASSES = {classes}, so " if classes else "")
        + "compare it and the other MODEL keys with the config.yaml that the checkpoint was trained with"
    )
