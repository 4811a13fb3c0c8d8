"""Checkpoints of others: their names, their classes, their files; nothing is lost and nothing is executed."""

import argparse
import os
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from golden.formula import load
from naming import naming
from ranks import run_program
from safetensors import safe_open

from dn_detr_d2 import CheckpointError, ConfigError, setup_cfg
from dn_detr_d2.checkpoint import (
    CheckpointFile,
    convert,
    identify,
    read_checkpoint,
    write_checkpoint,
)
from dn_detr_d2.checkpoint.classes import match_classes
from dn_detr_d2.checkpoint.convert import classes_in
from dn_detr_d2.coco import RAW_IDS, coco_names, raw_names
from dn_detr_d2.engine import Checkpointer
from dn_detr_d2.predictor import Predictor

NO_DATA = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]


def model_of(config, *overrides, classes=91):
    overrides = ["MODEL.DN_DETR.NUM_CLASSES", classes, *NO_DATA, *overrides]
    cfg = setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), overrides, splits=())
    return cfg, build_model(cfg)


@pytest.fixture(scope="module")
def official():
    """The authors' DN-DETR as a state dict of their names."""
    return {key: torch.from_numpy(x).float() for key, x in load("dn_detr_r50")[2].items()}


@pytest.fixture(scope="module")
def dn_detr():
    return model_of("dn_detr_R50_50ep")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("dn_detr_r50", "DN-DETR (official)"),
        ("dn_detr_r50_dc5_3pat", "DN-DETR (official)"),
        ("dab_deformable_detr_r50_dn", "DN-Deformable-DETR (official)"),
        ("dn_deformable_encoder_only", "DN-Deformable-DETR with a deformable encoder only (official)"),
        ("dino_4scale_r50", "DINO (official)"),
        ("dino_like_r50", "the DINO-like model of the DN-DETR repository (official)"),
    ],
)
def test_the_source_is_found_by_its_names(case, expected):
    assert str(identify(load(case)[2])) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["transformer.encoder_layers.0.x", "transformer.position.weight"], "Anchor DETR (official)"),
        (["query_embed.weight", "transformer.level_embed"], "Deformable-DETR (official)"),
        (["query_embed.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_weight"], "DETR (official)"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "ImageNet ResNet (torchvision)"),
    ],
)
def test_baselines_and_backbones_are_recognised(names, expected):
    assert str(identify(names)) == expected


def test_a_file_of_another_system_is_refused_by_its_name(dn_detr):
    with pytest.raises(CheckpointError, match=naming("Anchor DETR (official)")):
        convert({"transformer.encoder_layers.0.norm1.weight": torch.ones(2)}, dn_detr[1].state_dict())


def test_a_checkpoint_of_another_model_is_named_with_what_does_not_fit(official):
    _, model = model_of("dino_R50_4scale_12ep")
    with pytest.raises(
        CheckpointError, match=naming("DN-DETR (official)", "missing: ", "left over: ", "wrong shape: ")
    ):
        convert(official, model.state_dict())


@pytest.mark.parametrize("damage", ["missing", "left over", "wrong shape"])
def test_every_tensor_is_used_or_named(official, dn_detr, damage):
    state, key = dict(official), "transformer.decoder.norm.weight"
    if damage == "missing":
        del state[key]
    elif damage == "left over":
        state["transformer.decoder.norm2.weight"] = torch.ones(256)
    else:
        state[key] = torch.ones(255)
    with pytest.raises(CheckpointError, match=rf"{damage}: decoder\.norm"):
        convert(state, dn_detr[1].state_dict())


