"""Registries of the roles, and what all parts need when they are built.

A new detector is a new class registered here and named in a YAML file, never a new flag.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from detectron2.utils.registry import Registry
from torch import nn

from ..denoising import BudgetDenoisingGenerator, ContrastiveDenoisingGenerator, DenoisingGenerator
from ..errors import ConfigError
from ..layers import MultiScaleDeformableAttention

QUERY_SOURCE_REGISTRY = Registry("QUERY_SOURCE")
QUERY_SOURCE_REGISTRY.__doc__ = "Where queries come from: ``Class(cfg)``, forward(memory) and embed(noised)."
ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = "Pyramid -> Memory: ``Class(cfg)``."
DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = "(ObjectQueries, Memory) -> Predictions: ``Class(cfg)``."
DECODER_LAYER_REGISTRY = Registry("DECODER_LAYER")
DECODER_LAYER_REGISTRY.__doc__ = "One decoder layer, used by the decoders."
DENOISING_REGISTRY = Registry("DENOISING")
DENOISING_REGISTRY.__doc__ = "Targets -> NoisedTargets, without parameters."
DENOISING_REGISTRY.register(DenoisingGenerator)
DENOISING_REGISTRY.register(BudgetDenoisingGenerator)
DENOISING_REGISTRY.register(ContrastiveDenoisingGenerator)


def lookup(registry: Registry, name: str, key: str):
    """The class registered as ``name``; raises ConfigError naming the key and the choices."""
    if name not in registry:
        choices = ", ".join(sorted(known for known, _ in registry))
        raise ConfigError(f"{key} = {name!r} is not known; choose one of: {choices}")
    return registry.get(name)


@contextmanager
def name_the_node(node: str):
    """Turns complaints of parts that know no config into ConfigErrors that name the config node."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"{node}: {error.args[0] if error.args else repr(error)}") from None


def initialise_transformer(module: nn.Module, initialization: str = "detr") -> nn.Module:
    """Gives an encoder, a decoder or a part of one its start weights, in place; returns ``module``.

    Args:
        module: attention has its own start already.
        initialization: ``MODEL.DN_DETR.INITIALIZATION``. "detr": Xavier-uniform on every matrix, but deformable attention
            keeps its own start. "dn_encoder_only": Xavier-uniform also on the matrices of its sampling offsets and attention
            weights. "anchor_detr": as PyTorch starts them, with all layers as copies of the first.
    """
    if initialization == "anchor_detr":
        start_as_the_first(getattr(module, "layers", ()))
        return module
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    if initialization == "detr":
        for child in module.modules():
            if isinstance(child, MultiScaleDeformableAttention):
                child.reset_parameters()
    return module


@torch.no_grad()
def start_as_the_first(layers: Sequence[nn.Module]) -> None:
    """Copies the weights of the first of some layers to those of the same name and shape in the others."""
    for layer in layers[1:]:
        for name, parameter in layer.named_parameters():
            first = dict(layers[0].named_parameters()).get(name)
            if first is not None and first.shape == parameter.shape:
                parameter.copy_(first)
