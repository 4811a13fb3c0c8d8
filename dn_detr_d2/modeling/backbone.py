"""Backbones that Detectron2 has, but cannot build from a YAML file: the DETRs' dilated ResNet, Swin, ViTDet."""

import importlib.util
import logging
import math
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)

# Channels, blocks of each stage, heads of each stage, window, image size of the ImageNet training (Liu et al., ICCV 2021).
SWIN = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 224),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 384),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 384),
}
# Channels, blocks, heads, blocks that see the whole image (Li et al., ECCV 2022).
VIT = {"B": (768, 12, 12, (2, 5, 8, 11)), "L": (1024, 24, 16, (5, 11, 17, 23))}


@BACKBONE_REGISTRY.register()
def build_dc5_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with the stride of res5 replaced by dilation, as torchvision does it.

    The first block of res5 keeps dilation 1 (its input comes from an undilated stage), the others have 2. Detectron2's own
    ``RES5_DILATION: 2`` dilates all of them: same parameters, other function. Parameter names stay Detectron2's.

    Raises:
        ConfigError: ``MODEL.RESNETS.RES5_DILATION`` is not 2, or there is no res5.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 2 or "res5" not in cfg.MODEL.RESNETS.OUT_FEATURES:
        raise ConfigError(
            "MODEL.BACKBONE.NAME = 'build_dc5_resnet_backbone' needs MODEL.RESNETS.RES5_DILATION 2 and res5 among "
            f"OUT_FEATURES, got {cfg.MODEL.RESNETS.RES5_DILATION} and {list(cfg.MODEL.RESNETS.OUT_FEATURES)}"
        )
    backbone = build_resnet_backbone(cfg, input_shape)
    first = backbone.res5[0].conv2
    first.dilation = first.padding = (1, 1)
    return backbone


def wanted_maps(cfg) -> set[str]:
    """Names of the maps of the backbone that the neck, and the pixel decoder of a model with masks, take."""
    node = cfg.MODEL.DN_DETR
    return {*node.IN_FEATURES, *([node.MASK.FEATURE] if node.MASK.ENABLED else [])}


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's Swin transformer of size ``MODEL.SWIN.SIZE``; its maps are p0 to p3, at strides 4 to 32.

    Only those of :func:`wanted_maps` are made: a norm without a gradient would stop distributed training.

    Raises:
        ConfigError: an unknown size, or a drop path without the package timm.
    """
    node = cfg.MODEL.SWIN
    dim, depths, heads, window, image_size = choose(SWIN, node.SIZE, "MODEL.SWIN.SIZE")
    if node.DROP_PATH_RATE > 0:
        require_timm(f"MODEL.SWIN.DROP_PATH_RATE = {node.DROP_PATH_RATE}")
    swin = SwinTransformer(
        pretrain_img_size=image_size,
        embed_dim=dim,
        depths=depths,
        num_heads=heads,
        window_size=window,
        drop_path_rate=node.DROP_PATH_RATE,
        out_indices=[i for i in range(4) if f"p{i}" in wanted_maps(cfg)] or range(4),  # Neck says which there are
    )
    last = max(swin.out_indices)  # what lies behind it would have no gradient
    swin.layers, swin.num_layers = swin.layers[: last + 1], last + 1
    swin.layers[-1].downsample = None
    swin._size_divisibility = 0  # Detectron2's class reads it without ever setting it; it pads by itself
    return swin


def train_what_is_used(backbone: Backbone, cfg) -> None:
    """Takes the gradient off parameters that no map of :func:`wanted_maps` depends on.

    Such as stages of a ResNet behind the last map, or convolutions of an FPN for other maps. They have no gradient anyway,
    and DistributedDataParallel would wait for it. A small image is passed through to find them; a backbone that refuses it
    stays as it is. Swin and ViTDet are built of what is used, and take seconds.
    """
    if isinstance(backbone, SwinTransformer | PaddedPyramid):
        return
    names = [name for name in wanted_maps(cfg) if name in backbone.output_shape()]
    trained = {name: x for name, x in backbone.named_parameters() if x.requires_grad}
    if not names or not trained:
        return  # Neck says what is wrong with the names
    was_training = backbone.training
    side = 2 * math.lcm(32, max(backbone.size_divisibility, 1))
    try:
        with torch.enable_grad():
            maps = backbone.eval()(next(iter(trained.values())).new_zeros(1, 3, side, side))
            reached = torch.autograd.grad(sum(maps[name].sum() for name in names), trained.values(), allow_unused=True)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("which parameters of %s are used was not found: %s", type(backbone).__name__, error)
        return
    finally:
        backbone.train(was_training)
    unused = [name for name, gradient in zip(trained, reached, strict=True) if gradient is None]
    for name in unused:
        trained[name].requires_grad_(False)
    if unused:
        logger.info(
            "%d tensors of the backbone are not trained, no map of IN_FEATURES %s depends on them: %s",
            len(unused),
            list(cfg.MODEL.DN_DETR.IN_FEATURES),
            ", ".join(unused[:6]) + (", ..." if len(unused) > 6 else ""),
        )


class PaddedPyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid, which needs whole cells on all its levels and does not say so in a way that is read."""

    @property
    def size_divisibility(self) -> int:
        """Of the sides of a batch, in pixels: the coarsest stride, at least that of the patches."""
        return max(self.net.patch_embed.proj.stride[0], *self._out_feature_strides.values())


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's plain ViT of size ``MODEL.VIT.SIZE`` with the simple pyramid p2 to p5, at strides 4 to 32.

    Only those of :func:`wanted_maps` are made.

    Raises:
        ConfigError: an unknown size, or the package timm is not there.
    """
    node = cfg.MODEL.VIT
    dim, depth, heads, whole = choose(VIT, node.SIZE, "MODEL.VIT.SIZE")
    require_timm("MODEL.BACKBONE.NAME = 'build_vitdet_backbone'")
    vit = ViT(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        drop_path_rate=node.DROP_PATH_RATE,
        window_size=14,
        window_block_indexes=[i for i in range(depth) if i not in whole],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
    )
    scales = {"p2": 4.0, "p3": 2.0, "p4": 1.0, "p5": 0.5}
    wanted = [scale for name, scale in scales.items() if name in wanted_maps(cfg)]
    return PaddedPyramid(vit, "last_feat", out_channels=256, scale_factors=wanted or list(scales.values()))


def choose(sizes: dict, size: str, key: str) -> tuple:
    """The entry of ``size``; raises ConfigError naming the key and the choices."""
    if size not in sizes:
        raise ConfigError(f"{key} must be one of {', '.join(sizes)}, got {size!r}")
    return sizes[size]


def require_timm(what: str) -> None:
    """Raises ConfigError unless timm can be imported; Detectron2's transformers take blocks from it."""
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(f"{what} needs the package timm; run: pip install timm")
