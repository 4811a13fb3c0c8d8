import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from naming import naming
from PIL import Image

from dn_detr_d2 import CheckpointError, ConfigError, DatasetError, UserError
from dn_detr_d2.engine import load_for_evaluation
from dn_detr_d2.predictor import Predictor

SLOW_BFLOAT16 = "dn_detr_d2.config.validation.slow_bfloat16"


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def hostile_cfg(toy_cfg, tmp_path):
    """A config whose weights are a pickle that makes a folder when it is read."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Payload(tmp_path / "canary")}, "__author__": "x"}))
    return toy_cfg("dn_detr", "MODEL.WEIGHTS", str(path))


@pytest.mark.parametrize("predictor", [Predictor, DefaultPredictor])
@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_a_hostile_pickle_is_refused_before_anybody_runs_it(hostile_cfg, predictor, query, tmp_path):
    hostile_cfg.MODEL.WEIGHTS += query
    with pytest.raises(CheckpointError, match=naming("posix.mkdir")):
        predictor(hostile_cfg)
    assert not (tmp_path / "canary").exists()


def test_it_predicts_what_detectron2s_predictor_predicts(toy_cfg, toy_model, tmp_path):
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    cfg = toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64)
    cfg.freeze()
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    ours, theirs = (predictor(cfg)(image)["instances"] for predictor in (Predictor, DefaultPredictor))
    assert len(ours) > 0
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(ours.scores, theirs.scores)


@pytest.mark.parametrize("system", ["mask2former", "mask_dino"])
def test_masks_panoptic_and_semantic_outputs_are_of_the_images_size(toy_cfg, toy_model, tmp_path, system):
    """As Detectron2's own predictor gives them."""
    torch.save({"model": toy_model(system).state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
    cfg = toy_cfg(system, *options, "MODEL.DN_DETR.MASK.OUTPUTS", ["instances", "panoptic_seg", "sem_seg"])
    image = np.random.default_rng(0).integers(256, size=(48, 70, 3), dtype=np.uint8)
    ours, theirs = (predictor(cfg)(image) for predictor in (Predictor, DefaultPredictor))
    assert ours["instances"].pred_masks.shape == (len(ours["instances"]), 48, 70)
    assert torch.equal(ours["instances"].pred_masks, theirs["instances"].pred_masks)
    ids, segments = ours["panoptic_seg"]
    assert ids.shape == (48, 70)
    assert set(ids.unique().tolist()) - {0} <= {x["id"] for x in segments}
    assert torch.equal(ids, theirs["panoptic_seg"][0])
    assert ours["sem_seg"].shape == (5, 48, 70)


def test_weights_that_lack_a_tensor_are_refused(toy_cfg, toy_model, tmp_path):
    state = toy_model("dn_detr").state_dict()
    gone, _ = state.popitem()
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=naming("model.pth", gone)):
        Predictor(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "model.pth")))


def other_classes(toy_model):
    return {"model": toy_model("dn_detr", "MODEL.DN_DETR.NUM_CLASSES", 7).state_dict()}


FILES = {
    "another number of classes": other_classes,
    "another system": lambda toy_model: {"model": toy_model("dab_deformable_detr").state_dict()},
    "not a detector": lambda toy_model: torch.nn.Linear(2, 2).state_dict(),
    "a backbone alone": lambda toy_model: {
        name: x for name, x in toy_model("dn_detr").state_dict().items() if name.startswith("backbone.")
    },
    "nothing": lambda toy_model: {},
    "no weights": lambda toy_model: {"model": {}},
    "an optimizer alone": lambda toy_model: {"optimizer": {"state": {}, "param_groups": []}, "iteration": 3},
}


@pytest.mark.parametrize("load", [Predictor, load_for_evaluation])
@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_not_of_this_model_is_refused_by_name(toy_cfg, toy_model, tmp_path, load, content):
    torch.save(FILES[content](toy_model), tmp_path / "given.pth")
    with pytest.raises(CheckpointError, match=r"given\.pth") as caught:
        load(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "given.pth")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [Predictor, load_for_evaluation])
@pytest.mark.parametrize(
    "weights", ["", "missing.pth", ".", "https://127.0.0.1:9/x.pth", "https://127.0.0.1:9/x-01234567.pth"]
)
def test_weights_that_are_no_file_are_refused_by_name(toy_cfg, load, weights):
    with pytest.raises(CheckpointError, match=re.escape(repr(weights))) as caught:
        load(toy_cfg("dn_detr", "MODEL.WEIGHTS", weights))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [name for name in FILES if name not in ("nothing", "an optimizer alone")])
