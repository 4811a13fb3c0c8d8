"""QueryDenoising: shapes, the indicator, forms of outputs, losses by hand, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from dn_detr_d2 import ContrastiveDenoisingGenerator, DenoisingGenerator, QueryDenoising, SetCriterion, SoftmaxCriterion
from dn_detr_d2.losses import BoxL1
from dn_detr_d2.structures import ObjectQueries, Predictions, Targets

QUIET = {"label_noise_prob": 0.0, "center_noise_scale": 0.0, "size_noise_scale": 0.0}


def targets(*counts, classes=3):
    return [{"labels": torch.randint(classes, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in counts]


def make(groups=2, **options):
    return QueryDenoising(DenoisingGenerator(num_classes=3, num_groups=groups), **{"dim": 8} | options)


def matching(n=2, q=5, width=7):
    return torch.randn(n, q, width), torch.full((n, q, 4), 0.5)


def outputs_for(queries, layers=3, classes=3, n=2):
    return torch.randn(layers, n, queries, classes), torch.rand(layers, n, queries, 4) * 0.5 + 0.2


def test_the_defaults_are_those_of_the_paper():
    generator = DenoisingGenerator(num_classes=80)
    found = [
        getattr(generator, name)
        for name in ("num_groups", "label_noise_prob", "center_noise_scale", "size_noise_scale")
    ]
    assert found == [5, 0.2, 0.4, 0.4]
    contrastive = ContrastiveDenoisingGenerator(num_classes=80)
    assert (contrastive.num_queries, contrastive.corner_noise_scale) == (100, 1.0)


def test_denoising_queries_come_first_with_the_indicator():
    denoising = make()
    dn = denoising(targets(3, 1))
    content, boxes = matching()
    joined, all_boxes, mask = dn.prepend(content, boxes)
    assert (dn.num_queries, joined.shape, all_boxes.shape, mask.shape) == (6, (2, 11, 8), (2, 11, 4), (11, 11))
    assert torch.equal(joined[:, 6:, :7], content)
    assert joined[:, 6:, 7].eq(0).all()
    assert torch.equal(joined[:, :6, 7], dn.noised.valid.float())
    expected = denoising.label_encoder.embed(dn.noised.labels) * dn.noised.valid[..., None]
    assert torch.equal(joined[:, :6, :7], expected)
    assert torch.equal(mask, dn.mask)
    assert torch.equal(mask, dn.noised.attention_mask(5))


@pytest.mark.parametrize(("indicator", "width"), [(True, 8), (False, 8)])
def test_contents_of_full_width_are_taken_as_they_are(indicator, width):
    content, boxes = matching(width=width)
    joined, *_ = make(indicator=indicator)(targets(3, 1)).prepend(content, boxes)
    assert torch.equal(joined[:, 6:], content)


def test_evaluation_passes_everything_through():
    denoising = make().eval()
    content, boxes = matching(width=8)
    dn = denoising(targets(3, 1))
    joined, all_boxes, mask = dn.prepend(content, boxes)
    assert joined is content
    assert all_boxes is boxes
    assert mask is None
    outputs = outputs_for(5)
    assert dn.split(outputs) == (outputs, None)
    assert (dn.losses(None), dn.num_queries, dn.noised, dn.assignment, dn.mask) == ({}, 0, None, None, None)
    padded, *_ = dn.prepend(*matching(width=7))
    assert padded.shape == (2, 5, 8)


def test_training_without_targets_does_nothing_either():
    dn = make()(None)
    assert dn.prepend(*matching())[2] is None
    assert dn.losses(dn.split(outputs_for(5))[1]) == {}


def test_all_forms_of_outputs_give_the_same_losses():
    dn = make()(targets(3, 1))
    dn.prepend(*matching())
    logits, boxes = outputs_for(11)
    layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
    forms = [
        (logits, boxes),
        [logits, boxes],
        Predictions(logits, boxes),
        layers[-1] | {"aux_outputs": layers[:-1], "extra": 3},
    ]
    losses = []
    for form in forms:
        rest, mine = dn.split(form)
        losses.append(dn.losses(mine))
        if isinstance(form, dict):
            assert rest["pred_logits"].shape == (2, 5, 3)
            assert rest["aux_outputs"][0]["pred_boxes"].shape == (2, 5, 4)
            assert rest["extra"] == 3
        else:
            first = rest.logits if isinstance(form, Predictions) else rest[0]
            assert torch.equal(first, logits[:, :, 6:])
    assert all(x == losses[0] for x in losses)
    assert set(losses[0]) == {f"dn/{name}{layer}" for name in ("class", "l1", "giou") for layer in ("", "_0", "_1")}


def test_a_single_layer_needs_no_axis():
    dn = make()(targets(3, 1))
    logits, boxes = outputs_for(11, layers=1)
    one, three = (dn.losses(dn.split(x)[1]) for x in ((logits, boxes), (logits[0], boxes[0])))
    assert one == three


def test_l1_by_hand():
    """Without noise all copies must restore their object: the mean over 2 x 4 copies of |predicted - clean|, times 5."""
    generator = DenoisingGenerator(num_classes=3, num_groups=2, **QUIET)
    denoising, clean = QueryDenoising(generator, dim=8, loss_weight=0.5), targets(3, 1)
    dn = denoising(clean)
    logits, boxes = outputs_for(6, layers=1)
    total = 0.0
    for i, image in enumerate(clean):
        for group in range(2):
            for j, box in enumerate(image["boxes"]):
                total += (boxes[0, i, 3 * group + j] - box).abs().sum()
    assert dn.losses((logits, boxes))["dn/l1"].item() == pytest.approx(0.5 * 5 * total.item() / 8, rel=1e-5)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("classes", [3, 4])
def test_losses_are_those_of_the_criterion_that_goes_with_the_logits(counts, classes):
    dn = make()(targets(*counts))
    outputs = outputs_for(dn.num_queries, classes=classes)
    criterion = SetCriterion() if classes == 3 else SoftmaxCriterion()
    pairs = float(max(2 * sum(counts), 1))
    expected = criterion(Predictions(*outputs), dn.targets, dn.assignment, pairs)
    for name, values in expected.items():
        assert dn.losses(outputs)[f"dn/{name}"].item() == pytest.approx(values[-1].item(), rel=1e-5)
        assert dn.losses(outputs)[f"dn/{name}_1"].item() == pytest.approx(values[1].item(), rel=1e-5)


def test_losses_of_ones_own_terms():
    dn = make(criterion=SetCriterion([BoxL1(2)]))(targets(2, 2))
    assert set(dn.losses(outputs_for(4, layers=1, classes=17))) == {"dn/l1"}


def test_gradients_reach_the_label_embedding_also_without_objects():
    for counts in ((3, 1), (0, 0)):
        denoising = make()
        dn = denoising(targets(*counts))
        content, boxes, _ = dn.prepend(*matching())
        outputs = (content[None, ..., :3] * 1.0, (boxes + content[..., 3:7]).sigmoid()[None])
        sum(dn.losses(dn.split(outputs)[1]).values()).backward()
        assert denoising.label_encoder.embed.weight.grad is not None


def test_autocast_leaves_losses_in_float32():
    dn = make()(targets(3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        logits, boxes = outputs_for(6)
        losses = dn.losses((logits.bfloat16(), boxes.bfloat16()))
    assert {x.dtype for x in losses.values()} == {torch.float32}


def test_a_compiled_decoder_gives_the_same(monkeypatch):
    decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0, batch_first=True)
    memory, counts = torch.randn(2, 6, 8), [(3, 1), (2, 2), (0, 0)]
    compiled = torch.compile(decoder, backend="eager", dynamic=True)
    denoising = make()
    for case in counts:
        content, _, mask = denoising(targets(*case)).prepend(*matching())
        torch.testing.assert_close(compiled(content, memory, tgt_mask=mask), decoder(content, memory, tgt_mask=mask))


def test_an_embedding_of_ones_own_is_used_and_not_registered_twice():
    table = nn.Embedding(4, 6)
    denoising = make(dim=None, embed=lambda noised: ObjectQueries(table(noised.labels), noised.boxes))
    assert list(denoising.state_dict()) == []
    dn = denoising(targets(3, 1))
    content, boxes, _ = dn.prepend(*matching(width=6))
    assert torch.equal(content[:, :6], table(dn.noised.labels))
    assert torch.equal(boxes[:, :6], dn.noised.boxes)


def test_a_copy_embeds_with_its_own_weights():
    """As the moving average of a model needs it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 6)
            self.denoising = make(dim=None, embed=self.embed)

        def embed(self, noised):
            return ObjectQueries(self.table(noised.labels), noised.boxes)

    model = Model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.table.weight.zero_()
    assert twin.denoising(targets(1)).queries.content.eq(0).all()
    assert model.denoising(targets(1)).queries.content.ne(0).any()


