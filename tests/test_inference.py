"""Evaluation as TEST.* wants it; tests/test_predictor.py has the predictor."""

import copy
from functools import partial

import pytest
import torch
from conftest import MASK_SYSTEMS, SYSTEMS, make_batch
from naming import naming
from torch import nn
from torch._dynamo.utils import counters
from utils.test_cuda_graphs import Recording

from dn_detr_d2 import ConfigError
from dn_detr_d2.engine import Trainer
from dn_detr_d2.inference import accelerate, settle
from dn_detr_d2.utils.cuda_graphs import Replayed
from dn_detr_d2.utils.fold_norms import fold_norms


@pytest.mark.parametrize(("amp", "dtype"), [("", torch.float32), ("bf16", torch.bfloat16)])
def test_evaluation_is_in_the_wanted_precision_and_keeps_a_training_as_it_is(toy_model, monkeypatch, amp, dtype):
    """Nothing that is made in inference mode may stay in the model, where the next step of a training would find it."""
    monkeypatch.setattr("dn_detr_d2.config.validation.slow_bfloat16", lambda: "")
    model, seen = toy_model("dn_deformable_detr", "TEST.AMP", amp), set()
    model.backbone.register_forward_hook(
        lambda *given: seen.add((given[2]["res5"].dtype, torch.is_inference_mode_enabled()))
    )
    model.eval()
    with torch.no_grad():
        (found,) = model(make_batch(0))
    assert seen == {(dtype, True)}
    assert found["instances"].scores.dtype == torch.float32
    seen.clear()
    losses = model.train()(make_batch(2))
    sum(losses.values()).backward()
    assert seen == {(torch.float32, False)}


def test_gradients_through_a_detection_are_there_where_they_are_wanted(toy_model):
    (found,) = toy_model("dn_detr").eval()(make_batch(0))
    assert found["instances"].scores.requires_grad


def detections(model, batch):
    with torch.no_grad():
        return model(batch)


def assert_alike(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        if "instances" not in ours:
            torch.testing.assert_close(ours["sem_seg"], theirs["sem_seg"], atol=tolerance, rtol=tolerance)
            continue
        ours, theirs = ours["instances"], theirs["instances"]
        torch.testing.assert_close(ours.scores, theirs.scores, atol=tolerance, rtol=0)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=100 * tolerance, rtol=0)


@pytest.mark.parametrize("system", [*SYSTEMS, *MASK_SYSTEMS])
def test_passes_of_tensors_and_their_recordings_detect_the_same(toy_model, system):
    """Recordings of two shapes of which one is kept; with gradients there is none."""
    model = toy_model(system).eval()
    batch = make_batch(0, 0, 0, 0, sizes=((64, 96), (70, 90), (64, 96)))
    expected = detections(model, batch)
    recorder = type("Logged", (Recording,), {"log": []})
    model.tensor_pass = Replayed(model.forward_tensors, 1, recorder)
    for _ in range(2):
        assert_alike(detections(model, batch), expected)
    kinds = [kind for kind, _ in recorder.log]
    assert kinds == ["record", "replay", "release"] * 3 + ["record", "replay"]
    model(batch)
    assert len(recorder.log) == len(kinds)


def test_known_objects_pass_without_a_recording(toy_model):
    model = toy_model("dn_detr").eval()
    batch = make_batch(1)
    batch[0]["known"] = batch[0]["instances"]
    expected = detections(model, batch)
    model.tensor_pass = lambda *_: pytest.fail("the objects would not be known")
    assert_alike(detections(model, batch), expected)


