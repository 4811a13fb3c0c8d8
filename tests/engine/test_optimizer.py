import logging
import re

import pytest
import torch
from conftest import ROOT, TOY
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2_optimizer
from naming import naming
from torch import nn
from toy_training import rates_of

from dn_detr_d2 import setup_cfg
from dn_detr_d2.engine.optimizer import ClippedAdamW, ClippedSGD, build_optimizer, parameter_groups


def groups_by_name(cfg, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g for g in parameter_groups(cfg, model) for p in g["params"]}


def test_learning_rates_follow_the_table(toy_cfg, toy_model):
    overrides = ("SOLVER.BASE_LR", 1.0, "SOLVER.SAMPLING_MULTIPLIER", 0.5)
    groups = groups_by_name(toy_cfg("dn_deformable_detr", *overrides), toy_model("dn_deformable_detr"))
    rates = {name: group["lr"] for name, group in groups.items()}
    assert {rate for name, rate in rates.items() if name.startswith("backbone.")} == {0.1}
    assert rates["encoder.layers.0.self_attn.sampling_offsets.weight"] == 0.5
    assert rates["encoder.layers.0.self_attn.value_proj.weight"] == 1.0
    assert rates["query_source.anchors.weight"] == 1.0


def test_every_trainable_parameter_is_in_one_group(toy_cfg, toy_model):
    model = toy_model("dn_detr", "MODEL.BACKBONE.FREEZE_AT", 2)
    listed = [p for g in parameter_groups(toy_cfg("dn_detr"), model) for p in g["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(not p.requires_grad for p in model.parameters())


def test_weight_decay_of_norms_and_biases(toy_cfg, toy_model):
    overrides = ("SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.5)
    groups = groups_by_name(toy_cfg("dn_detr", *overrides), toy_model("dn_detr"))
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay["decoder.norm.weight"] == 0.0
    assert decay["decoder.heads.class_heads.0.bias"] == 0.5
    assert decay["decoder.heads.class_heads.0.weight"] == 1e-4


def test_embeddings_may_have_a_weight_decay_of_their_own(toy_cfg, toy_model):
    """All but the embedding of the encoder's levels, which is none in the code of Mask2Former."""
    overrides = ("SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.WEIGHT_DECAY_EMBED", 0.0)
    groups = groups_by_name(toy_cfg("dn_deformable_detr", *overrides), toy_model("dn_deformable_detr"))
    embeddings = (
        "query_source.content.weight",
        "query_source.anchors.weight",
        "query_source.label_encoder.embed.weight",
    )
    assert {groups[name]["weight_decay"] for name in embeddings} == {0.0}
    assert groups["encoder.level_embed.weight"]["weight_decay"] == 0.5
    assert groups["decoder.heads.class_heads.0.bias"]["weight_decay"] == 0.5
    same = groups_by_name(toy_cfg("dn_deformable_detr"), toy_model("dn_deformable_detr"))
    assert {same[name]["weight_decay"] for name in embeddings} == {1e-4}


def test_the_polynomial_schedule_falls_to_0(toy_cfg):
    cfg = toy_cfg("dn_detr", "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 2.0)
    assert rates_of(cfg) == pytest.approx([2 * (1 - i / 10) ** 0.9 for i in range(10)])


@pytest.mark.parametrize("name", ["WarmupPolyLR", "WarmupCosineLR", "WarmupMultiStepLR"])
def test_a_warmup_that_is_longer_than_the_training_is_said(toy_cfg, caplog, name):
    """The rate that is named as the largest is that of all iterations; a shorter warm-up reaches more, and is silent."""
    overrides = ["SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 2.0, "SOLVER.STEPS", (8,)]
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        rates = rates_of(toy_cfg("dn_detr", *overrides, "SOLVER.WARMUP_ITERS", 10))
    assert naming("SOLVER.WARMUP_ITERS", "SOLVER.MAX_ITER", f"{max(rates) / 2:.2g}").search(caplog.text)
    assert max(rates) <= 0.2
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dn_detr_d2"):
        rates = rates_of(toy_cfg("dn_detr", *overrides, "SOLVER.WARMUP_ITERS", 1))
    assert not caplog.text
    assert max(rates) > 1.5


def test_clipping_scales_all_gradients_together():
    """Gradients (3, 4) have norm 5: clipped at 1 both become a fifth, wherever they stand."""
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = ClippedAdamW([{"params": [a]}, {"params": [b]}], 1e-3, max_norm=1.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_a_clipped_step_is_adamws_step_on_clipped_gradients():
    weights = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    gradient = torch.randn(5) * 10
    ours = ClippedAdamW([weights[0]], 0.1, max_norm=0.1)
    theirs = torch.optim.AdamW([weights[1]], 0.1)
    for _ in range(3):
        weights[0].grad = gradient.clone()
        weights[1].grad = gradient * 0.1 / (gradient.norm() + 1e-6)
        ours.step()
        theirs.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(("kind", "expected"), [("full_model", ClippedAdamW), ("value", torch.optim.AdamW)])
def test_clip_types(toy_cfg, toy_model, kind, expected):
    optimizer = build_optimizer(toy_cfg("dn_detr", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind), toy_model("dn_detr"))
    assert isinstance(optimizer, expected)
    assert isinstance(optimizer, ClippedAdamW) == (kind == "full_model")


# The authors' groups: base learning rate, then what each part of it has, by our names; the last pattern that fits holds.
# DETR, DAB-, DN-, DINO: main.py has "backbone" at 1e-5. Deformable DETR: lr_linear_proj_names = reference_points (a name
# that its two-stage form does not have) and sampling_offsets at lr_linear_proj_mult = 0.1.
BACKBONE = {r"^backbone\.": 1e-5}
DEFORMABLE = {r"^backbone\.": 2e-5, r"sampling_offsets\.": 2e-5, r"^query_source\.reference\.": 2e-5}
OWN_RECIPES = ("bccd", "bccd_scratch", "quickstart")
DETECTRON2S = ("faster_rcnn_R50_FPN_12ep", "faster_rcnn_dn_R50_FPN_12ep")


@pytest.mark.parametrize("config", sorted(p.stem for p in (ROOT / "configs").glob("[!B]*.yaml")))
def test_learning_rates_are_the_authors(config):
    if config in OWN_RECIPES:
        pytest.skip("a recipe of this project")
    if config in DETECTRON2S:
        pytest.skip("a recipe of Detectron2, compared below")
    deformable = config.startswith("deformable_detr")
    base, rules = (2e-4, DEFORMABLE) if deformable else (1e-4, BACKBONE)
    small = [*TOY, "MODEL.SWIN.SIZE", "T"]
    cfg = setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), small)
    model = build_model(cfg)
    for name, group in groups_by_name(cfg, model).items():
        expected = next((rate for pattern, rate in rules.items() if re.search(pattern, name)), base)
        assert group["lr"] == pytest.approx(expected), name
        if config.startswith(
            "mask"
        ):  # no decay of norms and embeddings, but of the bare embedding of the encoder's levels
            assert group["weight_decay"] == (0 if not_decayed(name, model) else 0.05), name
    names = [name for name, _ in model.named_parameters()]
    assert any(name.startswith("query_source.reference.") for name in names) == (
        deformable and "two_stage" not in config
    )


def not_decayed(name, model):
    """Mask2Former's groups: by the kind of the module, or by the name of Swin's tables."""
    module = model.get_submodule(name.rpartition(".")[0])
    norm = isinstance(module, nn.LayerNorm | nn.GroupNorm)
    embedding = isinstance(module, nn.Embedding) and name != "encoder.level_embed.weight"
    return norm or embedding or "relative_position_bias_table" in name


@pytest.mark.parametrize("config", DETECTRON2S)
def test_the_recipe_of_faster_rcnn_is_detectron2s(config):
    """Its own optimizer over the same model: the same rate, decay and momentum of every parameter."""
    cfg = setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*TOY, "MODEL.RESNETS.NORM", "BN"])
    model = build_model(cfg)
    ours, theirs = build_optimizer(cfg, model), detectron2_optimizer(cfg, model)
    assert type(ours) is type(theirs) is torch.optim.SGD
    groups = [{id(p): group for group in x.param_groups for p in group["params"]} for x in (ours, theirs)]
    assert groups[0].keys() == groups[1].keys()
    for key, group in groups[0].items():
        for name in ("lr", "weight_decay", "momentum", "nesterov"):
            assert group[name] == groups[1][key][name], name


def test_sgd_with_clipping_of_the_whole_model(toy_cfg, toy_model):
    """One step by hand: the gradient of norm 5 is scaled to 0.1, times the rate."""
    optimizer = build_optimizer(toy_cfg("dn_detr", "SOLVER.OPTIMIZER", "SGD"), toy_model("dn_detr"))
    assert isinstance(optimizer, ClippedSGD)
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.grad = torch.tensor([3.0, 4.0])
    ClippedSGD([weight], 0.5, max_norm=0.1, momentum=0.9).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 - 0.5 * 0.06, 2.0 - 0.5 * 0.08]), atol=1e-6, rtol=0)


def test_a_rate_of_sgd_with_adamw_is_told(toy_cfg, toy_model, caplog):
    for rate, told in ((0.02, True), (1e-4, False)):
        caplog.clear()
        build_optimizer(toy_cfg("dn_detr", "SOLVER.BASE_LR", rate), toy_model("dn_detr"))
        assert any("SOLVER.OPTIMIZER" in record.getMessage() for record in caplog.records) == told