def test_padded_targets_are_taken_too():
    clean = targets(3, 1)
    dn = make()(Targets.pad([x["labels"] for x in clean], [x["boxes"] for x in clean]))
    assert dn.targets.counts == [3, 1]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ([{"labels": torch.tensor([3]), "boxes": torch.full((1, 4), 0.5)}], "3"),
        ([{"labels": torch.tensor([-1]), "boxes": torch.full((1, 4), 0.5)}], "-1"),
        ([{"labels": torch.tensor([1]), "boxes": torch.tensor([[10.0, 20, 30, 40]])}], "20.0"),
        ([{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), float("nan"))}], "nan"),
        ([{"labels": torch.tensor([1]), "boxes": torch.full((2, 4), 0.5)}], r"\(1,\) and \(2, 4\)"),
        ([{"labels": torch.tensor([[1]]), "boxes": torch.full((1, 4), 0.5)}], r"\(1, 1\)"),
        ([{"labels": torch.tensor([1])}], "boxes"),
        ([3], "labels"),
        ([{"labels": [1], "boxes": torch.full((1, 4), 0.5)}], "labels"),
        ({"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}, "labels"),
        ([], "no targets"),
    ],
)
def test_targets_that_cannot_be_used_are_named(bad, named):
    with pytest.raises(ValueError, match=named):
        make()(bad)