@pytest.fixture
def slow_to_compile():
    """Compiled code of other tests is forgotten before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.usefixtures("slow_to_compile")
@pytest.mark.parametrize("hide", [False, True])
def test_a_compiled_detector_detects_the_same_and_is_not_compiled_for_each_size(toy_cfg, toy_model, monkeypatch, hide):
    """By the compiler's first half alone; the second one would need minutes more, and knows no sizes either."""
    model = toy_model("dn_detr", "TEST.HIDE_PADDING", hide).eval()
    sizes = [(2, (64, 96)), (3, (70, 90)), (2, (97, 101)), (4, (120, 70)), (2, (83, 64)), (3, (100, 130))]
    batches = [make_batch(*[0] * n, sizes=(size,)) for n, size in sizes]
    expected = [detections(model, batch) for batch in batches]
    keys = list(model.state_dict())
    eager = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("dn_detr_d2.inference.torch.compile", eager)
    accelerate(model, toy_cfg("dn_detr", "TEST.COMPILE", True))
    counters.clear()
    for batch, theirs in zip(batches, expected, strict=True):
        assert_alike(detections(model, batch), theirs)
    assert list(model.state_dict()) == keys
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_what_is_compiled_is_the_pass_of_tensors_of_all_sizes(toy_cfg, toy_model, monkeypatch):
    model, asked = toy_model("dn_detr").eval(), []
    monkeypatch.setattr("dn_detr_d2.inference.torch.compile", lambda f, **options: asked.append((f, options)) or f)
    accelerate(model, toy_cfg("dn_detr", "TEST.COMPILE", True))
    assert asked == [(model.forward_tensors, {"dynamic": True})]
    batch = make_batch(0, 0)
    found = detections(model, batch)
    model.tensor_pass = None
    assert_alike(found, detections(model, batch))


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("system", ["dn_deformable_detr", "mask2former"])
def test_weights_are_cast_once_to_what_autocast_makes_of_them(toy_cfg, toy_model, monkeypatch, system, folds):
    monkeypatch.setattr("dn_detr_d2.config.validation.slow_bfloat16", lambda: "")
    options = ["TEST.AMP", "bf16", "TEST.FOLD_NORMS", folds]
    model, batch = toy_model(system, *options).eval(), make_batch(0, 0)
    settled = copy.deepcopy(model)
    settle(settled, toy_cfg(system, *options))
    if folds:
        fold_norms(model)
    convolutions = [x for x in settled.backbone.modules() if isinstance(x, nn.Conv2d)]
    assert {p.dtype for x in convolutions for p in x.parameters(recurse=False)} == {torch.bfloat16}
    assert settled.neck.projections[0][0].weight.dtype == torch.float32
    assert_alike(detections(settled, batch), detections(model, batch), 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["TEST.CUDA_GRAPHS", 4], ("TEST.CUDA_GRAPHS", 4, "MODEL.DEVICE", "'cpu'")),
        (["TEST.CUDA_GRAPHS", 4, "TEST.COMPILE", True], ("TEST.COMPILE", "TEST.CUDA_GRAPHS", 4)),
        (["TEST.CUDA_GRAPHS", -1], ("TEST.CUDA_GRAPHS", -1)),
        (["TEST.AMP", "half"], ("TEST.AMP", "'half'")),
    ],
)
def test_what_cannot_be_done_is_refused(toy_cfg, options, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        toy_cfg("dn_detr", *options)


@pytest.mark.parametrize(("key", "value"), [("TEST.COMPILE", True), ("TEST.HIDE_PADDING", True), ("TEST.NMS", 0.7)])
def test_detectron2s_own_detectors_have_no_such_thing(tmp_path, key, value):
    from toy_training import make_rcnn_cfg

    with pytest.raises(ConfigError, match=naming(key, value, "GeneralizedRCNN")):
        make_rcnn_cfg(tmp_path, key, value)


def test_an_evaluation_leaves_nothing_behind(toy_cfg, monkeypatch):
    """Recordings keep memory that a training needs."""
    seen, module = [], nn.Module()
    module.tensor_pass = None
    monkeypatch.setattr(
        "dn_detr_d2.engine.trainer.DefaultTrainer.test", lambda *_: seen.append(module.tensor_pass) or {}
    )
    module.forward_tensors, module.amp = copy.copy, None
    cfg = toy_cfg("dn_detr", "TEST.COMPILE", True)
    Trainer.test(cfg, module)
    assert callable(seen[0])
    assert module.tensor_pass is None
