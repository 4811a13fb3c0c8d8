"""A batch of images of different sizes in which each image ends where it ends alone: padding that no part sees.

Zeros around an image are what a convolution sees beyond its border, so padding with zeros changes nothing at first. But
norms, biases and other images make numbers of these zeros, which the next convolution with more than one weight in a row
brings back into the image. Here padding is set to zero again before each such convolution, and norms over maps leave it out.
A map of stride s has ceil(h / s) rows of an image of h rows, alone and in a batch, for any h.

Shapes: N images, (H, W) the padded size, C channels, (h, w) the size of a map.
"""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

KNOWN_BLOCKS = (BasicBlock, BottleneckBlock)


def can_hide_padding(backbone: nn.Module) -> bool:
    """Whether :func:`resnet_maps` knows the network: Detectron2's ResNets of batch norms and ordinary convolutions."""
    if type(backbone) is not ResNet or type(backbone.stem) is not BasicStem or backbone.num_classes is not None:
        return False
    blocks = [block for stage in backbone.stages for block in stage]
    norms = any(isinstance(x, nn.GroupNorm | nn.LayerNorm) for x in backbone.modules())
    return not norms and all(type(block) in KNOWN_BLOCKS for block in blocks)


def outside(padding: Tensor, stride: int) -> Tensor:
    """(N, H, W) bool padding of the pixels -> (N, h, w) that of the cells of a map, whose first pixel says it."""
    return padding[:, ::stride, ::stride]


def without(x: Tensor, padding: Tensor, stride: int) -> Tensor:
    """(N, C, h, w) with zeros where a map of this stride lies outside its image."""
    return x.masked_fill(outside(padding, stride)[:, None], 0.0)


def resnet_maps(net: ResNet, images: Tensor, padding: Tensor) -> dict[str, Tensor]:
    """The maps of a ResNet, in their images those of each image alone; what stands on padding has no meaning.

    Args:
        net: in evaluation mode, see :func:`can_hide_padding`.
        images: (N, 3, H, W), zero on padding.
        padding: (N, H, W) bool, True right of and below each image.
    """
    # A maximum over zeros is one over nothing, because no number is below zero after a ReLU.
    x = F.relu_(net.stem.conv1(images))
    x = F.max_pool2d(without(x, padding, 2), kernel_size=3, stride=2, padding=1)
    maps, stride = {"stem": x}, 4
    for name, stage in zip(net.stage_names, net.stages, strict=True):
        for block in stage:
            x, stride = _block(block, x, padding, stride)
        maps[name] = x
    return {name: maps[name] for name in net._out_features}


def _block(block: nn.Module, x: Tensor, padding: Tensor, stride: int) -> tuple[Tensor, int]:
    """A residual block and the stride of its map."""
    shortcut = x if block.shortcut is None else block.shortcut(x)
    convolutions = [block.conv1, block.conv2]
    convolutions += [block.conv3] if type(block) is BottleneckBlock else []
    for i, convolution in enumerate(convolutions):
        x = _convolve(convolution, F.relu_(x) if i else x, padding, stride)
        stride *= convolution.stride[0]
    return F.relu_(x + shortcut), stride


def _convolve(convolution: Conv2d, x: Tensor, padding: Tensor, stride: int) -> Tensor:
    """A convolution of a map of this stride."""
    return convolution(x if convolution.kernel_size == (1, 1) else without(x, padding, stride))


def project(projection: nn.Sequential, x: Tensor, padding: Tensor, stride: int) -> tuple[Tensor, int]:
    """A convolution and perhaps a group norm of a neck, and the stride of their map.

    Args:
        projection: of :class:`~.neck.Neck`.
        x: (N, C, h, w) of this stride.
        padding: (N, H, W) bool.
        stride: pixels a cell.
    """
    convolution, *norms = projection
    x = _convolve(convolution, x, padding, stride)
    stride *= convolution.stride[0]
    for norm in norms:
        x = group_norm(norm, x, outside(padding, stride))
    return x, stride


def group_norm(norm: nn.GroupNorm, x: Tensor, padded: Tensor) -> Tensor:
    """A group norm (Wu and He, ECCV 2018, Eq. 1-7) whose mean and variance are those of the cells that are not padded.

    Args:
        norm: with weights.
        x: (N, C, h, w); statistics and result are float32 or wider, as under autocast.
        padded: (N, h, w) bool, with a cell of each image that is not.
    """
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(
        1, (norm.num_groups, -1)
    )  # (N, G, C / G, h, w)
    blocked = padded[:, None, None]
    count = ((~padded).flatten(1).sum(1) * groups.shape[2]).view(-1, 1, 1, 1, 1)
    mean = groups.masked_fill(blocked, 0.0).sum((2, 3, 4), keepdim=True) / count
    centred = (groups - mean).masked_fill(blocked, 0.0)
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    normed = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]
