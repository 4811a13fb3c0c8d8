"""Known objects and known labels: what the model is told, who sees it, what is trained, and what is refused."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SYSTEMS, TOY, make_batch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from naming import naming
from ranks import on_ranks

from dn_detr_d2 import ConfigError, DenoisingGenerator, LeakError, UserError, setup_cfg
from dn_detr_d2.denoising import QueryGroups, embed_boxes
from dn_detr_d2.diagnostics import check_denoising, judge_labels
from dn_detr_d2.diagnostics.validation_loss import validation_losses
from dn_detr_d2.modeling.batch import make_targets
from dn_detr_d2.modeling.postprocess import class_probability, select_labelled
from dn_detr_d2.structures import Targets

DENOISING = "MODEL.DN_DETR.DENOISING."
ONE = [f"{DENOISING}NUM_GROUPS", 1]
QUIET = [
    x for key in ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE") for x in (f"{DENOISING}{key}", 0.0)
]
DROPOUT = [x for role in ("ENCODER", "DECODER") for x in (f"MODEL.DN_DETR.{role}.DROPOUT", 0.0)]
HOSTS = {
    "DN-DETR": "dn_detr_R50_50ep",
    "DN-Deformable-DETR": "dn_dab_deformable",
    "deformable encoder only, 3 patterns": "dn_deformable_detr_encoder_only_R50_12ep",
    "DETR": "detr_dn_R50_300ep",
    "Anchor DETR": "anchor_detr_dn_DC5-R50_12ep",
    "Deformable DETR": "deformable_detr_dn_R50_50ep",
    "Deformable DETR with box refinement": "deformable_detr_refine_dn_R50_50ep",
}
LABEL_HOSTS = [host for host in HOSTS if host != "DN-Deformable-DETR"]  # its contents are learned
SAME_SIZE = ((64, 96),)


def make(config, *overrides):
    """A small model with weights off their symmetric start."""
    torch.manual_seed(0)
    path = ROOT / "configs" / f"{SYSTEMS.get(config, HOSTS.get(config, config))}.yaml"
    model = build_model(setup_cfg(str(path), [*TOY, *DROPOUT, *overrides]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def told(batch, **prompts):
    """The records without ground truth, each with its prompts: ``known=[Instances or None, ...]``, ``labels=[...]``."""
    records = [{key: value for key, value in record.items() if key != "instances"} for record in batch]
    for key, values in prompts.items():
        for record, value in zip(records, values, strict=True):
            if value is not None:
                record[key] = value
    return records


def known_of(*counts, seed=5, sizes=((64, 96), (96, 64), (80, 80))):
    """Known objects of images of :func:`~conftest.make_batch`."""
    return [record["instances"] for record in make_batch(*counts, seed=seed, sizes=sizes)]


def detect(model, records):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(records)]


def same(a, b):
    return torch.equal(a.scores, b.scores) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.scores, b.scores, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=100 * tolerance, rtol=tolerance)


# Known objects: who sees whom.


def test_the_table_of_known_objects():
    """Two groups of two slots and one matching query, written out: 1 = blocked."""
    groups = QueryGroups.isolated(2, 1, 2)
    shown = groups.shown_to_matching()
    expected = [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert shown.attention_mask(1).int().tolist() == expected
    assert groups.attention_mask(1).int().tolist()[-1] == [1, 1, 1, 1, 0]  # the table of training stays


def test_padding_of_known_objects_is_seen_by_nobody():
    labels, boxes = [torch.tensor([1, 0]), torch.tensor([2])], [torch.full((2, 4), 0.4), torch.full((1, 4), 0.3)]
    noised = DenoisingGenerator(num_classes=3).clean()(Targets.pad(labels, boxes)).as_known()
    assert noised.labels.tolist() == [[1, 0], [2, 3]]
    assert torch.equal(noised.boxes[0], boxes[0])
    assert noised.attention_mask(1).int().tolist() == [[[0, 0, 0]] * 3, [[0, 1, 0]] * 3]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_without_known_objects_detections_are_the_ordinary_ones_to_the_bit(host, padded):
    """Alone, with no objects in ``known``, and beside images of the same size that have some."""
    model = make(host, "TEST.PAD_TO_LARGEST", padded)
    batch = make_batch(0, 0, 0, 0, sizes=((64, 96), (64, 96), (96, 64), (64, 96)))
    ordinary = detect(model, told(batch))
    nothing = known_of(0, 0, 0, 0, sizes=((64, 96), (64, 96), (96, 64), (64, 96)))
    some = known_of(2, 0, 3, 0, sizes=((64, 96), (64, 96), (96, 64), (64, 96)))
    assert all(map(same, detect(model, told(batch, known=nothing)), ordinary))
    mixed = detect(model, told(batch, known=[some[0], None, some[2], nothing[3]]))
    assert [same(a, b) for a, b in zip(mixed, ordinary, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("host", ["DN-DETR", "DN-Deformable-DETR"])
def test_detections_are_those_of_the_matching_part_with_nothing_hidden(host):
    """One image, by hand: clean objects in front of the matching queries, no mask."""
    model, (record,), (known,) = make(host).eval(), told(make_batch(0)), known_of(2)
    with torch.no_grad():
        seen = model.forward_outputs([record], annotated=False)
        source = model.query_source
        content = torch.nn.functional.pad(source.label_encoder.embed.weight[known.gt_classes], (0, 1), value=1.0)
        x0, y0, x1, y1 = (known.gt_boxes.tensor / torch.tensor([96.0, 64, 96, 64])).unbind(1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1)
        queries = replace(
            seen.queries,
            content=torch.cat([content[None], seen.queries.content], 1),
            boxes=torch.cat([boxes[None], seen.queries.boxes], 1),
        )
        predictions = model.decoder(queries, seen.memory)
        probability = predictions.logits[-1, 0, 2:].sigmoid().flatten()
    found = detect(model, [record | {"known": known}])[0]
    torch.testing.assert_close(found.scores, probability.sort(descending=True).values[: len(found)])


@pytest.mark.parametrize("host", HOSTS)
def test_matching_queries_see_the_known_objects_of_their_image_and_of_no_other(host):
    """Of the same size, so that they pass together; the other image's objects change in number too."""
    model, batch = make(host), make_batch(0, 0, sizes=SAME_SIZE)
    first, second = known_of(1, 2, sizes=SAME_SIZE)
    others = known_of(4, seed=9, sizes=SAME_SIZE)[0]
    before = detect(model, told(batch, known=[first, second]))
    after = detect(model, told(batch, known=[others, second]))
    alone = detect(model, told(batch[1:], known=[second]))[0]
    assert not same(before[0], after[0])
    assert_close(before[1], after[1])
    assert_close(before[1], alone)


