"""Evaluation outputs of every system against numbers of the authors' codes: spec section 9, another recipe than golden/.

Weights, images and sizes come from names; the numbers were recorded from the published codes with 91 classes.
"""

import json
import re
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from golden.formula import FOLDER

from dn_detr_d2 import setup_cfg
from dn_detr_d2.checkpoint import convert

SIZES = [(96, 128), (128, 80)]
PLAIN = ("refpoint_embed", "tgt_embed", "label_enc", "level_embed", "patterns")


def value(key, shape):
    """The recipe's tensor for one name of the official codes."""
    n = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last in ("running_var", "running_mean"):
        n = np.full(shape, float(last == "running_var"))
    elif key.endswith("activation.weight"):
        n = np.full(shape, 0.25)
    elif any(name in key for name in PLAIN):
        pass
    elif len(shape) == 1:
        n = 0.1 * n + (0 if last != "weight" else 0.5 if key.startswith("backbone") else 1)
    else:
        n = n * (2**0.5 if key.startswith("backbone") else 1) / np.prod(shape[1:]) ** 0.5
        n = n * (0.5 if "sampling_offsets" in key else 1)
    return torch.from_numpy(n.astype(np.float32))


def official_shapes(case):
    meta = json.loads((FOLDER / f"{case}.json").read_text())
    return {k: tuple(v) for k, v in meta["params"].items() if not k.endswith("num_batches_tracked")}


def resize(shapes, queries, anchors=("refpoint_embed.weight", "tgt_embed.weight", "transformer.tgt_embed.weight")):
    return {k: (queries, *v[1:]) if k in anchors else v for k, v in shapes.items()}


def single_scale(labels, patterns, queries=300):
    shapes = resize(official_shapes("dn_detr_r50"), queries)
    if not labels:
        del shapes["label_enc.weight"]
    if patterns:
        shapes["transformer.patterns.weight"] = (patterns, 256)
    return shapes


def dab_deformable():
    shapes = official_shapes("dab_deformable_detr_r50_dn")
    del shapes["label_enc.weight"]
    return {**shapes, "tgt_embed.weight": (300, 256)}


def dino(levels):
    shapes = resize(official_shapes("dino_4scale_r50"), 60)
    if levels == 5:  # one map more in front, so that projections move by one
        moved = {re.sub(r"input_proj\.(\d)", lambda m: f"input_proj.{int(m[1]) + 1}", k): v for k, v in shapes.items()}
        shapes = {**moved, "input_proj.0.0.weight": (256, 256, 1, 1), "transformer.level_embed": (5, 256)}
        shapes |= {f"input_proj.0.{name}": (256,) for name in ("0.bias", "1.weight", "1.bias")}
        for k, v in shapes.items():
            if "sampling_offsets" in k or "attention_weights" in k:
                shapes[k] = (v[0] * 5 // 4, *v[1:])
    return shapes


def deformable(kind):
    shapes = dab_deformable()
    gone = ("tgt_embed", "refpoint_embed", "transformer.decoder.query_scale", "transformer.decoder.ref_point_head")
    shapes = {k: v for k, v in shapes.items() if not k.startswith(gone)}
    for k, v in shapes.items():
        if re.search(r"linear[12]\.", k):
            shapes[k] = tuple(1024 if x == 2048 else x for x in v)
    if kind == "two stage":
        heads = {k: v for k, v in shapes.items() if re.match(r"(class|bbox)_embed\.5\.", k)}
        shapes |= {k.replace("embed.5.", "embed.6."): v for k, v in heads.items()}
        for name, width in (("enc_output", 256), ("enc_output_norm", 256), ("pos_trans", 512), ("pos_trans_norm", 512)):
            weight = (width,) if "norm" in name else (width, width)
            shapes |= {f"transformer.{name}.weight": weight, f"transformer.{name}.bias": (width,)}
    else:
        shapes |= {"query_embed.weight": (300, 512), "transformer.reference_points.weight": (2, 256)}
        shapes["transformer.reference_points.bias"] = (2,)
    return shapes


def backbone():
    return {k: v for k, v in official_shapes("dn_detr_r50").items() if k.startswith("backbone.")}


def linear(name, rows, columns=256):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name):
    return {f"{name}.weight": (256,), f"{name}.bias": (256,)}