def test_detectron2s_predictor_refuses_them_too(toy_cfg, toy_model, tmp_path, content):
    torch.save(FILES[content](toy_model), tmp_path / "given.pth")
    with pytest.raises(CheckpointError):
        DefaultPredictor(toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "given.pth")))


@pytest.fixture
def told(toy_cfg, toy_model, tmp_path):
    """(predictor, its image of 64 x 48 pixels, which it doubles)."""
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    names = ["MODEL.DN_DETR.CLASS_NAMES", ["a", "b", "c", "d", "e"], "INPUT.MIN_SIZE_TEST", 96]
    cfg = toy_cfg("dn_detr", "MODEL.WEIGHTS", str(tmp_path / "model.pth"), *names)
    return Predictor(cfg), np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)


def known(*boxes, size=(48, 64), label=1, kind="gt"):
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return Instances(size, **{f"{kind}_boxes": boxes, f"{kind}_classes": torch.full((len(boxes),), label)})


def same(a, b):
    return torch.equal(a.scores, b.scores) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_known_objects_are_in_pixels_of_the_given_image(told):
    """The model on the resized image, with boxes that are resized by hand."""
    predictor, image = told
    found = predictor(image, known=known((4, 6, 20, 40), (30, 3, 60, 40)))["instances"]
    resized = predictor.aug.get_transform(image).apply_image(image[:, :, ::-1])
    record = {"image": torch.from_numpy(resized.copy()).permute(2, 0, 1).float(), "height": 48, "width": 64}
    record["known"] = known((8, 12, 40, 80), (60, 6, 120, 80), size=(96, 128))
    with torch.no_grad():
        expected = predictor.model([record])[0]["instances"]
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert not same(found, predictor(image)["instances"])


def test_detections_can_be_given_back(told):
    predictor, image = told
    first = predictor(image)["instances"][:3]
    assert first.has("pred_boxes")
    given = Instances((48, 64), gt_boxes=first.pred_boxes, gt_classes=first.pred_classes)
    assert same(*(predictor(image, known=x)["instances"] for x in (first, given)))


def test_nothing_known_is_as_ever_to_the_bit(told):
    predictor, image = told
    ordinary = predictor(image)["instances"]
    assert same(predictor(image, known=known())["instances"], ordinary)
    assert same(predictor(image, known=known(kind="pred"))["instances"], ordinary)


def test_labels_are_names_or_numbers(told):
    predictor, image = told
    found = predictor(image, labels=["b", 3])["instances"]
    assert same(found, predictor(image, labels=[1, "d"])["instances"])
    assert set(found.pred_classes.tolist()) == {1, 3}
    assert len(predictor(image, labels=[])["instances"]) == 0


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ({"known": known((4, 6, 65, 40))}, (65.0, "(48, 64)")),
        ({"known": known((4, 6, 20, 40), label=5)}, (5,)),
        ({"known": known((4, 6, 20, 40), size=(64, 48))}, ("(64, 48)",)),
        ({"known": [[4, 6, 20, 40]]}, ("list",)),
        ({"labels": ["z"]}, ("'z'",)),
        ({"labels": [5]}, (5,)),
        ({"labels": ["a", 0]}, ("[0, 0]",)),
        ({"labels": [0], "known": known((4, 6, 20, 40))}, ("known", "labels")),
    ],
)
def test_what_is_not_of_the_image_or_the_model_is_refused_in_pixels_of_the_image(told, prompts, named):
    predictor, image = told
    with pytest.raises(UserError, match=naming(*named)):
        predictor(image, **prompts)


@pytest.fixture
def made(toy_cfg, toy_model, tmp_path):
    """made(system, *overrides, **arguments) -> a small predictor."""

    def make(system, *overrides, **arguments):
        torch.save({"model": toy_model(system).state_dict()}, tmp_path / "model.pth")
        options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST", 64, *overrides]
        return Predictor(toy_cfg(system, *options), **arguments)

    return make


def pictures(count=5):
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (64, 48), (48, 64), (40, 40), (96, 128)]  # the last is of the first's shape once resized
    return [rng.integers(256, size=(*sizes[i % 5], 3), dtype=np.uint8) for i in range(count)]


