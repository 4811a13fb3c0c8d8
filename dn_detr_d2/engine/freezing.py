"""Parts of a model that a training leaves as they are (``MODEL.FREEZE``)."""

import logging
from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)
_NORMS = nn.modules.batchnorm._BatchNorm


def freeze_parts(model: nn.Module, names: Sequence[str]) -> None:
    """Takes the gradient off the parameters of some parts, and keeps the statistics of their batch norms.

    Names of parameters and buffers stay, so checkpoints of the whole model fit. Dropout goes on.

    Args:
        model: the whole model.
        names: of parts such as "backbone", or of parts of parts such as "decoder.layers.0".

    Raises:
        ConfigError: a part that does not exist or has no parameters, or nothing is left to train.
    """
    modules = dict(model.named_modules())
    for name in names:
        part = modules.get(name)
        parameters = [] if part is None or not name else list(part.parameters())
        if not parameters:
            parts = ", ".join(
                child for child, module in model.named_children() if any(True for _ in module.parameters())
            )
            raise ConfigError(
                f"MODEL.FREEZE names {name!r}, which is no part of the model with parameters; its parts are {parts}, and "
                "theirs may be named with dots"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in part.modules():
            if isinstance(module, _NORMS):
                module.register_forward_pre_hook(_evaluate)
        logger.info("%s is frozen: %.2f M parameters", name, sum(p.numel() for p in parameters) / 1e6)
    if names and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"MODEL.FREEZE = {list(names)} leaves nothing to train; take one of them out")


def _evaluate(module: nn.Module, given: tuple) -> None:
    """Before each forward pass, because ``model.train()`` sets the mode of all modules."""
    module.eval()
