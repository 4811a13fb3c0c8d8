"""Builds the parts of a detector from a config."""

import torch
from detectron2.modeling import build_backbone
from torch import nn

from ..checkpoint import check_pickle
from ..denoising import QueryDenoising
from ..errors import ConfigError
from ..layers import MultiScaleDeformableAttention, uses_kernel
from ..losses import (
    HungarianMatcher,
    MaskPointCost,
    MaskPoints,
    SetCriterion,
    SoftmaxCriterion,
    SoftmaxMatcher,
    without_masks,
)
from ..utils.precision import dtype_of
from .backbone import train_what_is_used
from .batch import divisor_of
from .check_parts import check_parts
from .compiling import check_compile
from .decoder import Decoder
from .encoder import DeformableEncoder, PlainEncoder
from .hidden_padding import can_hide_padding
from .mask_postprocess import build_postprocess
from .mask_queries import MaskDinoQueries
from .neck import Neck
from .pixel_decoder import PixelDecoder
from .points import draw_points
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
            f"MODEL.DN_DETR.NUM_CLASSES = {root.NUM_CLASSES} must be a positive number here: add MODEL.DN_DETR.NUM_CLASSES "
            "with it, or take the config.yaml of the training; for 'auto' dn_detr_d2.setup_cfg() reads it from the data sets"
        )
    with name_the_node("MODEL.BACKBONE / MODEL.RESNETS"):
        backbone = build_backbone(cfg)
    train_what_is_used(backbone, cfg)
    neck, encoder, decoder = Neck(cfg, backbone.output_shape()), build_encoder(cfg), build_decoder(cfg)
    matcher, criterion = build_matcher(cfg), build_criterion(cfg, decoder.BOXES)
    choose_backend(cfg, encoder, decoder)
    pixel_decoder = PixelDecoder(cfg, backbone.output_shape()) if root.MASK.ENABLED else None
    query_source = build_query_source(cfg)
    if isinstance(query_source, MaskDinoQueries):
        query_source.borrow_heads(decoder)
    denoising = build_denoising(cfg, query_source, criterion)
    divisor = divisor_of(root.SIZE_DIVISIBILITY, backbone)
    check_parts(cfg, neck, encoder, query_source, decoder, denoising, divisor)
    check_prompt_keys(cfg, query_source, denoising)
    check_boxes(cfg, decoder, matcher, criterion)
    check_compile(cfg)
    return {
        "backbone": backbone,
        "neck": neck,
        "encoder": encoder,
        "query_source": query_source,
        "decoder": decoder,
        "pixel_decoder": pixel_decoder,
        "denoising": denoising,
        "matcher": matcher,
        "criterion": criterion,
        "postprocess": build_postprocess(cfg),
        "pad_to_largest": cfg.TEST.PAD_TO_LARGEST,
        "hide_padding": hides_padding(cfg, backbone, encoder),
        "amp": dtype_of(cfg.TEST.AMP),
        "size_divisibility": root.SIZE_DIVISIBILITY,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "compiled": root.COMPILE,
    }


def hides_padding(cfg, backbone: nn.Module, encoder: nn.Module) -> bool:
    """``TEST.HIDE_PADDING``; raises ConfigError where some part of the model would see padding nevertheless."""
    root = cfg.MODEL.DN_DETR
    if not cfg.TEST.HIDE_PADDING:
        return False
    reasons = {
        f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} is no ResNet of Detectron2 with batch norms and without "
        "deformable convolutions": not can_hide_padding(backbone),
        f"ENCODER.NAME {root.ENCODER.NAME!r} takes means over it": not isinstance(
            encoder, PlainEncoder | DeformableEncoder
        ),
        "MASK.ENABLED True makes it a part of the image": root.MASK.ENABLED,
    }
    if wrong := [reason for reason, found in reasons.items() if found]:
        raise ConfigError(f"TEST.HIDE_PADDING = True cannot hide padding, because {wrong[0]}; set it to False")
    return True


