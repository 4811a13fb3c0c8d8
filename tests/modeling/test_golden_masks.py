"""Our models with masks, with the formula's weights, against the numbers of the authors' code."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from golden.formula import ellipses, load, points

from dn_detr_d2 import cxcywh_to_xyxy, setup_cfg
from dn_detr_d2.boxes import image_scale
from dn_detr_d2.checkpoint import convert, identify
from dn_detr_d2.checkpoint.names import rename_all
from dn_detr_d2.modeling import points as points_module

CASES = {
    "mask2former_r50": "mask2former_R50_instance_50ep",
    "mask_dino_r50": "mask_dino_R50_instance_50ep",
    "mask_dino_r50_hid1024": "mask_dino_R50_3scale_instance_50ep",
}
TERMS = {"ce": "class", "mask": "mask", "dice": "dice", "bbox": "l1", "giou": "giou"}
GROUPS = {"": "main", "_dn": "dn", "_interm": "proposal"}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model, batch, meta, arrays, {our parameter name: the authors'})."""
    meta, arrays, weights, images, targets = load(request.param)
    root, denoising = "MODEL.DN_DETR.", "MODEL.DN_DETR.DENOISING."
    overrides = [root + "NUM_CLASSES", meta["num_classes"], root + "NUM_QUERIES", meta["num_queries"]]
    overrides += ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    for key in ("LABEL_NOISE_PROB", "CENTER_NOISE_SCALE", "SIZE_NOISE_SCALE"):
        overrides += [denoising + key, 0.0]
    overrides += [denoising + "NUM_QUERIES", meta.get("dn_num", 100), root + "LOSS.GIOU_EPS", 1e-6]
    overrides += ["TEST.DETECTIONS_PER_IMAGE", meta["detections_per_image"]]
    model = build_model(setup_cfg(str(ROOT / "configs" / f"{CASES[request.param]}.yaml"), overrides))
    state = {key: torch.from_numpy(x) for key, x in weights.items()}
    model.load_state_dict(convert(state, model.state_dict()).state)
    names = {}
    for theirs, ours in rename_all(list(weights), identify(weights)).items():
        names.setdefault(ours, []).append(theirs)

    padded, batch = (96, 128), []
    for image, (labels, boxes), wanted in zip(images, targets, meta["output_sizes"], strict=True):
        # Mask DINO's jittering makes padding a part of the image.
        size = image.shape[1:] if request.param == "mask2former_r50" else padded
        masks = BitMasks(torch.from_numpy(ellipses(boxes, size)))
        boxes = torch.from_numpy(boxes)
        absolute = cxcywh_to_xyxy(boxes) * image_scale(size, boxes)
        instances = Instances(size, gt_boxes=Boxes(absolute), gt_classes=torch.from_numpy(labels), gt_masks=masks)
        record = {"image": torch.from_numpy(image), "instances": instances, "height": wanted[0], "width": wanted[1]}
        batch.append(record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            points_module,
            "random_points",
            lambda kind, sets, count, device: torch.from_numpy(points(kind, count, meta["seed"])).expand(sets, -1, -1),
        )
        yield model, batch, meta, arrays, names


@pytest.fixture(scope="module")
def seen(case):
    """One pass in training mode, without gradient."""
    model, batch, *_ = case
    model.train()
    with torch.no_grad():
        return model.forward_outputs(batch, model.denoising)


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=atol)


def close_masks(predictions, arrays, prefix):
    """Mean and mean absolute value of the mask logits of every set, image and query."""
    for k in range(len(predictions.logits)):
        masks = predictions.mask_logits(k).double().flatten(2)
        for suffix, values in (("mean", masks), ("abs_mean", masks.abs())):
            recorded = arrays[f"{prefix}_masks_{suffix}"]
            close(values.mean(-1), recorded if recorded.ndim == 2 else recorded[k], atol=1e-3)


def test_parameters_and_evaluation_outputs(case):
    model, batch, meta, arrays, _ = case
    assert sum(p.numel() for p in model.parameters()) == meta["n_params"]
    with torch.no_grad():
        predictions = model.eval().forward_outputs(batch, annotated=False).predictions
    close(predictions.logits[-1], arrays["eval_logits"], atol=1e-4)
    close(predictions.mask_logits(), arrays["eval_masks"], atol=1e-3)
    if "eval_boxes" in arrays:
        close(predictions.boxes[-1], arrays["eval_boxes"], atol=2e-5)  # rounding of processors differs by 1e-5
    else:
        assert predictions.boxes is None


