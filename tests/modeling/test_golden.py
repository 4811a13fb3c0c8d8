"""Our models with the formula's weights against the numbers of the authors' code."""

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from golden.formula import load
from golden.names import rename

from dn_detr_d2 import cxcywh_to_xyxy, setup_cfg
from dn_detr_d2.boxes import image_scale
from dn_detr_d2.structures import Predictions

CASES = {"dn_detr_r50": "dn_detr_R50_50ep", "dab_deformable_detr_r50_dn": "dn_dab_deformable"}
OUTPUT_SIZES = [(480, 640), (333, 500)]
TERMS = {"ce": "class", "bbox": "l1", "giou": "giou"}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model, batch, meta, arrays, {our parameter name: the authors'})."""
    meta, arrays, weights, images, targets = load(request.param)
    overrides = ["MODEL.DN_DETR.NUM_CLASSES", 91, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    noise = "MODEL.DN_DETR.DENOISING."
    for key in ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE"):
        overrides += [noise + key, 0.0]
    overrides += ["TEST.DETECTIONS_PER_IMAGE", len(arrays["post0_scores"])]
    model = build_model(setup_cfg(str(ROOT / "configs" / f"{CASES[request.param]}.yaml"), overrides))
    names = {rename(key, "deformable" in request.param): key for key in weights}
    names.pop(None)
    model.load_state_dict({ours: torch.from_numpy(weights[theirs]) for ours, theirs in names.items()})

    batch = []
    for image, (labels, boxes), size in zip(images, targets, OUTPUT_SIZES, strict=True):
        boxes = torch.from_numpy(boxes)
        absolute = cxcywh_to_xyxy(boxes) * image_scale(image.shape[1:], boxes)
        instances = Instances(image.shape[1:], gt_boxes=Boxes(absolute), gt_classes=torch.from_numpy(labels))
        record = {"image": torch.from_numpy(image), "instances": instances, "height": size[0], "width": size[1]}
        batch.append(record)
    return model, batch, meta, arrays, names


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, **tolerance)


def test_number_of_parameters(case):
    model, _, meta, _, _ = case
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]


def test_evaluation_outputs(case):
    model, batch, _, arrays, _ = case
    model.eval()
    with torch.no_grad():
        images = model._preprocess(batch)
        predictions, _ = model._decode(model.encoder(model._pyramid(images)))
    close(predictions.logits[-1], arrays["eval_logits"], atol=2e-4)
    close(predictions.boxes[-1], arrays["eval_boxes"], atol=1e-5)


def test_detections_in_the_pixels_of_the_original_image(case):
    """Post-processing alone, from the recorded outputs: near-ties between queries would hide a wrong order."""
    model, batch, meta, arrays, _ = case
    recorded = [torch.from_numpy(arrays[name])[None] for name in ("eval_logits", "eval_boxes")]
    results = model._detections(Predictions(*recorded), [tuple(size) for size in meta["image_sizes"]], batch)
    for i, (result, (height, width)) in enumerate(zip(results, OUTPUT_SIZES, strict=True)):
        result = result["instances"]
        expected = torch.from_numpy(arrays[f"post{i}_boxes"])  # the authors clip nothing, Detectron2 clips to the image
        expected = expected.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        close(result.scores, arrays[f"post{i}_scores"], atol=1e-6)
        assert result.pred_classes.tolist() == arrays[f"post{i}_labels"].tolist()
        torch.testing.assert_close(result.pred_boxes.tensor, expected, atol=2e-3, rtol=0)


def test_training_outputs_of_both_parts(case):
    model, batch, _, arrays, _ = case
    model.train()
    targets = model._targets([x["instances"] for x in batch])
    with torch.no_grad():
        memory = model.encoder(model._pyramid(model._preprocess(batch)))
        predictions, noised = model._decode(memory, targets)
    denoising, matching = predictions.split(noised.num_queries)
    close(denoising.logits, arrays["dn_logits"], atol=2e-4)
    close(denoising.boxes, arrays["dn_boxes"], atol=1e-5)
    close(matching.logits[-1], arrays["train_logits"], atol=2e-4)
    close(matching.boxes[-1], arrays["train_boxes"], atol=1e-5)


def test_losses_and_gradients(case):
    model, batch, meta, _, names = case
    model.train()
    model.zero_grad()
    losses = model(batch)
    for name, value in losses.items():
        group, term = name.split("/")
        term, _, layer = term.partition("_")
        theirs = next(k for k, v in TERMS.items() if v == term)
        theirs = ("tgt_" if group == "dn" else "") + f"loss_{theirs}" + (f"_{layer}" if layer else "")
        weighted = meta["losses"][theirs] * meta["weights"][theirs]
        assert value.item() == pytest.approx(weighted, rel=1e-3), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(meta["total"], rel=1e-4)

    total.backward()
    compared = 0
    for ours, parameter in model.named_parameters():
        theirs = names[ours].replace("bbox_embed", "transformer.decoder.bbox_embed")
        theirs = names[ours] if names[ours] in meta["grad_norms"] else theirs
        if parameter.grad is not None:
            # Biases of keys have no gradient but rounding: a softmax does not feel a constant.
            expected = meta["grad_norms"][theirs]
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3, abs=2e-6), ours
            compared += 1
    assert compared == len(meta["grad_norms"])