def attention(name, parts=3):
    joined = {f"{name}.in_proj_weight": (parts * 256, 256), f"{name}.in_proj_bias": (parts * 256,)}
    return joined | linear(f"{name}.out_proj", 256)


def detr():
    shapes = backbone() | {
        "query_embed.weight": (100, 256),
        "input_proj.weight": (256, 2048, 1, 1),
        "input_proj.bias": (256,),
    }
    shapes |= norm("transformer.decoder.norm") | linear("class_embed", 92)
    for i, rows in enumerate((256, 256, 4)):
        shapes |= linear(f"bbox_embed.layers.{i}", rows)
    for side, i in ((side, i) for side in ("encoder", "decoder") for i in range(6)):
        layer = f"transformer.{side}.layers.{i}"
        shapes |= attention(f"{layer}.self_attn") | norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        shapes |= linear(f"{layer}.linear1", 2048) | linear(f"{layer}.linear2", 256, 2048)
        if side == "decoder":
            shapes |= attention(f"{layer}.multihead_attn") | norm(f"{layer}.norm3")
    return shapes


def anchor_detr():
    shapes = (
        {k.replace("backbone.0.", "backbone."): v for k, v in backbone().items()}
        | norm("input_proj.0.1")
        | {"input_proj.0.0.weight": (256, 2048, 1, 1)}
    )
    shapes |= {"input_proj.0.0.bias": (256,), "transformer.pattern.weight": (3, 256)}
    shapes |= {"transformer.position.weight": (300, 2)}
    for name in ("adapt_pos1d.0", "adapt_pos1d.2", "adapt_pos2d.0", "adapt_pos2d.2"):
        shapes |= linear(f"transformer.{name}", 256)
    for i in range(6):
        encoder, decoder = f"transformer.encoder_layers.{i}", f"transformer.decoder_layers.{i}"
        shapes |= attention(f"{encoder}.self_attn", 5) | attention(f"{decoder}.cross_attn", 5)
        shapes |= (
            attention(f"{decoder}.self_attn") | norm(f"{decoder}.norm2") | linear(f"transformer.class_embed.{i}", 91)
        )
        for layer in (encoder, decoder):
            shapes |= norm(f"{layer}.norm1") | norm(f"{layer}.ffn.norm2") | linear(f"{layer}.ffn.linear1", 1024)
            shapes |= linear(f"{layer}.ffn.linear2", 256, 1024)
        for j, rows in enumerate((256, 256, 4)):
            shapes |= linear(f"transformer.bbox_embed.{i}.layers.{j}", rows)
    return shapes


def encoder_only():
    return resize(official_shapes("dn_deformable_encoder_only"), 300)