def test_raw_coco_ids_become_contiguous(official):
    _, model = model_of("dn_detr_R50_50ep", classes=80)
    state = convert(official, model.state_dict()).state
    ids = torch.tensor([1, 2, 3, 13, 90])  # person, bicycle, car, stop sign, toothbrush
    rows = torch.tensor([0, 1, 2, 11, 79])
    for ours, theirs in (("decoder.heads.class_heads.0.weight", "class_embed.weight"),
                         ("query_source.label_encoder.embed.weight", "label_enc.weight")):  # fmt: skip
        assert torch.equal(state[ours][rows], official[theirs][ids])
    assert torch.equal(
        state["query_source.label_encoder.embed.weight"][80], official["label_enc.weight"][91]
    )  # unknown
    model.load_state_dict(state)


def test_coco_has_eighty_ids_without_the_unused_eleven():
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert len(RAW_IDS) == len(coco_names()) == 80
    assert set(range(1, 91)) - set(RAW_IDS) == unused


def test_classes_are_carried_over_by_name():
    match = match_classes(3, 4, ["cat", "dog", "bird"], ["bird", "fish", "cat", "cow"])
    assert match.rows == [2, None, 0, None]
    assert match_classes(91, 2, [], ["toothbrush", "platelet"]).rows == [90, None]
    assert match_classes(3, 3, [], []).why == "kept"
    assert match_classes(3, 3, ["a", "b", "c"], ["c", "b", "a"]).rows == [2, 1, 0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_keeps_tensors_names_and_config(tmp_path, suffix):
    before = CheckpointFile({"a": torch.randn(3, 4), "b": torch.arange(3)}, ["cat", "dog"], "MODEL: {}\n")
    write_checkpoint(tmp_path / f"x{suffix}", before)
    after = read_checkpoint(tmp_path / f"x{suffix}")
    assert (after.class_names, after.config) == (before.class_names, before.config)
    assert all(torch.equal(after.state[name], x) for name, x in before.state.items())
    assert {path.name for path in tmp_path.iterdir()} == {f"x{suffix}", f"x{suffix}.sha256"}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(("suffix", "asked"), [(".pth", "posix.system"), (".pkl", "torch._utils._rebuild_tensor_v2")])
def test_a_hostile_file_is_refused_and_never_executed(tmp_path, monkeypatch, suffix, asked):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"hostile{suffix}"
    content = {"model": {"a": torch.ones(2)}, "args": Hostile()}
    if suffix == ".pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=naming(f"hostile{suffix}", asked)):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"this is not a checkpoint", b"\x80\x04\x95garbage"])
def test_what_is_not_a_checkpoint_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / name)


def test_a_truncated_file_is_one_sentence(tmp_path):
    torch.save({"model": {"a": torch.randn(1000)}}, tmp_path / "x.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"half\.pth"):
        read_checkpoint(tmp_path / "half.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {}}])
def test_a_file_without_tensors_is_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=naming("x.pth", "tensors")):
        read_checkpoint(tmp_path / "x.pth")


def authors_file(state, path):
    """As the official training writes it."""
    args = argparse.Namespace(lr=1e-4, output_dir="logs", dilation=False, nested=argparse.Namespace(a=[1, 2]))
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 49, "args": args}, path)


def test_authors_files_are_read_with_their_namespace(tmp_path, official):
    authors_file(official, tmp_path / "official.pth")
    assert read_checkpoint(tmp_path / "official.pth").state.keys() == official.keys()