def test_an_empty_image_may_have_empty_boxes_of_any_shape():
    dn = make()([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0)}, *targets(2)])
    assert dn.targets.counts == [0, 2]


@pytest.mark.parametrize("width", [5, 9])
def test_contents_of_another_width_are_refused(width):
    for denoising in (make(), make().eval()):
        with pytest.raises(ValueError, match=rf"{width} channels.* 8 or 7"):
            denoising(targets(1, 1)).prepend(*matching(width=width))
    own = make(dim=None, embed=lambda noised: ObjectQueries(torch.zeros(*noised.labels.shape, 6), noised.boxes))
    with pytest.raises(ValueError, match=rf"{width} channels.* 6"):
        own(targets(1, 1)).prepend(*matching(width=width))


def test_other_noise_with_the_same_weights():
    denoising = make()
    twin = denoising.renoised(label_noise_prob=0.0, box_noise_scale=0.0)
    clean = targets(2, 1)
    dn = twin(clean)
    assert torch.equal(dn.noised.labels[0, :2], clean[0]["labels"])
    torch.testing.assert_close(dn.noised.boxes[0, :2], clean[0]["boxes"])
    assert twin.label_encoder is denoising.label_encoder
    assert dn.prepend(*matching())[0].shape == (2, 9, 8)
    assert denoising.generator.label_noise_prob == 0.2


def test_shapes_that_do_not_go_together_are_refused():
    dn = make()(targets(1, 1))
    for content, boxes in ((torch.zeros(5, 7), torch.zeros(5, 4)), (torch.zeros(2, 5, 7), torch.zeros(2, 4, 4))):
        with pytest.raises(ValueError, match=r"\(N, Q, C\)"):
            dn.prepend(content, boxes)
    with pytest.raises(ValueError, match="2 images, and queries of 3"):
        dn.prepend(*matching(n=3))
    dn.prepend(*matching())
    with pytest.raises(ValueError, match="2 denoising queries, and outputs of 7"):
        dn.losses(outputs_for(7))
    with pytest.raises(ValueError, match="got 9"):
        dn.losses(outputs_for(2, classes=9))
    with pytest.raises(ValueError, match="pred_boxes"):
        dn.losses({"pred_logits": torch.zeros(2, 2, 3)})
    with pytest.raises(TypeError, match="int"):
        dn.split(3)


@pytest.mark.parametrize("options", [{"dim": None}, {"dim": 8, "embed": print}, {"dim": 1}, {"loss_weight": -1}])
def test_useless_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"dim|-1"):
        make(**options)


def test_a_model_in_16_bits_gets_its_queries_in_16_bits():
    """Not under autocast: the model itself was cast, and its layers take nothing else."""
    denoising = make().to(torch.bfloat16)
    content, boxes = (x.bfloat16() for x in matching())
    joined = denoising(targets(2, 1)).prepend(content, boxes)
    assert [x.dtype for x in joined[:2]] == [torch.bfloat16] * 2
    assert torch.equal(joined[1][:, -5:], boxes)
    with torch.autocast("cpu", torch.bfloat16):  # boxes keep their bits there
        assert make()(targets(2, 1)).prepend(*matching())[1].dtype == torch.float32


def test_auxiliary_outputs_may_be_none():
    """As where a model leaves them out in evaluation."""
    queries = make()(targets(2, 1))
    total = queries.num_queries + 5
    given = {"pred_logits": torch.randn(2, total, 3), "pred_boxes": torch.rand(2, total, 4)}
    plain, none = (queries.split(x)[1] for x in (given, given | {"aux_outputs": None}))
    assert queries.losses(plain).keys() == queries.losses(none).keys()