SIXTY = ["MODEL.DN_DETR.NUM_QUERIES", 60]
PATTERNS = ["MODEL.DN_DETR.QUERY_SOURCE.NUM_PATTERNS", 3]
# (config, overrides, official names, index of the heads that hold the values of tied ones,
#  mean and deviation of the logits, logits[0, 0, :4], boxes[0, 0], boxes[1, -1])
CASES = {
    "DN-DETR": (
        "dn_detr_R50_50ep",
        [],
        single_scale(True, 0),
        None,
        (0.05749, 1.03813),
        (0.60706, -0.07278, -0.73328, 1.59672),
        (0.06584, 0.90343, 0.10569, 0.89496),
        (0.01446, 0.6184, 0.01639, 0.89961),
    ),
    "DN-DETR, 3 patterns": (
        "dn_detr_R50_50ep",
        PATTERNS,
        single_scale(True, 3),
        None,
        (0.06576, 1.03807),
        (0.61995, 0.01515, -0.64933, 1.61482),
        (0.10895, 0.8905, 0.2109, 0.9209),
        (0.02915, 0.68267, 0.02242, 0.93739),
    ),
    "DN-DETR DC5": (
        "dn_detr_DC5-R50_50ep",
        [],
        single_scale(True, 0),
        None,
        (0.05321, 1.03448),
        (0.60617, -0.08618, -0.74162, 1.64894),
        (0.06631, 0.89567, 0.10482, 0.89894),
        (0.01463, 0.61079, 0.0167, 0.89748),
    ),
    "DAB-DETR": (
        "dab_detr_R50_50ep",
        [],
        single_scale(False, 0),
        None,
        (0.03639, 1.0516),
        (0.4588, -0.16951, -0.82456, 1.64197),
        (0.04913, 0.93754, 0.04498, 0.87199),
        (0.01062, 0.71599, 0.00664, 0.87759),
    ),
    "DAB-DETR, 3 patterns": (
        "dab_detr_R50_50ep",
        PATTERNS,
        single_scale(False, 3),
        None,
        (0.06429, 1.0493),
        (0.55586, 0.01042, -0.6024, 1.66765),
        (0.11079, 0.93283, 0.2138, 0.91076),
        None,
    ),
    "DN-Deformable-DETR": (
        "dn_dab_deformable",
        [],
        official_shapes("dab_deformable_detr_r50_dn"),
        None,
        (-0.16241, 0.91489),
        (-0.13354, 0.75096, 0.47675, 0.97501),
        (0.68468, 0.53245, 0.65864, 0.2616),
        (0.26832, 0.25315, 0.1588, 0.39212),
    ),
    "DAB-Deformable-DETR": (
        "dab_deformable_detr_R50_50ep",
        [],
        dab_deformable(),
        None,
        (-0.16927, 0.91516),
        (-0.12239, 0.74155, 0.48061, 0.96338),
        (0.6994, 0.52761, 0.65852, 0.27207),
        (0.35715, 0.31198, 0.06511, 0.45815),
    ),
    "encoder only": (
        "dn_deformable_detr_encoder_only_R50_50ep",
        [],
        encoder_only(),
        None,
        (0.16999, 0.89915),
        (-0.52608, 1.5613, 0.00959, 0.43791),
        (0.33138, 0.9806, 0.24226, 0.76421),
        (0.081, 0.93861, 0.03726, 0.81181),
    ),
    "DINO-4scale": (
        "dino_R50_4scale_12ep",
        SIXTY,
        dino(4),
        0,
        (0.10256, 1.07477),
        (-2.36312, 0.42381, -2.10966, -0.71121),
        (0.09697, 0.9958, 0.86948, 0.2164),
        (0.21679, 0.97607, 0.26733, 0.02991),
    ),
    "DINO-5scale": (
        "dino_R50_5scale_12ep",
        SIXTY,
        dino(5),
        0,
        (0.1451, 1.00656),
        (-2.10086, 0.15833, -0.81207, 0.23016),
        (0.02084, 0.98199, 0.66031, 0.39864),
        (0.81828, 0.99948, 0.99922, 0.99891),
    ),
    "Deformable-DETR": (
        "deformable_detr_R50_50ep",
        [],
        deformable("plain"),
        5,
        (0.03286, 0.99437),
        (1.445, 1.18054, -0.6085, -1.15492),
        (0.49914, 0.50969, 0.34311, 0.4204),
        None,
    ),
    "Deformable-DETR, refine": (
        "deformable_detr_refine_R50_50ep",
        [],
        deformable("refine"),
        None,
        (0.01732, 0.99603),
        (1.34674, 1.20381, -0.74528, -1.14917),
        (0.58156, 0.38084, 0.37067, 0.09103),
        None,
    ),
    "Deformable-DETR, two stage": (
        "deformable_detr_two_stage_R50_50ep",
        SIXTY,
        deformable("two stage"),
        None,
        (-0.01328, 1.02036),
        (1.63022, 1.48653, -0.31392, -0.84364),
        (0.56506, 0.73719, 0.71541, 0.06481),
        None,
    ),
    "DETR": (
        "detr_R50_500ep",
        [],
        detr(),
        None,
        (0.22745, 1.11824),
        (1.32164, 0.68898, -0.39584, 1.56494),
        (0.37484, 0.49238, 0.3737, 0.66312),
        None,
    ),
    "Anchor DETR DC5": (
        "anchor_detr_DC5-R50_50ep",
        [],
        anchor_detr(),
        5,
        (-0.13279, 1.04701),
        (0.3659, -0.06944, 1.14768, 0.71945),
        (0.43011, 0.41252, 0.54483, 0.51664),
        (0.60915, 0.35229, 0.55186, 0.52228),
    ),
    "Anchor DETR": (
        "anchor_detr_R50_50ep",
        [],
        anchor_detr(),
        5,
        (-0.13597, 1.05109),
        (0.49288, -0.00152, 1.11019, 0.73835),
        (0.42495, 0.4097, 0.55109, 0.52088),
        (0.6045, 0.34977, 0.55244, 0.52522),
    ),
}


