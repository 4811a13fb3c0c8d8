"""The costs that tools/analyze_model.py prints, against the papers and against a count by hand."""

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from naming import naming
from ranks import run_program

from dn_detr_d2 import setup_cfg
from dn_detr_d2.diagnostics.model_analysis import analyze
from tools import analyze_model


def cfg_of(config, *overrides):
    no_data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu", "MODEL.DN_DETR.NUM_CLASSES", 91]
    return setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*no_data, *overrides], splits=())


@pytest.mark.parametrize(
    ("config", "parameters", "gflops"),
    [
        ("dn_detr_R50_50ep", 43_694_977, 94),
        pytest.param("dn_detr_R101_50ep", 62_634_881, 174, marks=pytest.mark.long),
        pytest.param("dn_detr_DC5-R50_50ep", 43_694_977, 202, marks=pytest.mark.long),
        pytest.param("dn_detr_DC5-R101_50ep", 62_634_881, 282, marks=pytest.mark.long),
        pytest.param("dn_deformable_detr_encoder_only_R50_50ep", 48_488_589, 195, marks=pytest.mark.long),
    ],
)
def test_parameters_and_gflops_of_the_papers(config, parameters, gflops):
    total = analyze(cfg_of(config), 800, 1333)["total"]
    assert total["parameters"] == parameters
    assert round(total["paper_gflops"]) == gflops
    assert total["gflops"] > total["paper_gflops"]


def test_a_backbone_that_needs_whole_cells_is_measured_on_them():
    """What the model sees of an image of 100 x 97: patches of 32 pixels."""
    swin = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "swin_tiny_patch4_window7_224"]
    found = [analyze(cfg_of("dn_dab_deformable", *swin), *size)["total"] for size in ((100, 97), (128, 128))]
    assert found[0] == found[1]


# Spec section 5.6; the published state dicts have the same numbers.
@pytest.mark.parametrize(
    ("config", "overrides", "parameters"),
    [
        ("dn_detr_R50_50ep", [], 43_694_977),
        ("dn_detr_R50_50ep", ["MODEL.DN_DETR.QUERY_SOURCE.NUM_PATTERNS", 3], 43_695_745),
        ("dn_detr_R101_50ep", [], 62_634_881),
        ("dn_detr_DC5-R50_50ep", [], 43_694_977),
        ("dn_detr_DC5-R101_50ep", [], 62_634_881),
        ("dn_dab_deformable", [], 47_429_154),
        ("dn_deformable_detr_encoder_only_R50_50ep", [], 48_488_589),
        ("dn_deformable_detr_encoder_only_R101_12ep", [], 67_428_493),
        ("dino_R50_4scale_12ep", [], 46_893_182),
        ("dino_R50_5scale_12ep", [], 47_255_806),
        ("dab_detr_R50_50ep", [], 43_671_517),
        ("dab_detr_R101_50ep", [], 62_611_421),
        ("dab_deformable_detr_R50_50ep", [], 47_405_994),
        ("deformable_detr_R50_50ep", [], 40_069_665),
        ("deformable_detr_refine_R50_50ep", [], 40_849_660),
        ("deformable_detr_two_stage_R50_50ep", [], 41_181_529),
        ("mask2former_R50_instance_50ep", ["MODEL.DN_DETR.NUM_CLASSES", 80], 43_970_257),
        ("mask2former_R50_panoptic_50ep", ["MODEL.DN_DETR.NUM_CLASSES", 133], 43_983_878),
        ("mask_dino_R50_instance_50ep", ["MODEL.DN_DETR.NUM_CLASSES", 80], 52_058_004),
    ],
)
def test_parameters_of_the_published_models(config, overrides, parameters):
    """On the device that has shapes and no numbers."""
    cfg = cfg_of(config, *overrides)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_multiply_adds_by_hand():
    """The neck of DN-DETR at 64 x 96: a 1 x 1 convolution of 2048 to 256 channels on 2 x 3 cells."""
    small = ["MODEL.DN_DETR.ENCODER.NUM_LAYERS", 1, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 1]
    table = analyze(cfg_of("dn_detr_R50_50ep", *small), 64, 96)
    assert table["neck"]["gflops"] * 1e9 == pytest.approx(2048 * 256 * 6 + 6)  # and the padding mask, shrunk to 6 cells
    cells, c, ffn, heads = 6, 256, 2048, 8
    linear = cells * (4 * c * c + 2 * c * ffn) + cells * 2 * c * c  # attention and feed-forward; position scale
    products = 2 * cells * cells * c
    norms = 2 * 5 * cells * c  # fvcore counts five operations an element
    assert table["encoder"]["gflops"] * 1e9 == pytest.approx(linear + products + norms)
    assert table["encoder"]["paper_gflops"] * 1e9 == pytest.approx(products + norms + 7 * heads * cells * cells)


def test_deformable_attention_is_counted():
    small = ["MODEL.DN_DETR.ENCODER.NUM_LAYERS", 1, "MODEL.DN_DETR.DECODER.NUM_LAYERS", 1]
    table = analyze(cfg_of("dn_dab_deformable", *small), 64, 96)
    cells = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    sampled = cells * 8 * 16 * 32 * 5
    linear = cells * (2 * 256 * 256 + 256 * (256 + 128) + 2 * 256 * 2048)
    assert table["encoder"]["gflops"] * 1e9 == pytest.approx(linear + sampled + 2 * 5 * cells * 256)


def test_classes_of_the_file_count(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(
        f"_BASE_: {ROOT}/configs/quickstart.yaml\nMODEL: {{DN_DETR: {{NUM_CLASSES: 3}}}}\n"
    )
    analyze_model.report(
        analyze_model.parse_arguments(["--config-file", str(tmp_path / "own.yaml"), "--size", "64", "64"])
    )
    assert "3 classes" in capsys.readouterr().out


def test_command_line():
    command = [ROOT / "tools" / "analyze_model.py", "--config-file", ROOT / "configs" / "quickstart.yaml", "--size"]
    ran = run_program(*command, "64", "64", "--memory", "MODEL.DN_DETR.NUM_CLASSES", "3")
    assert ran.returncode == 0, ran.stderr
    assert "| total " in ran.stdout
    assert "3 classes" in ran.stdout
    assert "MiB" in ran.stdout
    ran = run_program(*command, "64", "64")
    assert "91 classes" in ran.stdout  # quickstart.yaml leaves them open
    ran = run_program(*command, "8", "8")
    assert ran.returncode == 2
    assert naming("error: ", "--size", "32 32", "8 8").search(ran.stderr.splitlines()[-1])
