"""Detectors as ``TEST.*`` wants them at inference; what evaluation and the predictor share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .data.mapper import has_queries
from .utils.cuda_graphs import Replayed
from .utils.fold_norms import fold_norms
from .utils.precision import dtype_of, inference


class Autocast(nn.Module):
    """A detector of Detectron2's own under autocast; ours has it inside, see :class:`~dn_detr_d2.modeling.DenoisingDETR`.

    Args:
        model: gives Detectron2's outputs.
        device_type: where, such as "cuda".
        dtype: what autocast computes in.
    """

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device_type, dtype

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As of the model, with floating-point numbers in float32."""
        with torch.autocast(self.device_type, self.dtype):
            found = self.model(batched_inputs)
        return [{name: _float32(value) for name, value in outputs.items()} for outputs in found]


def _float32(value):
    """Tensors and instances with floating-point numbers in float32, anything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Boxes):
        return Boxes(value.tensor.float())
    if isinstance(value, Instances):
        return Instances(value.image_size, **{name: _float32(x) for name, x in value.get_fields().items()})
    return value


def settle(model: nn.Module, cfg) -> None:
    """Prepares a detector of ours that will be neither trained nor saved, in place; others are as they are.

    Norms are folded (``TEST.FOLD_NORMS``), which also stores convolutions channels last, and what autocast would cast in
    each pass is cast once: weights of the backbone's convolutions. Outputs are the same but for rounding.

    Args:
        model: in evaluation mode, with its weights.
        cfg: a checked config.
    """
    if not has_queries(cfg):  # rounding may decide an NMS
        return
    if cfg.TEST.FOLD_NORMS:
        fold_norms(model)
    for module in model.backbone.modules() if cfg.TEST.AMP else ():
        if isinstance(module, nn.Conv2d):
            for name, parameter in list(module.named_parameters(recurse=False)):
                narrow = parameter.detach().to(dtype_of(cfg.TEST.AMP))
                setattr(module, name, nn.Parameter(narrow, requires_grad=False))


@contextmanager
def accelerated(model: nn.Module, cfg) -> Iterator[None]:
    """Inside, a detector of ours passes images as ``TEST.COMPILE`` and ``TEST.CUDA_GRAPHS`` say; others are as they are.

    Args:
        model: not in DistributedDataParallel.
        cfg: a checked config.
    """
    accelerate(model, cfg)
    try:
        yield
    finally:
        if hasattr(model, "tensor_pass"):
            model.tensor_pass = None  # a training needs the memory of the recordings


def accelerate(model: nn.Module, cfg) -> None:
    """As :func:`accelerated`, for good."""
    node = cfg.TEST
    if not node.COMPILE and not node.CUDA_GRAPHS:
        return
    function = model.forward_tensors
    if node.COMPILE:
        function = torch.compile(function, dynamic=True)

    def _pass(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        with inference(images.device.type, model.amp):
            return function(images, sizes)

    model.tensor_pass = Replayed(_pass, node.CUDA_GRAPHS) if node.CUDA_GRAPHS else _pass


def prepared(model: nn.Module, cfg) -> nn.Module:
    """The model as ``TEST.AMP`` asks for it, in evaluation mode if it is; itself where there is nothing to do."""
    if not cfg.TEST.AMP or has_queries(cfg):
        return model
    return Autocast(model, torch.device(cfg.MODEL.DEVICE).type, dtype_of(cfg.TEST.AMP)).train(model.training)
