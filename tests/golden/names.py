"""The authors' parameter names as ours, for the two golden systems; the converter for users is another matter."""

import re

BACKBONE = [
    (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"bn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
    (r"^conv1", "stem.conv1"),
]
COMMON = [
    (r"^transformer\.encoder\.query_scale", "encoder.position_scale"),
    (r"^transformer\.level_embed", "encoder.level_embed.weight"),
    (r"^transformer\.decoder\.norm", "decoder.norm"),
    (r"^transformer\.decoder\.query_scale", "decoder.position.scale"),
    (r"^transformer\.decoder\.ref_point_head", "decoder.position.embed"),
    (r"^transformer\.decoder\.ref_anchor_head", "decoder.position.reference_size"),
    (r"^refpoint_embed", "query_source.anchors"),
    (r"^label_enc", "query_source.label_encoder.embed"),
    (r"^tgt_embed", "query_source.content"),
    (r"^transformer\.", ""),
    (r"linear([12])", r"ffn.linear\1"),
    (r"activation", "ffn.activation"),
    (r"in_proj_", "in_proj."),
    (r"(encoder\.layers\.\d)\.norm2", r"\1.ffn.norm"),
    (r"(decoder\.layers\.\d)\.norm3", r"\1.ffn.norm"),
]
SINGLE_SCALE = [
    (r"^input_proj", "neck.projections.0.0"),
    (r"^class_embed", "decoder.heads.class_heads.0"),
    (r"^bbox_embed", "decoder.heads.box_heads.0"),
    (r"layers\.(\d)\.norm1", r"layers.\1.self_attn.norm"),
    (r"layers\.(\d)\.norm2", r"layers.\1.cross_attn.norm"),
    (r"\.sa_", ".self_attn."),
    (r"\.ca_", ".cross_attn."),
    (r"qpos_sine_proj", "query_sine"),
    (r"attn\.q(content|pos)_proj", lambda m: f"attn.query_{m[1].replace('pos', 'position')}"),
    (r"attn\.k(content|pos)_proj", lambda m: f"attn.key_{m[1].replace('pos', 'position')}"),
    (r"attn\.v_proj", "attn.value"),
]
DEFORMABLE = [
    (r"^input_proj", "neck.projections"),
    (r"^class_embed", "decoder.heads.class_heads"),
    (r"^bbox_embed", "decoder.heads.box_heads"),
    (r"(encoder\.layers\.\d)\.norm1", r"\1.norm"),
    (r"(decoder\.layers\.\d)\.norm1", r"\1.norm"),
    (r"(decoder\.layers\.\d)\.norm2", r"\1.self_attn.norm"),
]


def rename(key, deformable):
    """Our name of an authors' parameter, or None for the decoder's second copy of the heads."""
    if key.startswith("backbone.0.body."):
        key, rules, prefix = key.removeprefix("backbone.0.body."), BACKBONE, "backbone."
    elif re.match(r"transformer\.decoder\.(bbox|class)_embed", key):
        return None
    else:
        rules, prefix = COMMON + (DEFORMABLE if deformable else SINGLE_SCALE), ""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return prefix + key
