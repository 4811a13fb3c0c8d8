"""What a model costs: parameters, multiply-adds, activations and memory, by part, for one image.

GFLOPs are 10^9 multiply-adds: of convolutions, linear layers, products of attention, deformable attention and norms.
*Paper* GFLOPs leave linear layers and deformable attention out and add 7 operations for each attention weight, which gives
the figures of the DAB-DETR and DN-DETR papers (docs/parity.md).
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor

from ..modeling.tensor_model import PARTS, TensorModel
from .model_state import require_queries


def attention_flops(inputs, outputs) -> Counter:
    """Multiply-adds of ``scaled_dot_product_attention``: Q K^T and the weighted sum of the values; the softmax apart."""
    (*batch, queries, width), (*_, keys, values) = get_shape(inputs[0]), get_shape(inputs[2])
    weights = math.prod(batch) * queries * keys
    return Counter({"attention": weights * (width + values), "softmax": 7 * weights})


def deformable_flops(inputs, outputs) -> Counter:
    """Multiply-adds of deformable attention: four corners and one weight for every sampling point and channel."""
    n, _, h, d = get_shape(inputs[0])
    offsets = next(get_shape(x) for x in inputs if x.isCompleteTensor() and len(get_shape(x)) == 6)
    return Counter({"deformable attention": n * offsets[1] * h * math.prod(offsets[3:5]) * d * 5})


def linear_flops(inputs, outputs) -> Counter:
    """Multiply-adds of a linear layer."""
    return Counter({"linear": math.prod(get_shape(inputs[0])) * get_shape(inputs[1])[0]})


def together_flops(inputs, outputs) -> Counter:
    """Multiply-adds of linear layers that are one batched product."""
    return Counter({"linear": math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]})


HANDLES = {
    "aten::baddbmm": together_flops,
    "aten::scaled_dot_product_attention": attention_flops,
    "aten::linear": linear_flops,
    "dn_detr_d2::ms_deform_attn": deformable_flops,
    "dn_detr_d2::ms_deform_attn_fused": deformable_flops,
}
NOT_IN_PAPERS = ("linear", "deformable attention")


def analyze(cfg, height: int, width: int) -> dict:
    """Part -> {"parameters", "trainable", "gflops", "paper_gflops", "mactivations"}, and the same for "total"."""
    model = require_queries(build_model(cfg)).eval()
    step = model.size_divisibility
    image = torch.zeros(1, 3, -(-height // step) * step, -(-width // step) * step)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flops = FlopCountAnalysis(TensorModel(model), image).set_op_handle(**HANDLES)
        activations = ActivationCountAnalysis(TensorModel(model), image)
        for analysis in (flops, activations):
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        per_part, per_operator = flops.by_module(), flops.by_module_and_operator()
        outputs = activations.by_module()
    result = {}
    for name in (*(part for part in PARTS if getattr(model, part) is not None), ""):
        module, traced = model.get_submodule(name), f"model.{name}" if name else ""
        parameters = list(module.parameters())
        result[name or "total"] = {
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "gflops": (per_part[traced] - per_operator[traced]["softmax"]) / 1e9,
            "paper_gflops": (per_part[traced] - sum(per_operator[traced][kind] for kind in NOT_IN_PAPERS)) / 1e9,
            "mactivations": outputs[traced] / 1e6,
        }
    return result


def measure_memory(cfg, height: int, width: int) -> int:
    """Bytes that autograd keeps between forward and backward of one training image with seven objects."""
    model = build_model(cfg).train()
    boxes = Boxes(torch.tensor([[10.0, 10.0, width / 2, height / 2]]).repeat(7, 1))
    instances = Instances((height, width), gt_boxes=boxes, gt_classes=torch.zeros(7, dtype=torch.int64))
    if model.pixel_decoder is not None:
        instances.gt_masks = BitMasks(torch.ones(7, height, width, dtype=torch.bool))
    with KeptBytes(model.parameters()) as kept:
        losses = model([{"image": torch.zeros(3, height, width, dtype=torch.uint8), "instances": instances}])
    del losses
    return kept.total


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts bytes of distinct storages that autograd keeps for the backward pass.

    Args:
        known: tensors that are there anyway, such as parameters; their storages do not count.

    Attributes:
        total: bytes until now.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__(self._keep, lambda tensor: tensor)
        self._seen, self.total = {x.untyped_storage().data_ptr() for x in known}, 0

    def __enter__(self) -> "KeptBytes":
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