def test_arrays_of_detectron2s_zoo_are_read(tmp_path):
    content = {
        "model": {"stem.conv1.weight": np.ones((2, 3), np.float32)},
        "__author__": "x",
        "matching_heuristics": True,
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    assert read_checkpoint(tmp_path / "R-50.pkl").state["stem.conv1.weight"].shape == (2, 3)


def test_an_official_file_goes_straight_into_the_default_predictor(tmp_path, official, caplog):
    authors_file(official, tmp_path / "official.pth")
    path = str(tmp_path / "official.pth")
    cfg, model = model_of("dn_detr_R50_50ep", "MODEL.WEIGHTS", path, "INPUT.MIN_SIZE_TEST", 64)
    with caplog.at_level("INFO", logger="dn_detr_d2"):
        predictor = DefaultPredictor(cfg)
    assert naming("DN-DETR (official)").search(caplog.text)
    expected = convert(official, model.state_dict()).state
    assert all(torch.equal(x, expected[name]) for name, x in predictor.model.state_dict().items() if name in expected)
    assert len(predictor(np.zeros((64, 64, 3), np.uint8))["instances"])


@pytest.mark.parametrize("kept", [True, False])
def test_an_official_file_says_its_number_of_classes_to_the_predictor(tmp_path, official, kept):
    """NUM_CLASSES is auto in the zoo. COCO's raw ids become contiguous, as when the file is converted."""
    if not kept:
        cut = {name: x[:7] for name, x in official.items() if "class_embed" in name}
        official = official | cut | {"label_enc.weight": official["label_enc.weight"][:8]}
    authors_file(official, tmp_path / "official.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "official.pth"), "INPUT.MIN_SIZE_TEST", 64, "MODEL.DEVICE", "cpu"]
    cfg = setup_cfg("dn_detr_R50_50ep", opts, splits=())
    assert cfg.MODEL.DN_DETR.NUM_CLASSES is None
    predictor = Predictor(cfg)
    node = predictor.cfg.MODEL.DN_DETR
    expected = (80, list(coco_names())) if kept else (7, [])
    assert (node.NUM_CLASSES, list(node.CLASS_NAMES)) == expected
    assert len(predictor(np.zeros((64, 64, 3), np.uint8))["instances"])


def test_weights_of_auto_that_are_missing_or_say_nothing_are_named(tmp_path):
    for weights, kind, named in (("", CheckpointError, "''"), ("gone.pth", CheckpointError, "'gone.pth'")):
        with pytest.raises(kind, match=naming("MODEL.WEIGHTS", named)):
            Predictor(setup_cfg("dn_detr_R50_50ep", ["MODEL.WEIGHTS", weights], splits=()))
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=naming("MODEL.DN_DETR.NUM_CLASSES", "x.pth")):
        Predictor(setup_cfg("dn_detr_R50_50ep", ["MODEL.WEIGHTS", str(tmp_path / "x.pth")], splits=()))


@pytest.mark.parametrize("name", ["dino_4scale_r50", "dab_deformable_detr_r50_dn"])
def test_classes_of_the_authors_files_are_counted(name):
    assert classes_in({key: torch.from_numpy(x) for key, x in load(name)[2].items()}) == 91


def test_the_last_row_of_detr_is_no_class():
    names = ["query_embed.weight", "transformer.decoder.layers.0.multihead_attn.in_proj_weight", "class_embed.weight"]
    assert classes_in({f"module.{name}": torch.ones(92, 4) for name in names}) == 91


def test_a_training_starts_from_the_backbone_of_torchvision(tmp_path):
    import torchvision

    resnet = torchvision.models.resnet50()
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    cfg, model = model_of("dn_detr_R50_12ep")
    Checkpointer(model.train(), cfg=cfg, new_classes=True).load(str(tmp_path / "resnet50.pth"), checkpointables=[])
    assert torch.equal(model.backbone.res3[0].shortcut.weight, resnet.layer2[0].downsample[0].weight)
    x = torch.randn(1, 3, 64, 64)
    resnet.eval()
    with torch.no_grad():
        ours = model.backbone(x)["res5"]
        theirs = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(
            resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))))))  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [50, 101])
def test_dilation_is_that_of_torchvision(depth):
    import torchvision

    resnet = getattr(torchvision.models, f"resnet{depth}")(replace_stride_with_dilation=[False, False, True]).eval()
    _, model = model_of(f"dn_detr_DC5-R{depth}_12ep")
    from dn_detr_d2.checkpoint.names import TORCHVISION, apply

    state = {apply(TORCHVISION, k): v for k, v in resnet.state_dict().items() if not k.startswith("fc")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    model.backbone.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x)["res5"], body(x), atol=1e-3, rtol=1e-3)