def close(found, expected):
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "mask2former"])
@pytest.mark.parametrize("padded", [False, True])
def test_many_images_have_the_detections_of_one_by_one(made, system, padded):
    predictor = made(system, "TEST.PAD_TO_LARGEST", padded)
    images = pictures()
    expected = [predictor(image)["instances"] for image in images]
    for batch_size in (None, 2, 5):
        found = [x["instances"] for x in predictor.predict(images, batch_size=batch_size)]
        assert [x.image_size for x in found] == [image.shape[:2] for image in images]
        for one, other in zip(found, expected, strict=True):
            close(one, other)


def test_images_of_one_size_pass_the_model_together(made):
    predictor, passes = made("dn_detr"), []
    predictor.model.backbone.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    list(predictor.predict(pictures(), batch_size=5))
    assert passes == [3, 1, 1]


def test_every_kind_of_source_gives_the_same_detections(made, tmp_path):
    predictor, image = made("dn_detr"), pictures(1)[0]
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    Image.fromarray(rgb).save(tmp_path / "a.png")
    expected = predictor(image)["instances"]
    assert same(predictor(str(tmp_path / "a.png"))["instances"], expected)
    assert same(predictor(Image.fromarray(rgb))["instances"], expected)
    assert same(predictor(torch.from_numpy(rgb).permute(2, 0, 1), rgb=True)["instances"], expected)
    for source in (tmp_path, str(tmp_path / "*.png"), [tmp_path / "a.png"], image, (x for x in [image])):
        (found,) = predictor.predict(source)
        assert same(found["instances"], expected)


def test_a_stream_is_read_when_results_are_asked_for(made):
    predictor, taken = made("dn_detr"), []

    def endless():
        while True:
            taken.append(1)
            yield pictures(1)[0]

    results = predictor.predict(endless(), batch_size=2)
    assert len(taken) == 0
    next(results)
    assert len(taken) == 2
    next(results)
    assert len(taken) == 2


def test_labels_hold_for_all_images(told):
    predictor, image = told
    assert [set(x["instances"].pred_classes.tolist()) for x in predictor.predict([image] * 3, labels=["b"])] == [
        {1}
    ] * 3


@pytest.mark.parametrize(
    ("source", "options", "kind", "named"),
    [
        ("gone.png", {}, DatasetError, ["gone.png"]),
        ("http://a.org/x.jpg", {}, UserError, ["http://a.org/x.jpg", "URL"]),
        (["gone.png"], {}, DatasetError, ["gone.png"]),
        ([], {"batch_size": 0}, UserError, ["batch_size", 0]),
        ([], {"batch_size": 1.5}, UserError, ["batch_size", 1.5]),
    ],
)
def test_sources_are_looked_for_before_the_first_image(told, source, options, kind, named):
    with pytest.raises(kind, match=naming(*named)):
        told[0].predict(source, **options)


@pytest.mark.parametrize("system", ["dn_detr", "dino"])
def test_threads_share_a_predictor(made, system):
    predictor, images = made(system), pictures(5) * 3
    expected = [predictor(image)["instances"] for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = [x["instances"] for x in pool.map(predictor, images)]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "mask2former", "mask_dino"])
def test_bfloat16_is_near_and_comes_out_in_float32(made, monkeypatch, system):
    image = pictures(1)[0]
    monkeypatch.setattr(SLOW_BFLOAT16, lambda: "")
    full, half = made(system), made(system, "TEST.AMP", "bf16")
    half.model.load_state_dict(full.model.state_dict())
    dtypes = set()
    half.model.backbone.register_forward_hook(lambda *given: dtypes.update(x.dtype for x in given[2].values()))
    found, expected = half(image)["instances"], full(image)["instances"]
    assert dtypes == {torch.bfloat16}
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    assert (found.scores - expected.scores).abs().max() < 0.05
    assert not torch.equal(found.scores, expected.scores)


def test_half_is_the_16_bit_precision_of_the_device(made, monkeypatch):
    monkeypatch.setattr(SLOW_BFLOAT16, lambda: "")
    half, full = made("dn_detr", half=True), made("dn_detr", "TEST.AMP", "bf16")
    half.model.load_state_dict(full.model.state_dict())
    image = pictures(1)[0]
    assert torch.equal(half(image)["instances"].scores, full(image)["instances"].scores)
    assert half.cfg.TEST.AMP == "bf16"
    monkeypatch.setattr(SLOW_BFLOAT16, lambda: "this CPU has none")
    with pytest.raises(ConfigError, match=naming("TEST.AMP", "'bf16'", "this CPU has none")):
        made("dn_detr", half=True)


