"""The program that users copy: its arithmetic against the package's, on made-up outputs of a file."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from naming import naming
from PIL import Image

from dn_detr_d2.data import ResizeShortestEdge
from dn_detr_d2.export import onnx_predictor
from dn_detr_d2.export.detector import LastPredictions
from dn_detr_d2.export.metadata import describe
from dn_detr_d2.export.onnx_predictor import OnnxPredictor, new_size, open_image, resize
from dn_detr_d2.modeling.mask_postprocess import MaskPostprocess
from dn_detr_d2.modeling.postprocess import Postprocess, select_best, select_top

PICTURE = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)


def predictor_of(outputs, **metadata):
    """A predictor whose file gives these outputs, (1, ...) tensors by name."""
    made = OnnxPredictor.__new__(OnnxPredictor)
    made.metadata = {
        "class_names": list("abcde"),
        "channel_order": "BGR",
        "resize": {"shortest_edge": 64, "longest_edge": 80, "filter": "Pillow bilinear"},
        "size_divisibility": 32,
        "outputs": list(outputs),
        "top_k": 7,
    } | metadata
    values = [x.numpy() for x in outputs.values()]
    made.session = SimpleNamespace(run=lambda names, inputs: values)
    return made


def made_up(classes, masks=False):
    outputs = {"logits": 3 * torch.randn(1, 9, classes), "boxes": torch.rand(1, 9, 4) * 0.5 + 0.25}
    return outputs | ({"masks": torch.randn(1, 9, 16, 24)} if masks else {})


def record():
    """What the model is given of PICTURE: 57 x 80 pixels, of an image of 50 x 70."""
    return {"image": torch.zeros(3, 57, 80), "height": 50, "width": 70}


def check_same(instances, arrays):
    scores, classes, boxes, masks = arrays
    np.testing.assert_allclose(scores, instances.scores.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(classes, instances.pred_classes.numpy())
    np.testing.assert_allclose(boxes, instances.pred_boxes.tensor.numpy(), rtol=1e-5, atol=1e-4)
    if masks is not None:
        assert (masks != instances.pred_masks.numpy()).mean() < 1e-4  # logits of 0 but for rounding


@pytest.mark.parametrize("nms", [1.0, 0.2])
@pytest.mark.parametrize(("scores", "select", "logits"), [("sigmoid", select_top, 5), ("softmax", select_best, 6)])
def test_boxes_are_those_of_the_package(scores, select, logits, nms):
    outputs = made_up(logits)
    outputs["boxes"][0, 0] = torch.tensor([-0.5, 0.5, 0.2, 0.2])  # outside: left out
    predictions = LastPredictions(outputs["logits"][None], outputs["boxes"][None])
    expected = Postprocess(select, 7, nms)(predictions, [record()])[0]["instances"]
    check_same(expected, predictor_of(outputs, scores=scores, nms=nms).arrays(PICTURE))


def test_detections_that_overlap_are_left_out_where_the_file_asks_for_it():
    outputs = {"logits": torch.tensor([[[3.0, 1.0], [2.0, 2.5]]]), "boxes": torch.tensor([[[0.5, 0.5, 0.4, 0.4]] * 2])}
    every, some = (predictor_of(outputs, scores="sigmoid", **x)(PICTURE) for x in ({}, {"nms": 0.5}))
    assert [x.class_name for x in every] == ["a", "b", "a", "b"]
    assert some == every[:2]


@pytest.mark.parametrize("nms", [1.0, 0.2])
@pytest.mark.parametrize("by_mask", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize(("scores", "logits"), [("sigmoid", 5), ("softmax", 6)])
def test_masks_are_those_of_the_package(scores, logits, boxes, by_mask, nms):
    outputs = made_up(logits, masks=True)
    if not boxes:
        del outputs["boxes"]
    kinds, things = ["instances", "panoptic_seg"], [0, 2, 3]
    ours = MaskPostprocess(["instances"], 5, top_k=7, score_by_mask=by_mask, nms_iou=nms)
    ours.outputs, ours.things = kinds, frozenset(things)
    predictions = LastPredictions(
        outputs["logits"][None], outputs["boxes"][None] if boxes else None, maps=outputs["masks"]
    )
    ours._make = {"instances": MaskPostprocess._instances, "panoptic_seg": lambda *_: None}
    expected = ours(predictions, [record()])[0]["instances"]
    rule = {"outputs": kinds, "things": things, "score_by_mask": by_mask}
    found = predictor_of(outputs, scores=scores, masks=rule, nms=nms).arrays(PICTURE)
    check_same(expected, found)
    assert found[3].shape == (len(found[0]), 50, 70)


@pytest.mark.parametrize(("nms", "version"), [(1.0, "1"), (0.7, "2")])
def test_a_file_with_nms_has_a_version_that_earlier_readers_refuse(toy_cfg, toy_model, tmp_path, nms, version):
    """They would give every detection without a word."""
    (tmp_path / "model.pth").touch()
    found = describe(toy_cfg("dn_detr", "TEST.NMS", nms), toy_model("dn_detr"), tmp_path / "model.pth")
    assert (found["format_version"], json.loads(found["nms"])) == (version, nms)
    assert version in onnx_predictor.KNOWN_VERSIONS


def test_a_detection_has_a_name_and_the_threshold_holds():
    outputs = made_up(5)
    every = predictor_of(outputs, scores="sigmoid")(PICTURE)
    some = predictor_of(outputs, scores="sigmoid")(PICTURE, threshold=every[2].score)
    assert [x.class_name for x in every] == ["abcde"[x.class_number] for x in every]
    assert some == every[:3]
    for threshold in (50, float("nan"), -0.1):
        with pytest.raises(ValueError, match=naming("threshold", threshold)):
            predictor_of(outputs, scores="sigmoid")(PICTURE, threshold=threshold)


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([(96, 160), (800, 1333), (64, 64), (0, 99)]))
def test_the_size_is_that_of_the_package(height, width, rule):
    resized = ResizeShortestEdge([rule[0]] * 2, rule[1]).get_transform(np.zeros((height, width, 3), np.uint8))
    expected = (height, width) if rule[0] == 0 else (resized.new_h, resized.new_w)
    assert new_size(height, width, *rule) == expected


def test_the_pixels_are_those_of_the_package():
    bgr = PICTURE[:, :, ::-1]
    expected = ResizeShortestEdge([64, 64], 80).get_transform(bgr).apply_image(bgr)
    images, size = predictor_of({}).prepare(Image.fromarray(PICTURE))
    assert size == expected.shape[:2] == (57, 80)
    assert images.shape == (1, 3, 64, 96)
    np.testing.assert_array_equal(images[0, :, :57, :80], expected.transpose(2, 0, 1))
    assert not images[0, :, 57:].any()
    assert not images[0, :, :, 80:].any()


@settings(deadline=None)
@given(*(st.integers(1, 12) for _ in range(4)))
def test_maps_are_resized_as_by_pytorch(h, w, height, width):
    x = np.random.default_rng(h).standard_normal((h, w)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None, None], (height, width), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize(x, (height, width)), expected[0, 0].numpy(), atol=1e-5)


def test_a_model_without_instances_and_a_file_of_another_kind_are_refused(tmp_path):
    rule = {"outputs": ["sem_seg"], "things": [], "score_by_mask": True}
    with pytest.raises(ValueError, match="sem_seg"):
        predictor_of(made_up(5, masks=True), scores="sigmoid", masks=rule).arrays(PICTURE)
    with pytest.raises(ValueError, match="float64"):
        predictor_of(made_up(5), scores="sigmoid").arrays(np.zeros((3, 3, 3)))


def test_a_copy_needs_neither_torch_nor_detectron2(tmp_path):
    """It is imported from a folder of its own, in a process that has none of them, and finds what it finds here."""
    outputs = made_up(5)
    here = predictor_of(outputs, scores="sigmoid")
    np.savez(tmp_path / "given.npz", picture=PICTURE, **{name: x.numpy() for name, x in outputs.items()})
    (tmp_path / "metadata.json").write_text(json.dumps(here.metadata))
    copy = tmp_path / "onnx_predictor.py"
    copy.write_bytes((ROOT / "dn_detr_d2" / "export" / "onnx_predictor.py").read_bytes())
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'detectron2', 'dn_detr_d2', 'scipy', 'cv2'): sys.modules[name] = None\n"
        "import onnx_predictor\n"
        "import json, types, numpy as np\n"
        "given, made = np.load('given.npz'), onnx_predictor.OnnxPredictor.__new__(onnx_predictor.OnnxPredictor)\n"
        "made.metadata = json.load(open('metadata.json'))\n"
        "values = [given['logits'], given['boxes']]\n"
        "made.session = types.SimpleNamespace(run=lambda names, inputs: values)\n"
        "np.savez('found.npz', *made.arrays(given['picture'])[:3])\n"
        "print(onnx_predictor.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(onnx_predictor.main([]))
    for theirs, ours in zip(np.load(tmp_path / "found.npz").values(), here.arrays(PICTURE)[:3], strict=True):
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_as_the_predictor_does(mode, tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    image = Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32 if mode == "I" else np.float32))
    with pytest.raises(ValueError, match=mode):
        open_image(image)