def test_fine_tuning_carries_classes_over_by_name_and_evaluation_refuses(tmp_path, official, caplog):
    authors_file(official, tmp_path / "official.pth")
    cfg, model = model_of("dn_detr_R50_12ep", classes=3)
    cfg.MODEL.DN_DETR.CLASS_NAMES = ["toothbrush", "platelet", "person"]
    before = model.decoder.heads.class_heads[0].weight.detach().clone()
    with caplog.at_level("INFO", logger="dn_detr_d2"):
        Checkpointer(model.train(), cfg=cfg, new_classes=True).load(str(tmp_path / "official.pth"), checkpointables=[])
    after = model.decoder.heads.class_heads[0].weight
    assert torch.equal(after[[0, 2]], official["class_embed.weight"][[90, 1]])
    assert torch.equal(after[1], before[1])
    labels = model.query_source.label_encoder.embed.weight
    assert torch.equal(labels[[0, 2, 3]], official["label_enc.weight"][[90, 1, 91]])
    assert any(naming("classes", 2, 1).search(text) for text in caplog.messages)
    with pytest.raises(CheckpointError, match=naming(1, "platelet")) as error:
        Checkpointer(model.eval(), cfg=cfg).load(str(tmp_path / "official.pth"))
    assert "\n" not in str(error.value)  # train_net.py shows one sentence


