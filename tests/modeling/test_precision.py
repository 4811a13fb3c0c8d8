"""What stays float32 under autocast: matching costs, losses, reference boxes and their refinement, sampling locations."""

from importlib import import_module

import pytest
import torch
from conftest import ROOT, TOY, make_batch
from detectron2.modeling import build_model

from dn_detr_d2 import setup_cfg
from dn_detr_d2.engine.nonfinite import tensors
from dn_detr_d2.losses import costs, terms
from dn_detr_d2.modeling import heads

SYSTEMS = (
    *("dab_detr_R50_50ep", "dn_detr_R50_50ep", "dn_dab_deformable", "dn_deformable_detr_encoder_only_R50_12ep"),
    *("dino_R50_4scale_12ep", "dino_like_R50_12ep", "detr_R50_500ep", "anchor_detr_R50_50ep"),
    *("deformable_detr_R50_50ep", "deformable_detr_refine_R50_50ep", "deformable_detr_two_stage_R50_50ep"),
)
SPIED = (
    *((costs, name) for name in ("giou_of_corners", "logits_of_labels", "focal_terms")),
    *((terms, name) for name in ("giou_of_corners", "focal_negative", "focal_terms")),
    *((heads, "logit"), (import_module("dn_detr_d2.layers.ms_deform_attn"), "ms_deform_attn_torch")),
)


@pytest.fixture
def dtypes(monkeypatch):
    """{function: dtypes of the floating-point tensors that it got and gave}; of the operator without the value."""
    seen = {}
    for module, name in SPIED:
        original, key = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"

        def spy(*given, original=original, key=key):
            result = original(*given)
            looked_at = given[1:] if "ms_deform" in key else (given, result)
            seen.setdefault(key, set()).update(x.dtype for x in tensors(looked_at) if x.is_floating_point())
            return result

        monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("system", SYSTEMS)
def test_costs_losses_boxes_and_locations_are_float32_under_autocast(dtypes, system, dtype):
    config = str(ROOT / "configs" / f"{system}.yaml")
    model = build_model(setup_cfg(config, [*TOY, "MODEL.DN_DETR.OP_BACKEND", "torch"]))
    halves = []
    model.backbone.register_forward_hook(lambda m, x, output: halves.extend(tensors(output)))
    with torch.autocast("cpu", dtype):
        seen = model.forward_outputs(make_batch(2, 1), model.denoising)
        losses = model.losses(seen)
    assert {x.dtype for x in halves} == {dtype}  # autocast was at work
    assert {key: found for key, found in dtypes.items() if found != {torch.float32}} == {}
    assert {"costs.giou_of_corners", "terms.giou_of_corners", "heads.logit"} <= dtypes.keys()
    assert ("ms_deform_attn.ms_deform_attn_torch" in dtypes) == any(
        "sampling" in n for n, _ in model.named_parameters()
    )
    assert seen.queries.boxes.dtype == seen.predictions.boxes.dtype == seen.memory.valid_ratios.dtype == torch.float32
    assert {loss.value.dtype for loss in losses.values()} == {torch.float32}


def test_a_box_is_refined_as_exactly_under_autocast_as_without():
    head, content, boxes = heads.DetectionHeads(32, 3, 1), torch.randn(50, 32), torch.rand(50, 4)
    torch.nn.init.normal_(head.box_heads[0].layers[-1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        under = head.refine(content, boxes, 0)
    assert torch.equal(under, head.refine(content, boxes, 0))