# Spec section 5.6; with other numbers of queries than the published ones the rest must still be there.
PARAMETERS = {
    "DN-DETR": 43694977,
    "DN-DETR, 3 patterns": 43695745,
    "DN-Deformable-DETR": 47429154,
    "encoder only": 48488589,
    "DINO-4scale": 46893182 - 840 * 256,
    "DINO-5scale": 47255806 - 840 * 256,
    "DAB-DETR": 43671517,
    "DAB-DETR, 3 patterns": 43672285,
    "DAB-Deformable-DETR": 47405994,
    "Deformable-DETR": 40069665,
    "Deformable-DETR, refine": 40849660,
    "Deformable-DETR, two stage": 41181529,
    "DETR": 41524768,
    "Anchor DETR": 37038711,
    "Anchor DETR DC5": 37038711,
}


@pytest.mark.parametrize("case", CASES)
def test_evaluation_of_every_system_is_that_of_its_authors(case):
    config, overrides, shapes, tied, statistics, logits, first, last = CASES[case]
    no_data = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu", "MODEL.DN_DETR.NUM_CLASSES", 91]
    model = build_model(setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*no_data, *overrides], splits=())).eval()

    def canonical(key):
        key = re.sub(r"^transformer\.decoder\.(bbox|class)_embed", r"\1_embed", key)
        return key if tied is None else re.sub(r"^(transformer\.)?(bbox|class)_embed\.\d", rf"\1\2_embed.{tied}", key)

    state = {k: value(canonical(k), v) for k, v in shapes.items()}
    if "transformer.position.weight" in state:  # points in [0, 1], not logits
        state["transformer.position.weight"] = state["transformer.position.weight"].sigmoid()
    model.load_state_dict(convert(state, model.state_dict()).state)
    if case in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[case]
    stream = np.random.RandomState(0)
    images = [torch.from_numpy(stream.standard_normal((3, *size)).astype(np.float32)) for size in SIZES]
    with torch.no_grad():
        memory = model.encode_images(ImageList.from_tensors(images))
        predictions = model.decoder(model.query_source(memory), memory)
    found = predictions.logits[-1]
    assert (found.mean().item(), found.std().item()) == pytest.approx(statistics, abs=1e-4)
    torch.testing.assert_close(found[0, 0, :4], torch.tensor(logits), atol=2e-4, rtol=0)
    torch.testing.assert_close(predictions.boxes[-1, 0, 0], torch.tensor(first), atol=2e-5, rtol=0)
    if last:
        torch.testing.assert_close(predictions.boxes[-1, 1, -1], torch.tensor(last), atol=2e-5, rtol=0)