def detrex_names(official):
    """The authors' DN-DETR under detrex's names, written from the table of the specification; 80 classes."""
    import re

    ids = torch.tensor(RAW_IDS)
    state = {}
    for key, tensor in official.items():
        if key.startswith("transformer.decoder.bbox_embed"):
            continue
        if key.startswith("class_embed"):
            tensor = tensor[ids]
        if key.startswith("label_enc"):
            tensor = tensor[torch.cat([ids, torch.tensor([91])])]
        name = key
        for pattern, new in [
            (r"^backbone\.0\.body\.", "backbone."), (r"layer([1-4])\.", lambda m: f"res{int(m[1]) + 1}."),
            (r"\.bn(\d)", r".conv\1.norm"), (r"^backbone\.conv1", "backbone.stem.conv1"),
            (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
            (r"(encoder\.layers\.\d)\.self_attn", r"\1.attentions.0.attn"),
            (r"(decoder\.layers\.\d)\.self_attn", r"\1.attentions.0"),
            (r"(decoder\.layers\.\d)\.cross_attn", r"\1.attentions.1"),
            (r"^(transformer.*)\.norm(\d)\.(weight|bias)$", lambda m: f"{m[1]}.norms.{int(m[2]) - 1}.{m[3]}"),
            (r"linear1", "ffns.0.layers.0.0"), (r"linear2", "ffns.0.layers.1"),
            (r"sa_(q|k)content", lambda m: f"attentions.0.{'query' if m[1] == 'q' else 'key'}_content"),
            (r"sa_(q|k)pos", lambda m: f"attentions.0.{'query' if m[1] == 'q' else 'key'}_pos"),
            (r"sa_v_proj", "attentions.0.value_proj"), (r"ca_v_proj", "attentions.1.value_proj"),
            (r"ca_qpos_sine", "attentions.1.query_pos_sine"),
            (r"ca_(q|k)content", lambda m: f"attentions.1.{'query' if m[1] == 'q' else 'key'}_content"),
            (r"ca_(q|k)pos", lambda m: f"attentions.1.{'query' if m[1] == 'q' else 'key'}_pos"),
            (r"decoder\.norm\.", "decoder.post_norm_layer."), (r"^refpoint_embed", "anchor_box_embed"),
            (r"^label_enc", "denoising_generator.label_encoder"),
        ]:  # fmt: skip
            name = re.sub(pattern, new, name)
        if "activation" in name:
            state[name.replace("activation", "ffns.0.layers.0.1")] = tensor
            name = name.replace("activation", "ffns.0.activation")
        state[name] = tensor
    return state


def test_detrex_gives_the_same_weights_as_the_official_file(official):
    _, model = model_of("dn_detr_R50_50ep", classes=80)
    theirs = convert(detrex_names(official), model.state_dict())
    assert str(theirs.source) == "DN-DETR (detrex)"
    ours = convert(official, model.state_dict()).state
    assert theirs.state.keys() == ours.keys()
    assert all(torch.equal(theirs.state[name], x) for name, x in ours.items())


def official_detr(model):
    """(DETR under the authors' names, the same under detrex's), 91 and 80 classes with "no object" last; spec section 6."""
    import re

    ids = torch.tensor([*RAW_IDS, 91])
    theirs, detrex = {}, {}
    for name, x in model.state_dict().items():
        side = "decoder" if name.startswith("decoder") else "encoder"
        if "no_object" in name:
            continue
        tensor = torch.randn_like(x)
        if "class_heads" in name:
            tensor = torch.randn(92, *x.shape[1:])
        shared = [
            (r"^query_source\.queries", "query_embed"), (r"^neck\.projections\.0\.0", "input_proj"),
            (r"^decoder\.heads\.class_heads\.0", "class_embed"), (r"^decoder\.heads\.box_heads\.0", "bbox_embed"),
            (r"^(en|de)coder\.", r"transformer.\1coder."), (r"in_proj\.", "in_proj_"),
        ]  # fmt: skip
        last = "norm3" if side == "decoder" else "norm2"
        official = [
            *shared, (r"self_attn\.norm", "norm1"), (r"cross_attn\.norm", "norm2"), (r"ffn\.norm", last),
            (r"cross_attn", "multihead_attn"), (r"ffn\.linear", "linear"),
        ]  # fmt: skip
        other = [
            *shared, (r"self_attn\.norm", "norms.0"), (r"cross_attn\.norm", "norms.1"),
            (r"ffn\.norm", "norms.2" if side == "decoder" else "norms.1"), (r"self_attn\.", "attentions.0.attn."),
            (r"cross_attn\.", "attentions.1.attn."), (r"ffn\.linear1", "ffns.0.layers.0.0"),
            (r"ffn\.linear2", "ffns.0.layers.1"), (r"decoder\.norm\.", "decoder.post_norm_layer."),
        ]  # fmt: skip
        if name.startswith("backbone."):
            official = other = []
        for table, state in ((official, theirs), (other, detrex)):
            key = name
            for pattern, new in table:
                key = re.sub(pattern, new, key)
            state[key] = tensor[ids] if state is detrex and "class_heads" in name else tensor
    return theirs, {**detrex, "criterion.empty_weight": torch.ones(81)}


def test_detr_files_of_both_codes_give_the_same_weights_with_no_object_last():
    _, model = model_of("detr_R50_500ep", classes=80)
    official, detrex = official_detr(model)
    ours, theirs = (convert(state, model.state_dict()) for state in (official, detrex))
    assert (str(ours.source), str(theirs.source)) == ("DETR (official)", "DETR (detrex)")
    assert ours.state.keys() == theirs.state.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs.state[name], x) for name, x in ours.state.items())
    assert torch.equal(ours.state["decoder.heads.no_object_heads.0.weight"][0], official["class_embed.weight"][91])
    assert torch.equal(ours.state["decoder.heads.class_heads.0.weight"][79], official["class_embed.weight"][90])


def run_tool(*arguments):
    return run_program(ROOT / "tools" / "convert_checkpoint.py", *arguments)


@pytest.mark.parametrize("name", ["ours.pth", "ours.safetensors"])
def test_the_tool_writes_what_the_model_loads(tmp_path, official, name):
    authors_file(official, tmp_path / "official.pth")
    config = ROOT / "configs" / "dn_detr_R50_50ep.yaml"
    ran = run_tool(tmp_path / "official.pth", tmp_path / name, "--config-file", config, "MODEL.DN_DETR.NUM_CLASSES", 91)
    assert ran.returncode == 0, ran.stderr
    cfg, model = model_of("dn_detr_R50_50ep")
    Checkpointer(model.eval(), cfg=cfg).load(str(tmp_path / name))
    assert torch.equal(model.decoder.heads.class_heads[0].weight, official["class_embed.weight"])
    assert naming(name, "DN-DETR (official)").search(ran.stdout)


