"""Denoising on detectors that were published without it: DETR, Anchor DETR and the three forms of Deformable DETR."""

import pytest
import torch
from conftest import ROOT, TOY, make_batch, off_the_start
from detectron2.modeling import build_model

from dn_detr_d2 import DenoisingGenerator, setup_cfg
from dn_detr_d2.diagnostics import check_denoising
from dn_detr_d2.layers import sine_encoding
from dn_detr_d2.structures import Targets

HOSTS = {
    "detr_dn_R50_300ep": "detr_R50_300ep",
    "anchor_detr_dn_DC5-R50_12ep": "anchor_detr_DC5-R50_12ep",
    "deformable_detr_dn_R50_50ep": "deformable_detr_R50_50ep",
    "deformable_detr_refine_dn_R50_50ep": "deformable_detr_refine_R50_50ep",
    "deformable_detr_two_stage_dn_R50_50ep": "deformable_detr_two_stage_R50_50ep",
}
DROPOUT = [x for role in ("ENCODER", "DECODER") for x in (f"MODEL.DN_DETR.{role}.DROPOUT", 0.0)]


def make(config, *overrides):
    """A small model with weights off their symmetric start."""
    model = build_model(setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*TOY, *DROPOUT, *overrides]))
    torch.manual_seed(1)
    return off_the_start(model)


def noise(groups=2, counts=(2, 1)):
    targets = [(torch.randint(5, (n,)), torch.rand(n, 4) * 0.4 + 0.3) for n in counts]
    generator = DenoisingGenerator(num_classes=5, num_groups=groups)
    return generator(Targets.pad([labels for labels, _ in targets], [boxes for _, boxes in targets]))


@pytest.mark.parametrize("host", HOSTS)
def test_nobody_sees_a_denoising_query_of_another_group(host):
    check_denoising(make(host, "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 3).train(), make_batch(3, 2))


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("host", HOSTS)
def test_every_parameter_has_a_gradient_and_losses_of_both_parts(host, counts):
    model = make(host).train()
    losses = model(make_batch(*counts))
    sum(losses.values()).backward()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []
    assert {f"dn/{term}{layer}" for term in ("class", "l1", "giou") for layer in ("", "_0", "_1")} <= losses.keys()
    assert all(value.isfinite() for value in losses.values())
    assert (sum(losses[name] for name in losses if name.startswith("dn/")) > 0) == any(counts)


@pytest.mark.parametrize(("host", "baseline"), HOSTS.items())
def test_weights_of_the_baseline_give_its_detections(host, baseline):
    """Denoising adds weights of its own and touches no other; in evaluation it is not there."""
    plain, denoising = make(baseline).eval(), make(host).eval()
    keys = denoising.load_state_dict(plain.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    added = ("query_source.label_encoder.", "query_source.box_embed.")
    assert keys.missing_keys
    assert all(name.startswith(added) for name in keys.missing_keys)
    batch = make_batch(0, 0)
    with torch.no_grad():
        for a, b in zip(plain(batch), denoising(batch), strict=True):
            assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
            assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("host", HOSTS)
def test_matching_losses_are_those_of_the_baseline(host):
    """The same weights, with and without denoising queries in the decoder."""
    model, batch = make(host).train(), make_batch(3, 2)
    with torch.no_grad():
        with_denoising = model(batch)
        model.denoising = None
        without = model(batch)
    for name, value in without.items():
        torch.testing.assert_close(with_denoising[name], value, atol=1e-5, rtol=1e-5)


def test_queries_of_detr():
    """Position = linear function of the noised box + label embedding, content 0, no reference; zeros where padded."""
    source, noised = make("detr_dn_R50_300ep").query_source, noise()
    queries = source.embed(noised)
    weight, bias, table = source.box_embed.weight, source.box_embed.bias, source.label_encoder.embed.weight
    for image, slot in ((0, 1), (1, 0)):
        expected = weight @ noised.boxes[image, slot] + bias + table[noised.labels[image, slot]]
        torch.testing.assert_close(queries.position[image, slot], expected)
    assert not noised.valid[1, 1]
    assert queries.position[1, 1].eq(0).all()
    assert queries.content.eq(0).all()
    assert queries.boxes.eq(0.5).all()


def test_queries_of_anchor_detr():
    """Point = centre of the noised box, content = label embedding; one for each copy, whatever the number of patterns."""
    model = make("anchor_detr_dn_DC5-R50_12ep")
    source, noised = model.query_source, noise()
    queries = source.embed(noised)
    assert queries.content.shape[1] == noised.num_queries == 4
    assert torch.equal(queries.content[0, 1], source.label_encoder.embed.weight[noised.labels[0, 1]])
    assert torch.equal(queries.boxes[..., :2], noised.boxes[..., :2])
    assert queries.boxes[..., 2:].eq(0.5).all()
    assert (model.denoising.generator.center_noise_scale, model.denoising.generator.size_noise_scale) == (0.4, 0.0)


def test_queries_of_deformable_detr():
    source, noised = make("deformable_detr_dn_R50_50ep").query_source, noise()
    queries = source.embed(noised)
    expected = source.box_embed.weight @ noised.boxes[0, 1] + source.box_embed.bias
    torch.testing.assert_close(queries.position[0, 1], expected)
    assert torch.equal(queries.content[0, 1], source.label_encoder.embed.weight[noised.labels[0, 1]])
    assert torch.equal(queries.boxes[..., :2], noised.boxes[..., :2])
    assert queries.boxes[..., 2:].eq(0.5).all()


def test_queries_of_two_stages():
    """Position as of a matching query with that box, reference = noised box, content = label embedding."""
    source, noised = make("deformable_detr_two_stage_dn_R50_50ep").query_source, noise()
    queries = source.embed(noised)
    torch.testing.assert_close(
        queries.boxes[noised.valid], noised.boxes[noised.valid].clamp(1e-3, 1 - 1e-3), atol=2e-3, rtol=0
    )
    sine = sine_encoding(queries.boxes[0, 1] * 2 * torch.pi, 32).flatten()
    position = source.transform_norm(source.transform(sine))[:64]
    torch.testing.assert_close(queries.position[0, 1], position)
    assert torch.equal(queries.content[0, 1], source.label_encoder.embed.weight[noised.labels[0, 1]])