@pytest.mark.parametrize("host", HOSTS)
def test_the_matching_part_has_a_gradient_towards_known_objects(host):
    model = make(host, *ONE, *QUIET).train()
    records = told(make_batch(2, 1), known=known_of(2, 1))
    for record, objects in zip(records, make_batch(2, 1), strict=True):
        record["instances"] = objects["instances"]
    outputs = model.forward_outputs(records, model.denoising)
    table = model.query_source.label_encoder.embed.weight
    known = torch.cat([record["known"].gt_classes for record in records]).unique()
    reached = torch.autograd.grad(outputs.matching.logits[-1].square().sum(), table)[0]
    assert (reached[known].abs().amax(1) > 0).all()
    for record in records:  # and none without
        del record["known"]
    outputs = model.forward_outputs(records, model.denoising)
    hidden = torch.autograd.grad(outputs.matching.logits[-1].square().sum(), table, allow_unused=True)[0]
    assert hidden is None or hidden[:-1].abs().max() == 0  # the last row is "unknown"


def test_the_check_before_a_training_lets_known_objects_be_seen():
    """And finds that of several groups one would tell the other, through the matching queries."""
    records = [x | {"known": y} for x, y in zip(make_batch(1, 1), known_of(2, 1), strict=True)]
    check_denoising(make("DN-DETR", *ONE).train(), records)
    with pytest.raises(LeakError, match=naming("other groups")):
        check_denoising(make("DN-DETR", f"{DENOISING}NUM_GROUPS", 2).train(), records)


# Known objects: training.