def test_the_tool_writes_nothing_when_it_refuses(tmp_path, official):
    authors_file(official, tmp_path / "official.pth")
    config = ROOT / "configs" / "dino_R50_4scale_12ep.yaml"
    ran = run_tool(tmp_path / "official.pth", tmp_path / "out.pth", "--config-file", config)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert naming("DN-DETR (official)").search(ran.stderr)
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
    config = config.with_name("dn_detr_R50_50ep.yaml")
    ran = run_tool(tmp_path / "official.pth", tmp_path / "out.pth", "--config-file", config, "--classes", 7)
    assert ran.returncode == 2
    assert naming("7 of the 7").search(ran.stderr)


@pytest.mark.parametrize("state", ["R-50 for R-101", "a single tensor"])
def test_half_a_backbone_is_refused(tmp_path, state):
    import torchvision

    weights = {f"backbone.{k}": v for k, v in {"stem.conv1.weight": torch.zeros(64, 3, 7, 7)}.items()}
    if state == "R-50 for R-101":
        weights = torchvision.models.resnet50().state_dict()
    torch.save(weights, tmp_path / "x.pth")
    cfg, model = model_of("dn_detr_R101_12ep")
    with pytest.raises(CheckpointError, match=r"missing: backbone\."):
        Checkpointer(model.train(), cfg=cfg, new_classes=True).load(str(tmp_path / "x.pth"), checkpointables=[])


def test_names_and_rows_must_agree(official):
    _, model = model_of("dn_detr_R50_50ep")
    with pytest.raises(CheckpointError, match=naming("checkpoint", 91, 80)):
        convert(official, model.state_dict(), coco_names())
    with pytest.raises(CheckpointError, match=naming("model", 91, 2)):
        convert(official, model.state_dict(), [], ["a", "b"])


def test_as_many_other_classes_are_not_taken_for_the_same():
    assert match_classes(91, 91, [], [f"q{i}" for i in range(91)]).why == "new"
    assert match_classes(91, 91, [], list(raw_names())).why == "kept"


def test_a_missing_first_head_is_named_as_missing():
    state = {k: torch.from_numpy(x).float() for k, x in load("dino_4scale_r50")[2].items()}
    state = {k: x for k, x in state.items() if "class_embed.0.weight" not in k}
    _, model = model_of("dino_R50_4scale_12ep", "MODEL.DN_DETR.NUM_QUERIES", 300)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.heads\.class_heads\.0\.weight"):
        convert(state, model.state_dict())


@pytest.mark.parametrize("names", [5, {"a": 1}, [1, 2]])
def test_class_names_that_are_none_are_refused(tmp_path, names):
    torch.save({"model": {"a": torch.ones(1)}, "class_names": names}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=naming("x.pth", "class names")):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_random_damage_never_ends_in_another_error(tmp_path, suffix):
    """300 files with bytes changed at random: read as they are, or refused in a sentence."""
    good = tmp_path / f"good{suffix}"
    if suffix == ".pkl":
        good.write_bytes(pickle.dumps({"model": {"a": np.ones((2, 3), np.float32)}, "x": [1, "b"]}))
    elif suffix == ".pth":
        torch.save({"model": {"a": torch.ones(2, 3)}, "class_names": ["b"]}, good)
    else:
        write_checkpoint(good, CheckpointFile({"a": torch.ones(2, 3)}, ["b"]))
    content, stream = good.read_bytes(), np.random.RandomState(0)
    for i in range(300):
        damaged = bytearray(content)
        for place in stream.randint(0, len(content), 1 + i % 5):
            damaged[place] = stream.randint(256)
        (tmp_path / f"x{suffix}").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / f"x{suffix}")
        except CheckpointError as error:
            assert f"x{suffix}" in str(error)  # noqa: PT017