def check_boxes(cfg, decoder: Decoder, matcher: HungarianMatcher, criterion: SetCriterion) -> None:
    """Refuses losses and costs of boxes in a model that has none; raises ConfigError."""
    if decoder.BOXES:
        return
    root = cfg.MODEL.DN_DETR
    names = {"l1": "L1", "giou": "GIOU"}
    wrong = [f"LOSS.{names[x.name]}_WEIGHT {x.weight}" for x in criterion.terms if x.name in names]
    wrong += [f"MATCHER.{names[x.name]}_COST {x.weight}" for x in matcher.costs if x.name in names]
    if wrong:
        raise ConfigError(
            f"MODEL.DN_DETR.DECODER.NAME = {root.DECODER.NAME!r} predicts no boxes, but there are {', '.join(wrong)}; set "
            "them to 0"
        )


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
            criterion=criterion if node.MASK_LOSS else without_masks(criterion),
            loss_weight=node.LOSS_WEIGHT,
            attention_mask=node.ATTENTION_MASK,
            local_normalizer=node.NORMALIZER == "local",
        )


def build_matcher(cfg) -> HungarianMatcher:
    """The matcher of ``MODEL.DN_DETR.MATCHER`` with ``LOSS.CLASS_LOSS``; costs of boxes with weight 0 are left out.

    Raises:
        ConfigError: a softmax cost of logits without "no object", or a value outside its range.
    """
    root = cfg.MODEL.DN_DETR
    node, loss, mask = root.MATCHER, root.LOSS, root.MASK
    kind = node.CLASS_COST_KIND or loss.CLASS_LOSS
    if kind == "softmax" and loss.CLASS_LOSS != "softmax":
        raise ConfigError(
            f"MODEL.DN_DETR.MATCHER.CLASS_COST_KIND = 'softmax' needs LOSS.CLASS_LOSS 'softmax', got {loss.CLASS_LOSS!r}"
        )
    with name_the_node("MODEL.DN_DETR.MATCHER / LOSS"):
        matcher = (SoftmaxMatcher if kind == "softmax" else HungarianMatcher)(
            class_cost=node.CLASS_COST,
            l1_cost=node.L1_COST,
            giou_cost=node.GIOU_COST,
            focal_alpha=loss.FOCAL_ALPHA,
            focal_gamma=loss.FOCAL_GAMMA,
            giou_eps=loss.GIOU_EPS,
        )
        if mask.ENABLED:
            masks = MaskPointCost(node.MASK_COST, node.DICE_COST, num_points=mask.NUM_POINTS, draw=draw_points)
            matcher = HungarianMatcher([*_without_boxes(matcher.costs), masks])
    return matcher


def _without_boxes(terms: list) -> list:
    """Terms or costs without those of boxes whose weight is 0: a model with masks may have no boxes."""
    return [term for term in terms if term.name == "class" or term.weight]


def build_criterion(cfg, boxes: bool = True) -> SetCriterion:
    """The criterion of ``MODEL.DN_DETR.LOSS``.

    Args:
        cfg: the config.
        boxes: whether the model predicts any. Without, their losses are left out; with, those of weight 0 stay, so that the
            box heads have a gradient, for which DistributedDataParallel would wait.
    """
    node, mask = cfg.MODEL.DN_DETR.LOSS, cfg.MODEL.DN_DETR.MASK
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
            criterion = SoftmaxCriterion(no_object_weight=node.NO_OBJECT_WEIGHT, **settings)
        else:
            criterion = SetCriterion(**settings)
        if mask.ENABLED:
            masks = MaskPoints(
                node.MASK_WEIGHT,
                node.DICE_WEIGHT,
                num_points=mask.NUM_POINTS,
                draw=draw_points,
                oversample_ratio=mask.OVERSAMPLE_RATIO,
                importance_ratio=mask.IMPORTANCE_SAMPLE_RATIO,
            )
            criterion = type(criterion)([*(criterion.terms if boxes else _without_boxes(criterion.terms)), masks])
    return criterion


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