def conditioned(host="DN-DETR", *overrides):
    return make(host, *ONE, f"{DENOISING}KNOWN_FRACTION", 0.5, *overrides).train()


def training_batch(unknown, known, sizes=((64, 96), (96, 64), (80, 80))):
    batch = make_batch(*unknown, sizes=sizes)
    return [x | {"known": y} for x, y in zip(batch, known_of(*known, sizes=sizes), strict=True)]


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("host", HOSTS)
def test_every_parameter_has_a_gradient_with_known_objects(host, counts):
    for unknown, known in ((counts, counts[::-1]), (counts, (0, 0)), ((0, 0), counts)):
        model = conditioned(host)
        losses = model(training_batch(unknown, known))
        sum(losses.values()).backward()
        assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []
        assert all(value.isfinite() for value in losses.values())
        assert (losses["dn/l1"] > 0) == any(known)
        assert (losses["main/l1"] > 0) == any(unknown)


def test_each_part_has_its_own_objects_and_is_divided_by_their_number():
    """Losses of the real model against the criterion on each part by itself."""
    model, batch = conditioned("DN-DETR", *QUIET), training_batch((3, 1), (1, 4))
    losses = model(batch)
    outputs = model.forward_outputs(batch, model.denoising)
    assert (outputs.targets.counts, outputs.denoised.counts) == ([3, 1], [1, 4])
    for name, key, part, pairs in (
        ("main", "instances", outputs.matching, 4.0),
        ("dn", "known", outputs.denoising, 5.0),
    ):
        targets = make_targets([x[key] for x in batch], model.device)
        matched = model.matcher(part, targets) if name == "main" else outputs.noised.assignment
        for term, values in model.criterion(part, targets, matched, pairs).items():
            torch.testing.assert_close(losses[f"{name}/{term}"], values[-1])


@pytest.mark.parametrize("counts", [((3, 1, 0, 2), (1, 0, 2, 4)), ((0, 0, 1, 4), (0, 2, 0, 0))])
@pytest.mark.parametrize("host", ["DN-DETR", "DN-Deformable-DETR", "Anchor DETR"])
def test_accumulated_parts_give_the_gradient_of_the_batch(host, counts):
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = conditioned(host, *QUIET), training_batch(*counts, sizes=((64, 64),))
        whole = gradient(model, [batch])
        for size in (1, 2):
            parts = gradient(model, [batch[i : i + size] for i in range(0, 4, size)])
            assert (parts - whole).norm() < 1e-9 * whole.norm()
    finally:
        torch.set_default_dtype(torch.float32)


def gradient(model, parts):
    """Flat gradient of a step whose images pass in parts."""
    model.zero_grad()
    normalizers = model.step_normalizers([x for part in parts for x in part])
    for part in parts:
        sum(model(part, normalizers).values()).backward()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.requires_grad])


@pytest.mark.parametrize("key", ["known", "labels"])
def test_activation_checkpointing_gives_the_same_gradients(key):
    on = [x for role in ("ENCODER", "DECODER") for x in (f"MODEL.DN_DETR.{role}.ACTIVATION_CHECKPOINTING", True)]
    found = []
    for overrides in ([], on):
        model = make("DN-DETR", *ONE, *overrides).train()
        batch = training_batch((2, 0), (1, 3))
        if key == "labels":
            batch = [x | {"labels": [i]} for i, x in enumerate(make_batch(2, 0))]
        torch.manual_seed(3)
        found.append(gradient(model, [batch]))
    assert torch.equal(*found)


UNKNOWN, KNOWN = (3, 1, 0, 2), (1, 0, 2, 4)