def test_a_damaged_checkpoint_to_resume_from_is_named(tmp_path):
    (tmp_path / "model_0.pth").write_bytes(b"garbage")
    (tmp_path / "last_checkpoint").write_text("model_0.pth")
    cfg, model = model_of("dn_detr_R50_12ep")
    with pytest.raises(CheckpointError, match=naming("model_0.pth")):
        Checkpointer(model.train(), str(tmp_path), cfg=cfg, new_classes=True).resume_or_load("", resume=True)


def test_the_tool_keeps_the_classes_of_a_finished_training(tmp_path):
    cfg, model = model_of("quickstart", classes=3)
    cfg.MODEL.DN_DETR.CLASS_NAMES = ["a", "b", "c"]
    Checkpointer(model, str(tmp_path), cfg=cfg).save("model_final")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    ran = run_tool(tmp_path / "model_final.pth", tmp_path / "x.safetensors", "--config-file", tmp_path / "config.yaml")
    assert ran.returncode == 0, ran.stderr
    written = read_checkpoint(tmp_path / "x.safetensors")
    assert written.class_names == ["a", "b", "c"]
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in written.state.items())


def test_the_flag_writes_safetensors_whatever_the_target_ends_in(tmp_path):
    cfg, model = model_of("quickstart", classes=3)
    Checkpointer(model, str(tmp_path), cfg=cfg).save("model_final")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    line = [
        tmp_path / "model_final.pth",
        tmp_path / "x.pth",
        "--safetensors",
        "--config-file",
        tmp_path / "config.yaml",
    ]
    ran = run_tool(*line)
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "x.pth").exists()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_a_pyramid_starts_from_the_body_of_imagenet(tmp_path):
    import torchvision

    resnet = torchvision.models.resnet50().state_dict()
    torch.save(resnet, tmp_path / "x.pth")
    fpn = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DN_DETR.IN_FEATURES", ["p3", "p4", "p5"]]
    fpn += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    cfg, model = model_of("dn_dab_deformable", *fpn)
    Checkpointer(model.train(), cfg=cfg, new_classes=True).load(str(tmp_path / "x.pth"), checkpointables=[])
    assert torch.equal(model.backbone.bottom_up.res5[2].conv3.weight, resnet["layer4.2.conv3.weight"])


