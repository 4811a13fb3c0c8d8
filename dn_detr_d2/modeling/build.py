"""Builds the parts of a detector from a config."""

import torch
from detectron2.modeling import build_backbone
from torch import nn

from ..checkpoint import check_pickle
from ..denoising import QueryDenoising
from ..errors import ConfigError
from ..layers import MultiScaleDeformableAttention, uses_kernel
from ..losses import HungarianMatcher, SetCriterion, SoftmaxCriterion, SoftmaxMatcher
from .mask_postprocess import build_postprocess
from .neck import Neck
from .prompting import check_prompt_keys
from .registry import (
    DECODER_REGISTRY,
    DENOISING_REGISTRY,
    ENCODER_REGISTRY,
    QUERY_SOURCE_REGISTRY,
    lookup,
    name_the_node,
)


def build_parts(cfg) -> dict:
    """The constructor arguments of :class:`~dn_detr_d2.modeling.DenoisingDETR`.

    Raises:
        ConfigError: keys that do not go together, or a value outside its range.
    """
    root = cfg.MODEL.DN_DETR
    check_pickle(cfg.MODEL.WEIGHTS)  # the last moment before DefaultPredictor unpickles it
    if not isinstance(root.NUM_CLASSES, int) or root.NUM_CLASSES < 1:
        raise ConfigError(
            f"MODEL.DN_DETR.NUM_CLASSES = {root.NUM_CLASSES} must be a positive number here; 'auto' is resolved from "
            "DATASETS.TRAIN by dn_detr_d2.setup_cfg() and in the config.yaml that training writes"
        )
    with name_the_node("MODEL.BACKBONE / MODEL.RESNETS"):
        backbone = build_backbone(cfg)
    matcher, criterion = build_matcher(cfg), build_criterion(cfg)
    neck, encoder, decoder = Neck(cfg, backbone.output_shape()), build_encoder(cfg), build_decoder(cfg)
    choose_backend(cfg, encoder, decoder)
    query_source = build_query_source(cfg)
    denoising = build_denoising(cfg, query_source, criterion)
    check_prompt_keys(cfg, query_source, denoising)
    return {
        "backbone": backbone,
        "neck": neck,
        "encoder": encoder,
        "query_source": query_source,
        "decoder": decoder,
        "denoising": denoising,
        "matcher": matcher,
        "criterion": criterion,
        "postprocess": build_postprocess(cfg),
        "pad_to_largest": cfg.TEST.PAD_TO_LARGEST,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def build_query_source(cfg) -> nn.Module:
    """The query source named by ``MODEL.DN_DETR.QUERY_SOURCE.NAME``."""
    name = cfg.MODEL.DN_DETR.QUERY_SOURCE.NAME
    return lookup(QUERY_SOURCE_REGISTRY, name, "MODEL.DN_DETR.QUERY_SOURCE.NAME")(cfg)


def build_encoder(cfg) -> nn.Module:
    """The encoder named by ``MODEL.DN_DETR.ENCODER.NAME``."""
    name = cfg.MODEL.DN_DETR.ENCODER.NAME
    return lookup(ENCODER_REGISTRY, name, "MODEL.DN_DETR.ENCODER.NAME")(cfg)


def build_decoder(cfg) -> nn.Module:
    """The decoder named by ``MODEL.DN_DETR.DECODER.NAME``."""
    name = cfg.MODEL.DN_DETR.DECODER.NAME
    return lookup(DECODER_REGISTRY, name, "MODEL.DN_DETR.DECODER.NAME")(cfg)


def build_denoising(cfg, query_source: nn.Module, criterion: SetCriterion) -> QueryDenoising | None:
    """Denoising with the generator named by ``MODEL.DN_DETR.DENOISING.NAME``; None when that is empty.

    Args:
        cfg: the config.
        query_source: its ``embed`` makes the queries.
        criterion: of the losses.

    Raises:
        ConfigError: a value outside its range.
    """
    node = cfg.MODEL.DN_DETR.DENOISING
    if node.NORMALIZER not in ("global", "local"):
        raise ConfigError(f"MODEL.DN_DETR.DENOISING.NORMALIZER must be 'global' or 'local', got {node.NORMALIZER!r}")
    if not node.NAME:
        return None
    generator = lookup(DENOISING_REGISTRY, node.NAME, "MODEL.DN_DETR.DENOISING.NAME")
    with name_the_node("MODEL.DN_DETR.DENOISING"):
        return QueryDenoising(
            generator(**generator.from_config(cfg)),
            embed=query_source.embed,
            criterion=criterion,
            loss_weight=node.LOSS_WEIGHT,
            attention_mask=node.ATTENTION_MASK,
            local_normalizer=node.NORMALIZER == "local",
        )


def build_matcher(cfg) -> HungarianMatcher:
    """The matcher of ``MODEL.DN_DETR.MATCHER`` that goes with ``LOSS.CLASS_LOSS``."""
    root = cfg.MODEL.DN_DETR
    node, loss = root.MATCHER, root.LOSS
    with name_the_node("MODEL.DN_DETR.MATCHER / LOSS"):
        return (SoftmaxMatcher if loss.CLASS_LOSS == "softmax" else HungarianMatcher)(
            class_cost=node.CLASS_COST,
            l1_cost=node.L1_COST,
            giou_cost=node.GIOU_COST,
            focal_alpha=loss.FOCAL_ALPHA,
            focal_gamma=loss.FOCAL_GAMMA,
            giou_eps=loss.GIOU_EPS,
        )


def build_criterion(cfg) -> SetCriterion:
    """The criterion of ``MODEL.DN_DETR.LOSS``."""
    node = cfg.MODEL.DN_DETR.LOSS
    settings = {
        "class_weight": node.CLASS_WEIGHT,
        "l1_weight": node.L1_WEIGHT,
        "giou_weight": node.GIOU_WEIGHT,
        "focal_alpha": node.FOCAL_ALPHA,
        "focal_gamma": node.FOCAL_GAMMA,
        "giou_eps": node.GIOU_EPS,
    }
    with name_the_node("MODEL.DN_DETR.MATCHER / LOSS"):
        if node.CLASS_LOSS == "softmax":
            return SoftmaxCriterion(no_object_weight=node.NO_OBJECT_WEIGHT, **settings)
        return SetCriterion(**settings)


def choose_backend(cfg, *parts: nn.Module) -> None:
    """Sets what computes the deformable attention of ``parts``, by ``MODEL.DN_DETR.OP_BACKEND``; the log says which it is.

    Raises:
        ConfigError: that backend does not work on ``MODEL.DEVICE``.
    """
    backend = cfg.MODEL.DN_DETR.OP_BACKEND
    modules = [x for part in parts for x in part.modules() if isinstance(x, MultiScaleDeformableAttention)]
    with name_the_node("MODEL.DN_DETR.OP_BACKEND"):
        if modules:
            uses_kernel(backend, torch.device(cfg.MODEL.DEVICE).type)
    for module in modules:
        module.backend = backend