@pytest.mark.parametrize("nms", [1.0, 0.1])
@pytest.mark.parametrize(("system", "prompts"), [
    ("dn_detr", {}), ("mask_dino", {}), ("dn_detr", {"known": (4, 6, 20, 40)}), ("dn_detr", {"labels": [1, 3]}),
])  # fmt: skip
def test_what_a_predictor_gives_may_be_changed_in_place(made, system, prompts, nms):
    """Tensors made in inference mode may not, and autograd would refuse them."""
    image = pictures(1)[0]
    if "known" in prompts:
        prompts = {"known": known(prompts["known"], size=image.shape[:2])}
    predictor, modes = made(system, "TEST.NMS", nms), set()
    predictor.model.decoder.register_forward_hook(lambda *_: modes.add(torch.is_inference_mode_enabled()))
    found = predictor(image, **prompts)["instances"]
    assert modes == {True}
    assert not any(getattr(x, "tensor", x).is_inference() for x in found.get_fields().values())
    found.pred_boxes.scale(2, 2)
    (found.scores.requires_grad_() * 2).sum().backward()


@pytest.mark.parametrize(("device", "amp", "named"), [("cpu", "bf16", "has none"), ("cpu", "fp16", "needs a GPU")])
def test_a_precision_that_is_slower_is_refused(made, toy_cfg, monkeypatch, device, amp, named):
    monkeypatch.setattr(SLOW_BFLOAT16, lambda: "this CPU has none")
    with pytest.raises(ConfigError, match=naming("TEST.AMP", repr(amp), named)):
        toy_cfg("dn_detr", "TEST.AMP", amp)
    cfg = toy_cfg("dn_detr", "MODEL.WEIGHTS", "any.pth")
    cfg.TEST.AMP = amp  # as in a config that was checked on another machine
    with pytest.raises(ConfigError, match=naming("TEST.AMP", repr(amp), named)):
        Predictor(cfg, device=device)


def test_the_device_is_an_argument(made):
    assert made("dn_detr", device=torch.device("cpu")).cfg.MODEL.DEVICE == "cpu"
    with pytest.raises(ConfigError, match=naming("MODEL.DEVICE", "'no device'")):
        made("dn_detr", device="no device")


def test_supervision_gets_boxes_names_and_masks(made):
    names = ["MODEL.DN_DETR.CLASS_NAMES", list("abcde")]
    image = pictures(1)[0]
    predictor = made("mask_dino", *names)
    found = predictor(image)
    detections, instances = predictor.to_supervision(found), found["instances"]
    assert np.array_equal(detections.xyxy, instances.pred_boxes.tensor.numpy())
    assert np.array_equal(detections.mask, instances.pred_masks.numpy())
    assert np.array_equal(detections.confidence, instances.scores.numpy())
    assert list(detections.data["class_name"]) == ["abcde"[i] for i in instances.pred_classes]
    assert len(detections[detections.class_id == 9]) == 0
    plain = made("dn_detr")
    assert plain.to_supervision(plain(image)).mask is None
    assert set(plain.to_supervision(plain(image)).data["class_name"]) <= set("01234")
    with pytest.raises(ConfigError, match=naming("['sem_seg']", "MASK.OUTPUTS")):
        predictor.to_supervision({"sem_seg": None})


def test_a_missing_supervision_names_its_extra(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match=naming("[report]")):
        told[0].to_supervision({})


@pytest.mark.parametrize("folds", [True, False])
def test_norms_are_folded_unless_the_config_says_no(made, folds):
    torch.manual_seed(0)
    predictor = made("dn_detr", "TEST.FOLD_NORMS", folds)
    norms = sum(isinstance(module, FrozenBatchNorm2d) for module in predictor.model.modules())
    assert (norms == 0) == folds
    torch.manual_seed(0)  # the same weights again
    plain = made("dn_detr", "TEST.FOLD_NORMS", False)
    for image in pictures(2):
        ours, theirs = (x(image)["instances"] for x in (predictor, plain))
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-2)
