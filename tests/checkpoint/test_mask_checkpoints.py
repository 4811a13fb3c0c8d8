"""Checkpoints of Mask2Former and Mask DINO, of the authors and of detrex, older and newer; the names are the goldens'."""

import pickle

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from golden.formula import load
from naming import naming

from dn_detr_d2 import CheckpointError, setup_cfg
from dn_detr_d2.checkpoint import convert, identify, read_checkpoint

PREDICTOR = "sem_seg_head.predictor."
CONFIGS = {"mask2former_r50": "mask2former_R50_instance_50ep", "mask_dino_r50": "mask_dino_R50_instance_50ep"}
NAMES = [f"kind {i}" for i in range(11)]


def state_of(config, *overrides, classes=11):
    root = "MODEL.DN_DETR."
    options = [root + "NUM_CLASSES", classes, root + "NUM_QUERIES", 100, "MODEL.DEVICE", "cpu", *overrides]
    cfg = setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), options, splits=())
    return build_model(cfg).state_dict()


@pytest.fixture(scope="module")
def theirs():
    """{case: state dict under the authors' names}."""
    return {case: {key: torch.from_numpy(x) for key, x in load(case)[2].items()} for case in CONFIGS}


@pytest.fixture(scope="module")
def ours():
    """{case: state dict of our model}."""
    return {case: state_of(config) for case, config in CONFIGS.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("case", "system"), [("mask2former_r50", "Mask2Former"), ("mask_dino_r50", "Mask DINO")])
def test_the_source_is_found_and_every_tensor_has_its_place(theirs, ours, case, system):
    buffer = {"criterion.empty_weight": torch.ones(12)}
    conversion = convert(theirs[case] | buffer, ours[case])
    assert (conversion.source.system, conversion.source.code) == (system, "official")
    assert {name for name in ours[case] if "num_batches_tracked" not in name} == conversion.state.keys()
    assert not any("differ" in sentence for sentence in conversion.log)


def test_the_last_row_of_mask2formers_classes_is_no_object(theirs, ours):
    state = convert(theirs["mask2former_r50"], ours["mask2former_r50"]).state
    for part in ("weight", "bias"):
        together = theirs["mask2former_r50"][f"{PREDICTOR}class_embed.{part}"]
        assert torch.equal(state[f"decoder.heads.class_heads.0.{part}"], together[:-1])
        assert torch.equal(state[f"decoder.heads.no_object_heads.0.{part}"], together[-1:])


def test_older_files_of_mask2former_give_the_same(theirs, ours):
    older = {
        key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): x
        for key, x in theirs["mask2former_r50"].items()
    }
    assert older.keys() != theirs["mask2former_r50"].keys()
    a, b = (convert(x, ours["mask2former_r50"]).state for x in (older, theirs["mask2former_r50"]))
    assert equal(a, b)


def test_detrex_gives_the_same_as_the_official_mask_dino(theirs, ours):
    """It registers the box head inside the decoder alone."""
    official = theirs["mask_dino_r50"]
    left = {k: x for k, x in official.items() if not k.startswith((PREDICTOR + "_bbox", PREDICTOR + "bbox"))}
    assert len(left) < len(official)
    assert str(identify(left)) == "Mask DINO (detrex)"
    assert equal(convert(left, ours["mask_dino_r50"]).state, convert(official, ours["mask_dino_r50"]).state)


def test_copies_that_should_be_equal_and_differ_are_named(theirs, ours):
    key = PREDICTOR + "decoder.bbox_embed.3.layers.0.bias"
    damaged = theirs["mask_dino_r50"] | {key: theirs["mask_dino_r50"][key] + 1}
    log = " ".join(convert(damaged, ours["mask_dino_r50"]).log)
    assert key in log


@pytest.mark.parametrize(
    ("file", "model"), [("mask2former_r50", "mask_dino_r50"), ("mask_dino_r50", "mask2former_r50")]
)
def test_a_file_of_the_other_family_is_refused_by_its_name(theirs, ours, file, model):
    with pytest.raises(CheckpointError, match=naming(str(identify(theirs[file])), "missing", "left over")):
        convert(theirs[file], ours[model])


def test_the_number_of_levels_is_told_by_the_names(theirs):
    three = state_of("mask_dino_R50_3scale_instance_50ep", "MODEL.DN_DETR.ENCODER.FFN_DIM", 2048)
    with pytest.raises(CheckpointError, match=naming("neck.projections.3.0.weight")):
        convert(theirs["mask_dino_r50"], three)


@pytest.mark.parametrize("case", CONFIGS)
def test_classes_are_carried_over_by_name(theirs, case):
    names = ["kind 7", "another", "kind 2"]
    model = state_of(CONFIGS[case], classes=3)
    conversion = convert(theirs[case], model, NAMES, names)
    assert conversion.new_classes == ["another"]
    whole = convert(theirs[case], state_of(CONFIGS[case])).state
    tables = ["decoder.heads.class_heads.0.weight", "decoder.heads.class_heads.0.bias"]
    if case == "mask_dino_r50":
        tables.append("query_source.label_encoder.embed.weight")
    else:
        kept = "decoder.heads.no_object_heads.0.weight"
        assert torch.equal(conversion.state[kept], whole[kept])
    for name in tables:
        assert torch.equal(conversion.state[name][[0, 2]], whole[name][[7, 2]])
        assert torch.equal(conversion.state[name][1], model[name][1])


def test_labels_are_left_out_where_nothing_is_denoised(theirs):
    model = state_of(CONFIGS["mask_dino_r50"], "MODEL.DN_DETR.DENOISING.NAME", "")
    conversion = convert(theirs["mask_dino_r50"], model)
    assert not any("label_encoder" in name for name in conversion.state)
    assert any("label embedding" in sentence for sentence in conversion.log)


def test_mask_dino_without_two_stages_has_contents_anchors_and_no_object():
    x = torch.randn(4, 8)
    state = {
        "decoder.norm.weight": x[0],
        "decoder_norm.weight": x[0],
        "class_embed.weight": x,
        "query_embed.weight": x[:, :4],
    }
    state = {PREDICTOR + name: value for name, value in (state | {"query_feat.weight": x + 1}).items()}
    heads = "decoder.heads."
    expected = {
        "decoder.norm.weight": x[0],
        heads + "class_heads.0.weight": x[:3],
        heads + "no_object_heads.0.weight": x[3:],
        "query_source.anchors.weight": x[:, :4],
        "query_source.content.weight": x + 1,
    }
    assert equal(convert(state, {name: torch.zeros_like(value) for name, value in expected.items()}).state, expected)


def test_files_of_detectron2s_form_are_read_without_running_them(theirs, tmp_path):
    few = {key: x.numpy() for key, x in theirs["mask2former_r50"].items() if "attention_layers.0" in key}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": few, "__author__": "third party"}))
    found = read_checkpoint(tmp_path / "model.pkl")
    assert str(identify(found.state)) == "Mask2Former (official)"
    assert found.state.keys() == few.keys()