def two_ranks(key, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # or a ReLU at its kink would be a difference
    model = create_ddp_model(make("DN-DETR", *ONE, *QUIET), device_ids=None, broadcast_buffers=False).train()
    share = 4 // comm.get_world_size()
    batch = training_batch(UNKNOWN, KNOWN, sizes=((64, 64),))
    if key == "labels":  # padding of the ordinary denoising part is visible, so every rank has an image of 3 objects
        batch = make_batch(3, 1, 0, 3, sizes=((64, 64),))
        batch = [x | {"labels": x["instances"].gt_classes[:1].tolist() or [2]} for x in batch]
    sum(model(batch[comm.get_rank() * share :][:share]).values()).backward()
    if comm.is_main_process():
        grads = [x.grad.flatten() for x in model.parameters() if x.requires_grad]
        torch.save(torch.cat(grads), f"{folder}/{comm.get_world_size()}.pth")
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("key", ["known", "labels"])
def test_two_processes_give_the_gradient_of_one(key, tmp_path):
    two_ranks(key, str(tmp_path))
    on_ranks(two_ranks, key, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in (1, 2))
    assert (one - two).norm() < 1e-9 * one.norm()


def test_diagnostics_look_at_what_each_part_has():
    model, batch = conditioned(), training_batch((2, 1), (3, 1))
    for i, record in enumerate(batch):
        record["image_id"] = i
        record["known"].gt_index = torch.arange(len(record["known"])) + 10
    judged = judge_labels(model, [batch], repeats=1)
    assert sorted((x.image_id, x.index) for x in judged) == [(0, 10), (0, 11), (0, 12), (1, 10)]
    quiet = conditioned("DN-DETR", *QUIET)
    found, expected = validation_losses(quiet, [batch]), quiet.eval().train()(batch)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


# Known labels.


@pytest.mark.parametrize("host", LABEL_HOSTS)
def test_every_matching_query_gets_the_label(host):
    """[embedding | 1] in DN-DETR's, the embedding in the others': as content, or where DETR has its labels, as position."""
    model = make(host).eval()
    with torch.no_grad():
        seen = model.forward_outputs(told(make_batch(0, 0, sizes=SAME_SIZE)), annotated=False)
        asked = model.query_source.prompt(seen.queries, torch.tensor([3, 1]))
    table = model.query_source.label_encoder.embed.weight
    for image, label in enumerate((3, 1)):
        for query in range(asked.content.shape[1]):
            expected = table[label]
            got = asked.content[image, query]
            if host == "DN-DETR":
                expected = torch.cat([expected, torch.ones(1)])
            elif host == "deformable encoder only, 3 patterns":
                pattern = model.query_source.patterns.weight[query // 9]
                expected = torch.cat([expected, torch.ones(1)]) + pattern
            elif host == "DETR":
                got, expected = asked.position[image, query], expected + model.query_source.queries.weight[query]
            torch.testing.assert_close(got, expected)
    assert torch.equal(asked.boxes, seen.queries.boxes[:, : asked.boxes.shape[1]])
    assert asked.content.shape[1] == (9 if host == "Anchor DETR" else seen.queries.content.shape[1])


@pytest.mark.parametrize("host", LABEL_HOSTS)
def test_passes_know_nothing_of_each_other(host):
    """Two labels in one call are the two calls with one, as are two images in one batch."""
    model, batch = make(host, "TEST.DETECTIONS_PER_IMAGE", 100), make_batch(0, 0, sizes=SAME_SIZE)
    both = detect(model, told(batch, labels=[[4, 0], [2]]))
    for image, labels in ((0, (4, 0)), (1, (2,))):
        for label in labels:
            alone = detect(model, told(batch[image : image + 1], labels=[[label]]))[0]
            assert_close(both[image][both[image].pred_classes == label], alone)
            assert set(alone.pred_classes.tolist()) == {label}
    assert len(both[0]) == 2 * len(both[1])


@pytest.mark.parametrize("host", ["DN-DETR", "DETR"])
def test_images_without_labels_are_as_ever_and_no_label_means_no_detection(host):
    model, batch = make(host), make_batch(0, 0, 0, sizes=SAME_SIZE)
    ordinary = detect(model, told(batch))
    found = detect(model, told(batch, labels=[None, [], [1]]))
    assert same(found[0], ordinary[0])
    assert len(found[1]) == 0
    assert found[1].pred_boxes.tensor.shape == (0, 4)
    assert len(detect(model, told(batch[:1], labels=[[]]))[0]) == 0


@pytest.mark.parametrize("softmax", [False, True])
def test_only_the_class_of_its_pass_counts(softmax):
    """Two passes of two queries and three classes; the best three by hand."""
    logits, boxes = torch.randn(2, 2, 3 + softmax), torch.rand(2, 2, 4)
    labels = torch.tensor([2, 0])
    probability = class_probability(logits, 3)
    expected = sorted(
        ((probability[i, q, label].item(), label) for i, label in enumerate((2, 0)) for q in range(2)), reverse=True
    )
    found = select_labelled(logits, boxes, labels, (10, 20), 3, softmax)
    assert found.scores.tolist() == pytest.approx([score for score, _ in expected[:3]])
    assert found.pred_classes.tolist() == [label for _, label in expected[:3]]


def test_a_training_step_looks_for_one_label():
    """Matching targets are the objects of the label; the denoising part has all."""
    model, batch = make("DN-DETR", *QUIET).train(), make_batch(4, 3)
    labels = [batch[0]["instances"].gt_classes[0].item(), 4]
    batch = [x | {"labels": [label]} for x, label in zip(batch, labels, strict=True)]
    outputs = model.forward_outputs(batch, model.denoising)
    counts = [(x["instances"].gt_classes == label).sum().item() for x, label in zip(batch, labels, strict=True)]
    assert (outputs.targets.counts, outputs.denoised.counts) == (counts, [4, 3])
    assert all(outputs.targets.labels[i, :n].eq(labels[i]).all() for i, n in enumerate(counts))
    table = model.query_source.label_encoder.embed.weight
    content = outputs.queries.content[:, outputs.dn.num_queries :]
    assert all(torch.equal(content[i, 0, :-1], table[label]) for i, label in enumerate(labels))
    assert outputs.noised.groups.num_groups == 5
    assert not outputs.noised.groups.visible[-1, :-1].any()  # the ordinary denoising part


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("host", LABEL_HOSTS)
def test_every_parameter_that_is_used_has_a_gradient_with_labels(host, counts):
    model = make(host).train()
    losses = model([x | {"labels": [2]} for x in make_batch(*counts)])
    sum(losses.values()).backward()
    without = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
    assert without == []  # distributed training stops at a parameter without gradient


# What is refused.


def objects(boxes=((10, 10, 50, 40),), classes=(1,), size=(64, 96), **fields):
    fields = {"gt_boxes": Boxes(torch.tensor(boxes, dtype=torch.float32)), "gt_classes": torch.tensor(classes)} | fields
    return Instances(size, **fields)


@pytest.mark.parametrize(
    ("known", "named"),
    [
        (objects(classes=(5,)), (5, "0 to 4")),
        (objects(classes=(-1,)), (-1, "0 to 4")),
        (objects(boxes=((10, 10, 97, 40),)), (97.0, "(64, 96)")),
        (objects(boxes=((-3, 10, 50, 40),)), (-3.0, "(64, 96)")),
        (objects(boxes=((50, 10, 10, 40),)), (50.0, "(64, 96)")),
        (objects(boxes=((10, 10, float("nan"), 40),)), ("nan",)),
        (objects(size=(96, 64)), ("(96, 64)", "(64, 96)")),
        (objects(classes=((1, 2),)), ("gt_classes", "(1, 2)")),
        (objects(classes=(1.0,)), ("gt_classes", "float32")),
        (objects(gt_boxes=torch.zeros(1, 4)), ("gt_boxes", "Tensor")),
        (Instances((64, 96), gt_classes=torch.tensor([1])), ("gt_boxes", "gt_classes")),
        ([[1, 2, 3, 4]], ("list",)),
    ],
)
def test_known_objects_that_are_none_of_this_image_or_model_are_refused(known, named):
    with pytest.raises(UserError, match=naming(*named)) as caught:
        detect(make("DN-DETR"), told(make_batch(0), known=[known]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "named"), [([5], (5, "0 to 4")), ([-1], (-1,)), ([1, 1], ("[1, 1]",)), (["a"], ("['a']",)), (3, (3,))]
)
def test_labels_that_the_model_does_not_have_are_refused(labels, named):
    with pytest.raises(UserError, match=naming(*named)):
        detect(make("DN-DETR"), told(make_batch(0), labels=[labels]))


@pytest.mark.parametrize("key", ["known", "labels"])
@pytest.mark.parametrize(
    ("system", "overrides", "named"),
    [
        ("dab_detr", (), ("DENOISING.NAME",)),
        ("dino", (), ("ContrastiveDenoisingGenerator", "TopKAnchors")),
        ("dino_like", (), ("ObjectnessAnchors",)),
        ("deformable_detr_two_stage_dn_R50_50ep", (), ("TwoStageQueries",)),
        ("dn_detr", (f"{DENOISING}NAME", ""), ("DENOISING.NAME",)),
    ],
)
def test_hosts_that_cannot_be_told_anything_refuse(system, overrides, named, key):
    model = make(system, *overrides)
    with pytest.raises(ConfigError, match=naming(*named)):
        detect(model, told(make_batch(0), **{key: [objects() if key == "known" else [1]]}))


def test_learnt_contents_have_no_label_to_replace():
    with pytest.raises(ConfigError, match=naming("labels", "QUERY_SOURCE.CONTENT")):
        detect(make("DN-Deformable-DETR"), told(make_batch(0), labels=[[1]]))


def test_both_prompts_at_once_and_unequal_training_images_are_refused():
    model = make("DN-DETR", *ONE)
    with pytest.raises(UserError, match=naming("known", "labels")):
        detect(model, told(make_batch(0), known=[objects()], labels=[[1]]))
    model.train()
    with pytest.raises(UserError, match=naming("known")):
        model([x | ({"known": objects()} if i else {}) for i, x in enumerate(make_batch(1, 1, sizes=SAME_SIZE))])
    with pytest.raises(UserError, match=naming("labels", "[0, 1]")):
        model([x | {"labels": [0, 1]} for x in make_batch(1)])


@pytest.mark.parametrize(
    ("system", "overrides", "named"),
    [
        ("dn_detr", ("KNOWN_FRACTION", 0.5), ("NUM_GROUPS", 5)),
        (
            "dn_detr",
            ("KNOWN_FRACTION", 0.5, "NUM_GROUPS", 1, "LABEL_PROMPTS", True),
            ("KNOWN_FRACTION", "LABEL_PROMPTS"),
        ),
        ("dn_detr", ("KNOWN_FRACTION", 0.5, "NAME", ""), ("DENOISING.NAME",)),
        ("dn_detr", ("KNOWN_FRACTION", 1.0), ("KNOWN_FRACTION", 1.0)),
        ("dn_detr", ("KNOWN_FRACTION", -0.5), ("KNOWN_FRACTION", -0.5)),
        ("dn_detr", ("KNOWN_SEED", -1), ("KNOWN_SEED", -1)),
        ("dino", ("KNOWN_FRACTION", 0.5, "NUM_GROUPS", 1), ("ContrastiveDenoisingGenerator",)),
        (
            "dn_detr",
            ("KNOWN_FRACTION", 0.5, "NUM_GROUPS", 1, "NAME", "BudgetDenoisingGenerator"),
            ("KNOWN_FRACTION", "BudgetDenoisingGenerator", "DENOISING.NUM_QUERIES", 100),
        ),
        ("dn_deformable_detr", ("LABEL_PROMPTS", True), ("QUERY_SOURCE.CONTENT",)),
        ("dab_detr", ("LABEL_PROMPTS", True), ("DENOISING.NAME",)),
    ],
)
def test_configs_that_cannot_work_are_refused(system, overrides, named):
    keys = [f"{DENOISING}{x}" if isinstance(x, str) and x.isupper() else x for x in overrides]
    with pytest.raises(ConfigError, match=naming(*named)):
        make(system, *keys)


def test_clean_objects_are_as_embedded_by_training():
    """The queries of known objects without noise are those of denoising with noise 0."""
    source = make("DN-DETR").query_source
    targets = make_targets(known_of(2, 1), torch.device("cpu"))
    clean = DenoisingGenerator(num_classes=5).clean()(targets)
    quiet = DenoisingGenerator(
        num_classes=5, num_groups=1, label_noise_prob=0.0, center_noise_scale=0.0, size_noise_scale=0.0
    )(targets)
    a, b = embed_boxes(source.label_encoder, clean), embed_boxes(source.label_encoder, quiet)
    assert torch.equal(a.content, b.content)
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(clean.boxes[clean.valid], targets.boxes[targets.valid])
