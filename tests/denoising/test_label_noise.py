"""Every kind of label noise against its statement in docs/noise.md, and what it is drawn by."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming

from dn_detr_d2 import ConfigError, ContrastiveDenoisingGenerator, DenoisingGenerator, setup_cfg
from dn_detr_d2.denoising import LABEL_NOISES, ClassFrequency, Confusion, noise
from dn_detr_d2.structures import Targets

DRAWS = 60_000
COUNTS = [30, 0, 60, 10]
MATRIX = [[8, 1, 3, 0], [0, 5, 0, 0], [2, 2, 9, 4], [0, 0, 1, 0]]
NODE = "MODEL.DN_DETR.DENOISING.LABEL_NOISE."


def shares(kind, label, prob, classes=4):
    """How often a label becomes each class."""
    drawn = kind(torch.full((DRAWS,), label), prob, classes)
    return np.bincount(drawn, minlength=classes) / DRAWS


def kinds(classes):
    counts = list(range(1, classes + 1))
    matrix = [[i + j for j in range(classes)] for i in range(classes)]
    return [LABEL_NOISES.resolve("uniform"), ClassFrequency(counts), Confusion(matrix)]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 2**31))
def test_labels_stay_in_range_and_a_seed_repeats_them(classes, prob, seed):
    torch.manual_seed(seed)
    labels = torch.randint(classes, (2, 3, 1, 7))
    before = labels.clone()
    for kind in kinds(classes):
        torch.manual_seed(seed)
        drawn = kind(labels, prob, classes)
        assert drawn.shape == labels.shape
        assert drawn.dtype == torch.int64
        assert ((drawn >= 0) & (drawn < classes)).all()
        torch.manual_seed(seed)
        assert torch.equal(kind(labels, prob, classes), drawn)
        assert torch.equal(kind(labels, 0.0, classes), labels)
        assert kind(labels[:0], prob, classes).shape == (0, 3, 1, 7)
        assert torch.equal(labels, before)


def test_uniform_is_the_function_of_the_paper():
    assert LABEL_NOISES.resolve("uniform") is noise.flip_labels


@pytest.mark.parametrize("prob", [0.2, 1.0])
@pytest.mark.parametrize("label", range(4))
def test_by_class_frequency_the_new_label_has_the_share_of_its_class(label, prob):
    share = np.array(COUNTS) / 100
    expected = prob * share + (1 - prob) * (np.arange(4) == label)
    found = shares(ClassFrequency(COUNTS), label, prob)
    assert np.abs(found - expected).max() < 0.01
    assert 1 - found[label] == pytest.approx(prob * (1 - share[label]), abs=0.01)


def always(u):
    """torch.rand that gives one number."""
    return lambda *shape, dtype=None, device=None: torch.zeros(*shape, dtype=dtype) + u


def test_a_class_without_objects_is_never_drawn_whatever_the_draw(monkeypatch):
    """The ends of the unit interval, and the borders between the classes."""
    drawn = []
    for u in (0.0, 0.3 - 1e-12, 0.3 + 1e-12, 0.9 - 1e-12, 0.9 + 1e-12, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", always(u))
        drawn += ClassFrequency(COUNTS)(torch.tensor([1]), 1.1, 4).tolist()
    assert drawn == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("prob", [0.3, 1.0])
@pytest.mark.parametrize(("label", "row"), [
    (0, [0, 1 / 4, 3 / 4, 0]),
    (1, [1 / 3, 0, 1 / 3, 1 / 3]),  # never taken for another: each equally often
    (2, [1 / 4, 1 / 4, 0, 1 / 2]),
    (3, [0, 0, 1, 0]),
])  # fmt: skip
def test_by_confusion_a_label_becomes_what_it_is_taken_for(label, row, prob):
    expected = prob * np.array(row) + (1 - prob) * (np.arange(4) == label)
    found = shares(Confusion(MATRIX), label, prob)
    assert np.abs(found - expected).max() < 0.01
    assert 1 - found[label] == pytest.approx(prob, abs=0.01)


def test_labels_of_several_classes_are_each_drawn_from_their_own_row():
    drawn = Confusion([[0, 1, 0], [0, 0, 1], [1, 0, 0]])(torch.tensor([[0, 1], [2, 0]]), 1.0, 3)
    assert drawn.tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("wrong", [[], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")], ["3"], 4, [True, 2]])
def test_counts_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=naming("number of objects")):
        ClassFrequency(wrong)


@pytest.mark.parametrize("wrong", [
    [], [[1]], [[1, 2]], [[1, 2], [3]], [[1, 2], [3, -4]], [[1, 2], [3, float("nan")]], [[1, 2], [3, None]], [1, 2], "ab",
])  # fmt: skip
def test_a_matrix_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=naming("square matrix")):
        Confusion(wrong)


@pytest.mark.parametrize("kind", [ClassFrequency([1, 2]), Confusion([[1, 2], [3, 4]])])
def test_noise_of_another_number_of_classes_is_refused(kind):
    with pytest.raises(ValueError, match=naming(2, 5)):
        kind(torch.tensor([1]), 0.5, 5)


@pytest.mark.parametrize("name", ["class_frequency", "confusion"])
def test_a_name_alone_does_not_say_what_to_draw_by(name):
    with pytest.raises(ValueError, match="label noise"):
        DenoisingGenerator(num_classes=3, label_noise=name)


@pytest.mark.parametrize("system", [DenoisingGenerator, ContrastiveDenoisingGenerator])
def test_generators_redraw_labels_by_it_and_padding_stays_unknown(system):
    confused = Confusion([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    generator = system(num_classes=3, num_groups=4, label_noise_prob=1.0, label_noise=confused)
    targets = Targets.pad([torch.tensor([0, 1]), torch.tensor([2])], [torch.rand(2, 4), torch.rand(1, 4)])
    noised = generator(targets)
    pairs = noised.assignment
    restored = noised.labels[pairs.image, pairs.query[0]]
    assert torch.equal(restored, (targets.labels[pairs.image, pairs.target[0]] + 1) % 3)
    assert (noised.labels[~noised.valid] == 3).all()
    assert (noised.labels[noised.valid] < 3).all()


def test_an_unknown_noise_is_refused_with_those_that_there_are(toy_model):
    with pytest.raises(ValueError, match=naming("label_noise", "'frequency'", "class_frequency", "confusion")):
        DenoisingGenerator(num_classes=3, label_noise="frequency")
    with pytest.raises(ConfigError, match=naming("LABEL_NOISE.NAME", "'frequency'", "class_frequency")):
        toy_model("dn_detr", NODE + "NAME", "frequency")


def write(tmp_path, content):
    path = tmp_path / "confusion_matrix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def draws_by(kind, weights):
    """Whether a kind of noise draws in proportion to the weights."""
    shares = kind._below.diff(dim=-1, prepend=torch.zeros_like(kind._below[..., :1]))
    weights = torch.tensor(weights, dtype=torch.float64)
    return torch.allclose(shares, weights / weights.sum(-1, keepdim=True))


def test_a_file_is_read_in_the_order_of_the_model(tmp_path):
    path = write(tmp_path, {"classes": ["b", "a"], "matrix": [[0, 5], [7, 0]]})
    assert draws_by(Confusion.from_file(path, ["a", "b"], 2), [[0, 7], [5, 0]])
    assert draws_by(Confusion.from_file(path, [], 2), [[0, 5], [7, 0]])
    more = Confusion.from_file(path, ["b", "c", "a"], 3)  # c is never confused
    assert draws_by(more, [[0, 0, 5], [1, 0, 1], [7, 0, 0]])


@pytest.mark.parametrize("content", [
    "", "[", "[]", "7", "{}", '{"matrix": 3}', '{"matrix": [[1, 2]]}', '{"matrix": [[1, NaN], [1, 1]]}', "[" * 100_000,
    {"matrix": [[1, 2, 3], [1, 2, 3], [1, 2, 3]]},
    {"matrix": [[1, 2], [3, 4]], "classes": ["a", "z"]},
    {"matrix": [[1, 2], [3, 4]], "classes": ["a", "a"]},
    {"matrix": [[1, 2], [3, 4]], "classes": ["a"]},
])  # fmt: skip
def test_a_file_that_is_no_matrix_of_the_classes_is_refused_in_one_sentence(tmp_path, content):
    with pytest.raises(ConfigError, match=naming("confusion_matrix.json")) as caught:
        Confusion.from_file(write(tmp_path, content), ["a", "b"], 2)
    assert "\n" not in str(caught.value)


TRAINED = ["MODEL.DN_DETR.NUM_CLASSES", "auto", "DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", "()"]


def test_a_training_counts_the_classes_of_its_data_and_keeps_them(toy_cfg, toy_model):
    from dn_detr_d2.data import records_of

    labels = [x["category_id"] for record in records_of("shapes_train") for x in record["annotations"]]
    cfg = toy_cfg("dn_detr", *TRAINED, NODE + "NAME", "class_frequency")
    node = cfg.MODEL.DN_DETR.DENOISING.LABEL_NOISE
    assert np.bincount(labels).tolist() == node.CLASS_COUNTS
    model = toy_model("dn_detr", *TRAINED, NODE + "NAME", "class_frequency")
    assert draws_by(model.denoising.generator.label_noise, node.CLASS_COUNTS)
    given = toy_cfg("dn_detr", *TRAINED, NODE + "NAME", "class_frequency", NODE + "CLASS_COUNTS", [3, 2, 1])
    assert given.MODEL.DN_DETR.DENOISING.LABEL_NOISE.CLASS_COUNTS == [3, 2, 1]
    assert toy_cfg("dn_detr", *TRAINED).MODEL.DN_DETR.DENOISING.LABEL_NOISE.CLASS_COUNTS == []


def test_counts_are_in_the_order_of_the_model_and_leave_out_crowds(monkeypatch):
    from detectron2.data import MetadataCatalog

    from dn_detr_d2.coco import coco_names, raw_names
    from dn_detr_d2.data import count_classes, loader

    records = [{"annotations": [{"category_id": i, "iscrowd": crowd} for i, crowd in ((0, 0), (1, 0), (1, 0), (0, 1))]}]
    monkeypatch.setattr(loader, "records_of", lambda name: records)
    monkeypatch.setattr(MetadataCatalog.get("test_counts"), "thing_classes", ["cat", "dog"], raising=False)
    assert count_classes(["test_counts"], ["dog", "bird", "cat"], 3) == [2, 0, 1]
    assert count_classes(["test_counts", "test_counts"], ["cat", "dog"], 2) == [2, 4]
    coco = MetadataCatalog.get("test_coco")
    monkeypatch.setattr(coco, "thing_classes", list(coco_names()), raising=False)
    counts = count_classes(["test_coco"], list(raw_names()), 91)
    assert [(i, count) for i, count in enumerate(counts) if count] == [(1, 1), (2, 2)]  # COCO's ids of the first two


@pytest.mark.parametrize(("options", "named"), [
    (["NAME", "confusion"], ["LABEL_NOISE.CONFUSION_MATRIX", "''"]),
    (["NAME", "confusion", "CONFUSION_MATRIX", "gone.json"], ["LABEL_NOISE.CONFUSION_MATRIX", "'gone.json'"]),
])  # fmt: skip
def test_a_training_without_its_matrix_is_refused_at_once(toy_cfg, options, named):
    keys = [NODE + x if i % 2 == 0 else x for i, x in enumerate(options)]
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_cfg("dn_detr", *TRAINED, *keys)


def test_counts_of_other_classes_are_refused_when_the_model_is_built(toy_model):
    with pytest.raises(ConfigError, match=naming("LABEL_NOISE.CLASS_COUNTS", 3, 5)):
        toy_model("dn_detr", NODE + "NAME", "class_frequency", NODE + "CLASS_COUNTS", [3, 2, 1])


@pytest.mark.parametrize("name", ["class_frequency", "confusion"])
def test_a_model_that_is_not_trained_needs_neither(name):
    """The matrix of a finished training need not be at hand; only noise asks for it."""
    from conftest import ROOT, SYSTEMS, TOY
    from detectron2.modeling import build_model

    cfg = setup_cfg(str(ROOT / "configs" / f"{SYSTEMS['dn_detr']}.yaml"), [*TOY, NODE + "NAME", name], splits=())
    generator = build_model(cfg).denoising.generator
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.DENOISING.LABEL_NOISE")):
        generator.noise_labels(torch.tensor([1]))


def test_a_matrix_of_an_evaluation_reaches_the_model(toy_model, tmp_path):
    path = write(
        tmp_path, {"classes": ["triangle", "circle", "rectangle"], "matrix": [[0, 1, 0], [0, 0, 2], [3, 0, 0]]}
    )
    model = toy_model("dn_detr", *TRAINED, NODE + "NAME", "confusion", NODE + "CONFUSION_MATRIX", path)
    # circle, rectangle, triangle: the order of the shapes
    assert draws_by(model.denoising.generator.label_noise, [[0, 2, 0], [0, 0, 3], [1, 0, 0]])
