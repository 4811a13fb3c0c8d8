"""Layers compiled by ``torch.compile``: ``MODEL.DN_DETR.COMPILE``."""

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError

# Value of the key -> parts of the model; of encoder and decoder each layer is compiled by itself.
COMPILED = {"": (), "encoder": ("encoder",), "all": ("backbone", "encoder", "decoder")}


def compile_parts(model: nn.Module, what: str, backend: str = "inductor") -> None:
    """Lets parts of a model run compiled in training mode, from their first pass on; parameters and their names stay.

    Sizes are symbols, so that images of other sizes need no compilation of their own. Layers of a stack have the same code,
    which is compiled once for all of them. In evaluation mode, in exports, and in copies of the model the parts run as they
    are.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR`.
        what: a key of :data:`COMPILED`.
        backend: of ``torch.compile``.
    """
    for name in COMPILED[what]:
        part = getattr(model, name)
        for module in getattr(part, "layers", [part]):
            _run_compiled_in_training(module, torch.compile(module._call_impl, dynamic=True, backend=backend))


def _run_compiled_in_training(module: nn.Module, compiled: Callable) -> None:
    """Puts ``compiled`` where ``nn.Module.compile`` puts it, which copies and pickles leave out."""

    def _call(*args, **kwargs):
        return (compiled if module.training else module._call_impl)(*args, **kwargs)

    module._compiled_call_impl = _call


def check_compile(cfg) -> None:
    """Refuses a ``COMPILE`` that cannot work with this config on this machine; raises ConfigError."""
    root = cfg.MODEL.DN_DETR
    if not root.COMPILE:
        return
    for name in ("ENCODER", "DECODER"):
        if name.lower() in COMPILED[root.COMPILE] and root[name].ACTIVATION_CHECKPOINTING:
            raise ConfigError(
                f"MODEL.DN_DETR.COMPILE = {root.COMPILE!r} compiles the layers of {name}, whose ACTIVATION_CHECKPOINTING "
                "would run them once more; set one of them off"
            )
    if lacking := missing_compiler(cfg.MODEL.DEVICE):
        raise ConfigError(f"MODEL.DN_DETR.COMPILE = {root.COMPILE!r} needs {lacking}; install it, or set COMPILE ''")


def missing_compiler(device: str) -> str:
    """What ``torch.compile`` lacks for a device such as "cuda:0"; "" if nothing."""
    if device.startswith("cuda"):
        return "" if importlib.util.find_spec("triton") else "the package triton"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"
