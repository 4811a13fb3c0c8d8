"""The dilated ResNet ("DC5") of the DETR family."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone import build_resnet_backbone

from ..errors import ConfigError


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