def test_detections_through_the_interface_of_detectron2(case):
    model, batch, meta, arrays, _ = case
    model.eval()
    model.pad_to_largest = True  # as the cases were recorded
    with torch.no_grad():
        results = model([{key: x for key, x in record.items() if key != "instances"} for record in batch])
    for i, (result, size) in enumerate(zip(results, meta["output_sizes"], strict=True)):
        found = result["instances"]
        assert found.image_size == tuple(size)
        assert found.pred_masks.dtype == torch.bool
        close(found.scores, arrays[f"inst{i}_scores"], atol=1e-4)
        areas = found.pred_masks.flatten(1).sum(1).tolist()
        recorded = [arrays[f"inst{i}_{name}"].tolist() for name in ("labels", "areas")]
        ours = sorted(zip(found.pred_classes.tolist(), areas, strict=True))
        # Of the 1e6 pixels of all masks one or two have a logit that is 0 but for rounding.
        for (label, area), (wanted, pixels) in zip(ours, sorted(zip(*recorded, strict=True)), strict=True):
            assert (label, area) == (wanted, pytest.approx(pixels, abs=2))
        if f"inst{i}_boxes" in arrays:
            order = np.lexsort((arrays[f"inst{i}_boxes"][:, 0], arrays[f"inst{i}_labels"]))
            boxes = found.pred_boxes.tensor
            mine = np.lexsort((boxes[:, 0].numpy(), found.pred_classes.numpy()))
            close(boxes[mine], arrays[f"inst{i}_boxes"][order], atol=2e-3)


def test_training_outputs_of_all_parts(case, seen):
    _, _, meta, arrays, _ = case
    matching = seen.matching
    sets = meta.get("train_logits_sets", list(range(len(matching.logits))))
    close(matching.logits[sets], arrays["train_logits"], atol=1e-4)
    close_masks(matching, arrays, "train")
    if "train_boxes" not in arrays:
        return
    close(matching.boxes, arrays["train_boxes"], atol=1e-5)
    denoising, proposals = seen.denoising, seen.queries.proposals
    close(seen.queries.boxes[:, seen.dn.num_queries :], arrays["initial_boxes"], atol=1e-5)
    close(denoising.logits, arrays["dn_logits"], atol=1e-4)
    close(denoising.boxes, arrays["dn_boxes"], atol=1e-5)
    close_masks(denoising, arrays, "dn")
    close(proposals.logits[0], arrays["interm_logits"], atol=1e-4)
    close(proposals.boxes[0], arrays["interm_boxes"], atol=1e-5)
    close_masks(proposals, arrays, "interm")


def test_every_bit_of_the_attention_masks(case, monkeypatch):
    model, batch, meta, arrays, _ = case
    if "attention_bits" not in arrays:
        assert not hasattr(model.decoder, "outside")  # Mask DINO's attention is deformable
        return
    bits, outside = [], model.decoder.outside
    monkeypatch.setattr(model.decoder, "outside", lambda *given: bits.append(outside(*given)) or bits[-1])
    model.train()
    with torch.no_grad():
        model.forward_outputs(batch)
    assert [list(x.shape) for x in bits] == meta["attention_shapes"]
    assert [int(x.all(-1).sum()) for x in bits] == meta["rows_fully_blocked"]
    packed = np.packbits(np.concatenate([x.numpy().ravel() for x in bits]))
    np.testing.assert_array_equal(packed, arrays["attention_bits"])


def test_every_match(case, seen):
    model, _, meta, _, _ = case
    parts = [seen.matching] + ([seen.queries.proposals] if seen.queries.proposals is not None else [])
    assigned = [(model.matcher(part, seen.targets), k) for part in parts for k in range(len(part.logits))]
    assert len(assigned) == len(meta["matches"])
    for (assignment, k), queries, targets in zip(assigned, meta["matches"], meta["matched_targets"], strict=True):
        for image, pairs in enumerate(assignment.per_image(2, k)):
            expected = zip(queries[image], targets[image], strict=True)
            assert sorted(zip(*(x.tolist() for x in pairs), strict=True)) == sorted(expected)


def test_losses_and_gradients(case):
    model, batch, meta, _, names = case
    model.train()
    model.zero_grad()
    losses = model(batch)
    assert len(losses) == len(meta["losses"])
    for theirs, value in meta["losses"].items():
        ours = losses[our_loss(theirs)].item()
        without_noise = theirs in ("loss_bbox_dn_0", "loss_giou_dn_0")  # rounding alone
        expected = pytest.approx(value * meta["weights"][theirs], rel=1e-3, abs=1e-4 if without_noise else 1e-9)
        assert ours == expected, theirs
    total = sum(losses.values())
    assert total.item() == pytest.approx(meta["total"], rel=1e-4)

    total.backward()
    parameters, compared = dict(model.named_parameters()), set()
    for ours, keys in names.items():
        theirs = [key for key in keys if key in meta["grad_norms"]]
        if not theirs:
            continue
        gradient = parameters[ours].grad
        rest = parameters.get(ours.replace("class_heads", "no_object_heads"))
        if "class_heads" in ours and rest is not None:
            gradient = torch.cat([gradient, rest.grad])
        # Bilinear sampling has kinks in the offsets: a point that rounding moves into the next cell has another gradient.
        relative = 5e-3 if "sampling_offsets" in ours else 2e-3
        assert gradient.norm().item() == pytest.approx(meta["grad_norms"][theirs[0]], rel=relative, abs=2e-6), ours
        compared.update(theirs)
    assert compared == set(meta["grad_norms"])


def our_loss(name):
    """Our name of one of the authors' losses."""
    term, group, layer = re.fullmatch(r"loss_([a-z]+)(_dn|_interm|)(?:_(\d+))?", name).groups()
    group = "aux" if layer and not group else GROUPS[group]
    return f"{group}/{TERMS[term]}" + (f"_{layer}" if layer else "")
