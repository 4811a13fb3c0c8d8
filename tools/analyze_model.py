#!/usr/bin/env python3
"""Counts what a config costs: parameters, multiplications, activations and memory, by part, for one image.

    python tools/analyze_model.py --config-file configs/dn_detr_R50_50ep.yaml
    python tools/analyze_model.py --config-file configs/dino_R50_4scale_12ep.yaml --size 800 1066 --memory

GFLOPs are 10^9 multiply-adds. The first column counts all that matters: convolutions, linear layers, products of attention,
deformable attention, norms. The second leaves linear layers and deformable attention out and adds 7 operations for each
attention weight: so the figures of the DAB-DETR and DN-DETR papers come out (docs/parity.md). 91 classes as there unless
NUM_CLASSES says otherwise; the image is 800 x 1333.
"""

import argparse
import logging
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_detr_d2  # noqa: F401  before detectron2, whose import alone warns of torch.jit

# isort: split

import torch
from detectron2.modeling import build_model
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate

from dn_detr_d2 import UserError, setup_cfg

PARTS = ("backbone", "neck", "encoder", "query_source", "decoder")


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


HANDLES = {
    "aten::scaled_dot_product_attention": attention_flops,
    "aten::linear": linear_flops,
    "dn_detr_d2::ms_deform_attn": deformable_flops,
    "dn_detr_d2::ms_deform_attn_fused": deformable_flops,
}
NOT_IN_PAPERS = ("linear", "deformable attention")


class OneImage(torch.nn.Module):
    """The detector from a normalised image to logits and boxes, so that each part keeps its name."""

    def __init__(self, model):
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(model, name))

    def forward(self, image):
        """(1, 3, H, W) -> logits and boxes of the last layer."""
        padding = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        memory = self.encoder(self.neck(self.backbone(image), padding))
        predictions = self.decoder(self.query_source(memory), memory)
        return predictions.logits[-1], predictions.boxes[-1]


def analyze(cfg, height: int, width: int) -> dict:
    """Part -> {"parameters", "trainable", "gflops", "paper_gflops", "mactivations"}, and the same for "total"."""
    model = build_model(cfg).eval()
    image = torch.zeros(1, 3, height, width)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flops = FlopCountAnalysis(OneImage(model), image).set_op_handle(**HANDLES)
        activations = ActivationCountAnalysis(OneImage(model), image)
        for analysis in (flops, activations):
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        per_part, per_operator = flops.by_module(), flops.by_module_and_operator()
        outputs = activations.by_module()
    result = {}
    for name in (*PARTS, ""):
        module = model.get_submodule(name)
        parameters = list(module.parameters())
        result[name or "total"] = {
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "gflops": (per_part[name] - per_operator[name]["softmax"]) / 1e9,
            "paper_gflops": (per_part[name] - sum(per_operator[name][kind] for kind in NOT_IN_PAPERS)) / 1e9,
            "mactivations": outputs[name] / 1e6,
        }
    return result


def measure_memory(cfg, height: int, width: int) -> int:
    """Bytes that autograd keeps between forward and backward of one training image with seven objects."""
    from detectron2.structures import Boxes, Instances

    model = build_model(cfg).train()
    boxes = Boxes(torch.tensor([[10.0, 10.0, width / 2, height / 2]]).repeat(7, 1))
    instances = Instances((height, width), gt_boxes=boxes, gt_classes=torch.zeros(7, dtype=torch.int64))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model([{"image": torch.zeros(3, height, width, dtype=torch.uint8), "instances": instances}])
    del losses
    return sum(size for address, size in kept.items() if address not in weights)


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="of the image in pixels"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also run a training step and measure what autograd keeps"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_intermixed_args()
    opts = ["MODEL.DN_DETR.NUM_CLASSES", 91, *args.opts, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    try:
        cfg = setup_cfg(args.config_file, [*opts, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], splits=())
        if min(args.size) < 32:
            raise UserError(f"--size must be at least 32 32, got {args.size[0]} {args.size[1]}")
        table = analyze(cfg, *args.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [[part, f"{x['parameters']:,}", f"{x['trainable']:,}", f"{x['gflops']:.1f}", f"{x['paper_gflops']:.1f}",
             f"{x['mactivations']:.1f}"]
            for part, x in table.items()]  # fmt: skip
    headers = ["part", "parameters", "trainable", "GFLOPs", "as in the papers", "M activations"]
    print(tabulate(rows, headers, tablefmt="github", colalign=("left", *["right"] * 5), disable_numparse=True))
    print(f"one image of {args.size[0]} x {args.size[1]}, {cfg.MODEL.DN_DETR.NUM_CLASSES} classes, inference")
    if args.memory:
        print(
            f"kept for the backward pass of such an image with 7 objects: {measure_memory(cfg, *args.size) / 2**20:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
