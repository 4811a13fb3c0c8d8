"""Exported files against the model that they were made from: the same numbers, whatever the batch and the size."""

import pytest
import torch
from conftest import MASK_SYSTEMS, SYSTEMS
from detectron2.structures import ImageList

from dn_detr_d2.export.formats import FORMATS, trace, write_onnx
from dn_detr_d2.export.metadata import output_names

# As little to trace as there can be: a shallow backbone, and two decoder layers, so that references pass between them.
SMALL = ["MODEL.DN_DETR.DECODER.NUM_LAYERS", 2, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
ALL = [*SYSTEMS, *MASK_SYSTEMS]
CASES = [(1, 96, 160), (3, 192, 128)]  # none of them is traced with


def padded_batch(model, sizes):
    """(N, 3, H, W) noise with noise in the padding too, and (N, 2) sizes."""
    step = max(model.size_divisibility, 1)
    height, width = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
    return torch.rand(len(sizes), 3, height, width) * 255, torch.tensor(sizes)


@pytest.mark.parametrize("system", ["dn_detr", "dn_deformable_detr", "dino", "mask_dino"])
def test_the_tensor_function_is_what_the_model_does_with_a_padded_batch(toy_model, system):
    model = toy_model(system, *SMALL).eval()
    images, sizes = padded_batch(model, [(64, 96), (90, 70)])
    raw = [image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
    normalised = [(x - model.pixel_mean) / model.pixel_std for x in raw]
    with torch.no_grad():
        memory = model.encode_images(ImageList.from_tensors(normalised, model.size_divisibility))
        expected = model.decoder(model.query_source(memory), memory)
        logits, boxes, *masks = model.forward_tensors(images, sizes)
    assert torch.equal(logits, expected.logits[-1])
    assert torch.equal(boxes, expected.boxes[-1])
    assert not masks or torch.equal(masks[0], expected.mask_logits())


@pytest.mark.parametrize("system", ALL)
def test_every_system_is_traced_exactly_with_all_sizes_open(toy_model, system):
    model = toy_model(system, *SMALL).eval()
    program = trace(model, keep_operator=True).module()
    for number, height, width in CASES:
        images, sizes = padded_batch(model, [(height, width)] * number)
        sizes[-1] -= torch.tensor([15, 40])
        with torch.no_grad():
            expected, found = model.forward_tensors(images, sizes), program(images, sizes)
        assert len(found) == len(output_names(model))
        for ours, theirs in zip(expected, found, strict=True):
            assert torch.equal(ours, theirs)


def check_onnx(model, path, **options):
    write_onnx(model, path, {"class_names": "[]"}, **options)
    run = FORMATS["onnx"][2](path)
    for number, height, width in CASES:
        images, sizes = padded_batch(model, [(height, width)] * number)
        sizes[-1] -= torch.tensor([15, 40])
        with torch.no_grad():
            expected = model.forward_tensors(images, sizes)
        for ours, theirs in zip(expected, run(images, sizes), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_oldest_opset_predicts_the_same(toy_model, tmp_path):
    check_onnx(toy_model("dn_deformable_detr", *SMALL).eval(), tmp_path / "model.onnx", opset=18)


@pytest.mark.long
@pytest.mark.parametrize("system", ALL)
def test_every_system_predicts_the_same_as_onnx_file(toy_model, tmp_path, system):
    check_onnx(toy_model(system, *SMALL).eval(), tmp_path / "model.onnx")


@pytest.mark.long
def test_a_package_of_aotinductor_predicts_the_same(toy_model, tmp_path):
    model = toy_model("dn_deformable_detr", *SMALL).eval()
    _, write, load = FORMATS["aoti"]
    write(model, tmp_path / "model.pt2", {"class_names": '["a"]'})
    run = load(tmp_path / "model.pt2")
    for number, height, width in CASES:
        images, sizes = padded_batch(model, [(height, width)] * number)
        with torch.no_grad():
            expected = model.forward_tensors(images, sizes)
        for ours, theirs in zip(expected, run(images, sizes), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_file_of_torch_export_predicts_the_same_and_keeps_its_metadata(toy_model, tmp_path):
    model = toy_model("dn_deformable_detr", *SMALL).eval()
    _, write, load = FORMATS["torch_export"]
    write(model, tmp_path / "model.pt2", {"class_names": '["a"]'})
    said = {"class_names": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=said)
    assert said == {"class_names": '["a"]'}
    images, sizes = padded_batch(model, [(96, 160)] * 3)
    with torch.no_grad():
        expected, found = model.forward_tensors(images, sizes), load(tmp_path / "model.pt2")(images, sizes)
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.equal(ours, theirs)