def detrex_deformable_names(official, dino):
    """The authors' DN-Deformable-DETR or DINO under detrex's names (spec section 6.3); 80 classes."""
    import re

    ids, state = torch.tensor(RAW_IDS), {}
    rules = [
        (r"^backbone\.0\.body\.", "backbone."), (r"layer([1-4])\.", lambda m: f"res{int(m[1]) + 1}."),
        (r"^(backbone.*)\.bn(\d)", r"\1.conv\2.norm"), (r"^backbone\.conv1", "backbone.stem.conv1"),
        (r"^backbone\.bn1", "backbone.stem.conv1.norm"),
        (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
        (r"(encoder\.layers\.\d)\.self_attn", r"\1.attentions.0"),
        (r"(decoder\.layers\.\d)\.self_attn", r"\1.attentions.0.attn"),
        (r"(decoder\.layers\.\d)\.cross_attn", r"\1.attentions.1"),
        (r"(encoder\.layers\.\d)\.norm(\d)", lambda m: f"{m[1]}.norms.{int(m[2]) - 1}"),
        (r"(decoder\.layers\.\d)\.norm([123])", lambda m: f"{m[1]}.norms.{ {'1': 1, '2': 0, '3': 2}[m[2]]}"),
        (r"linear1", "ffns.0.layers.0.0"), (r"linear2", "ffns.0.layers.1"),
        (r"transformer\.level_embed", "transformer.level_embeds"),
        (r"^input_proj\.([012])\.0", r"neck.convs.\1.conv"), (r"^input_proj\.([012])\.1", r"neck.convs.\1.norm"),
        (r"^input_proj\.3\.0", "neck.extra_convs.0.conv"), (r"^input_proj\.3\.1", "neck.extra_convs.0.norm"),
        (r"transformer\.enc_out_(class|bbox)_embed", r"\1_embed.6"),
        (r"^label_enc", "label_enc" if dino else "denoising_generator.label_encoder"),
    ]  # fmt: skip
    for key, tensor in official.items():
        if re.search(r"class_embed", key):
            tensor = tensor[ids]
        if key.startswith("label_enc"):
            tensor = tensor[ids if dino else torch.cat([ids, torch.tensor([91])])]
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        state[key] = tensor
        if dino and re.match(r"(class|bbox)_embed\.6", key):
            state["transformer.decoder." + key] = tensor
    return state


@pytest.mark.parametrize(("case", "config", "system"), [
    ("dab_deformable_detr_r50_dn", "dn_dab_deformable", "DN-Deformable-DETR"),
    ("dino_4scale_r50", "dino_R50_4scale_12ep", "DINO"),
])  # fmt: skip
def test_detrex_deformable_files_equal_the_official_ones(case, config, system):
    files = {k: torch.from_numpy(x).float() for k, x in load(case)[2].items()}
    _, model = model_of(config, "MODEL.DN_DETR.NUM_QUERIES", 300, classes=80)
    theirs = convert(detrex_deformable_names(files, system == "DINO"), model.state_dict())
    assert str(theirs.source) == f"{system} (detrex)"
    ours = convert(files, model.state_dict()).state
    assert theirs.state.keys() == ours.keys()
    for name, x in ours.items():
        rows = len(x) - 1 if system == "DINO" and "label_encoder" in name else None  # its detrex file has no "unknown"
        assert torch.equal(theirs.state[name][:rows] if x.dim() else theirs.state[name], x[:rows] if x.dim() else x), (
            name
        )


def test_a_safetensors_file_of_the_same_model_is_the_same_file(tmp_path):
    """The package safetensors writes several metadata in an order that changes by chance."""
    state = {name: torch.full((i + 1,), float(i)) for i, name in enumerate(["b", "a", "é"])}
    for i in range(8):
        write_checkpoint(tmp_path / f"{i}.safetensors", CheckpointFile(state, ["dög", '"x"'], "A: 1"))
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in state} == {x: y.tolist() for x, y in state.items()}
    assert read_checkpoint(tmp_path / "0.safetensors").class_names == ["dög", '"x"']


SWIN = ["MODEL.SWIN.SIZE", "T", "MODEL.SWIN.DROP_PATH_RATE", 0.0]


def test_a_training_starts_from_a_classifier_of_the_swin_repository():
    """Its names have no prefix; it has a head and a norm before it, and no norms of the maps."""
    _, model = model_of("mask2former_SwinT_instance_50ep", *SWIN)
    own = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in model.state_dict().items()}
    body = {name: x for name, x in own.items() if re.match(r"backbone\.(patch_embed|layers)\.", name)}
    file = {name.removeprefix("backbone."): x for name, x in body.items()}
    extra = {"norm.weight": torch.ones(768), "norm.bias": torch.ones(768), "head.weight": torch.ones(9, 768)}
    conversion = convert(file | extra, model.state_dict())
    assert conversion.state.keys() == body.keys()
    assert all(torch.equal(conversion.state[name], x) for name, x in body.items())
    assert str(conversion.source).startswith("ImageNet network")
    lacking = {name: x for name, x in file.items() if not name.startswith("layers.3.")}
    with pytest.raises(CheckpointError, match=naming("missing: ", "Swin")):
        convert(lacking, model.state_dict())
    wider = {name: torch.ones(*(2 * n for n in x.shape)) for name, x in file.items()}
    with pytest.raises(CheckpointError, match=naming("wrong shape: ", "Swin")):
        convert(wider, model.state_dict())
