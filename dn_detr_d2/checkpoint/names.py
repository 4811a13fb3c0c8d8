"""Parameter names of the published codes as ours: one table a source, applied from top to bottom.

Names on the left are those that the authors' files hold; none of their code is needed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

Rules = list[tuple[str, str]]

# torchvision's ResNet -> Detectron2's.
TORCHVISION: Rules = [
    (r"^layer1\b", "res2"),
    (r"^layer2\b", "res3"),
    (r"^layer3\b", "res4"),
    (r"^layer4\b", "res5"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
    (r"^conv1", "stem.conv1"),
]
# What all official DETRs of the DAB family share.
OFFICIAL: Rules = [
    (r"^transformer\.encoder\.query_scale", "encoder.position_scale"),
    (r"^transformer\.level_embed$", "encoder.level_embed.weight"),
    (r"^transformer\.decoder\.norm", "decoder.norm"),
    (r"^transformer\.decoder\.query_scale", "decoder.position.scale"),
    (r"^transformer\.decoder\.ref_point_head", "decoder.position.embed"),
    (r"^transformer\.decoder\.ref_anchor_head", "decoder.position.reference_size"),
    (r"^transformer\.patterns", "query_source.patterns"),
    (r"^(transformer\.)?tgt_embed", "query_source.content"),
    (r"^query_embed", "query_source.queries"),
    (r"^transformer\.reference_points", "query_source.reference"),
    (r"^transformer\.pos_trans_norm", "query_source.transform_norm"),
    (r"^transformer\.pos_trans", "query_source.transform"),
    (r"^transformer\.enc_output_norm", "query_source.norm"),
    (r"^transformer\.enc_output", "query_source.project"),
    (r"^transformer\.enc_out_class_embed", "query_source.heads.class_heads.0"),
    (r"^transformer\.enc_out_bbox_embed", "query_source.heads.box_heads.0"),
    (r"^refpoint_embed", "query_source.anchors"),
    (r"^label_enc", "query_source.label_encoder.embed"),
    (r"^class_embed\.(\d+)", r"decoder.heads.class_heads.\1"),
    (r"^class_embed", "decoder.heads.class_heads.0"),
    (r"^bbox_embed\.(\d+)", r"decoder.heads.box_heads.\1"),
    (r"^bbox_embed", "decoder.heads.box_heads.0"),
    (r"^input_proj\.(weight|bias)", r"neck.projections.0.0.\1"),
    (r"^input_proj", "neck.projections"),
    (r"^transformer\.", ""),
    (r"\blinear([12])", r"ffn.linear\1"),
    (r"\bactivation\b", "ffn.activation"),
    (r"in_proj_", "in_proj."),
    (r"(encoder\.layers\.\d+)\.norm2", r"\1.ffn.norm"),
    (r"(decoder\.layers\.\d+)\.norm3", r"\1.ffn.norm"),
]
DENSE_ENCODER: Rules = [(r"(encoder\.layers\.\d+)\.norm1", r"\1.self_attn.norm")]
DEFORMABLE_ENCODER: Rules = [(r"(encoder\.layers\.\d+)\.norm1", r"\1.norm")]
# DETR and the DAB family number the norms of a decoder layer in the order in which they are used.
NORMS_IN_ORDER: Rules = [
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.self_attn.norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.cross_attn.norm"),
]
CONDITIONAL_DECODER: Rules = [
    *NORMS_IN_ORDER,
    (r"\bca_out_v_proj", "cross_attn.out_proj"),
    (r"\blvl_attn", "cross_attn.level_weights"),
    (r"\bsa_", "self_attn."),
    (r"\bca_", "cross_attn."),
    (r"\bqpos_sine_proj", "query_sine"),
    (r"attn\.qcontent_proj", "attn.query_content"),
    (r"attn\.qpos_proj", "attn.query_position"),
    (r"attn\.kcontent_proj", "attn.key_content"),
    (r"attn\.kpos_proj", "attn.key_position"),
    (r"attn\.v_proj", "attn.value"),
]
PLAIN_DECODER: Rules = [*NORMS_IN_ORDER, (r"\bmultihead_attn", "cross_attn")]
ANCHOR_DETR: Rules = [
    (r"^backbone\.body\.", "backbone.0.body."),
    (r"^transformer\.position\b", "query_source.points"),
    (r"^transformer\.pattern\b", "query_source.patterns"),
    (r"^transformer\.adapt_pos1d", "encoder.axis_encoding.layers"),
    (r"^transformer\.adapt_pos2d\.0", "decoder.position.embed.layers.0"),
    (r"^transformer\.adapt_pos2d\.2", "decoder.position.embed.layers.1"),
    (r"^transformer\.(class|bbox)_embed", r"\1_embed"),
    (r"^transformer\.(en|de)coder_layers", r"\1coder.layers"),
    (r"(encoder\.layers\.\d+)\.norm1", r"\1.self_attn.norm"),
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.cross_attn.norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.self_attn.norm"),
    (r"\bffn\.norm2", "ffn.norm"),
    (r"\bffn\.linear([12])", r"linear\1"),  # which the rules that all share turn back
]
# The deformable family numbers its norms in the order in which they were written, not in which they are used.
DEFORMABLE_DECODER: Rules = [
    (r"(decoder\.layers\.\d+)\.norm1", r"\1.norm"),
    (r"(decoder\.layers\.\d+)\.norm2", r"\1.self_attn.norm"),
]
# Mask2Former and Mask DINO -> the names of the DETRs. Older files of Mask2Former lack a level of names.
MASKS: Rules = [
    (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
    (r"^sem_seg_head\.pixel_decoder\.(input_proj|transformer)", r"\1"),
    (r"^sem_seg_head\.pixel_decoder\.(adapter|layer)_1\.norm", r"sem_seg_head.pixel_decoder.\1_1.1"),
    (r"^sem_seg_head\.pixel_decoder\.(adapter|layer)_1\.weight", r"sem_seg_head.pixel_decoder.\1_1.0.weight"),
    (r"^sem_seg_head\.pixel_decoder\.adapter_1", "pixel_decoder.lateral"),
    (r"^sem_seg_head\.pixel_decoder\.layer_1", "pixel_decoder.fuse"),
    (r"^sem_seg_head\.pixel_decoder", "pixel_decoder"),
    (r"^sem_seg_head\.predictor\.", ""),
    (r"^(query_feat|static_query)", "tgt_embed"),
    (r"^level_embed", "decoder.level_embed"),
    (r"^decoder_norm", "decoder.norm"),
    (r"^mask_embed", "decoder.heads.mask_heads.0"),
    (r"^transformer_(cross|self)_attention_layers\.(\d+)\.\w+_attn", r"decoder.layers.\2.\1_attn"),
    (r"^transformer_(cross|self)_attention_layers\.(\d+)\.norm", r"decoder.layers.\2.\1_attn.norm"),
    (r"^transformer_ffn_layers\.(\d+)\.norm", r"decoder.layers.\1.norm3"),
    (r"^transformer_ffn_layers", "decoder.layers"),
]
MASK_DINO: Rules = [
    *MASKS,
    (r"^(decoder\.)?_?bbox_embed(\.\d+)?\.layers", "bbox_embed.layers"),  # one head, registered up to 19 times
    (r"^query_embed", "refpoint_embed"),
    (r"^(enc_output|decoder\.ref_point_head)", r"transformer.\1"),
]
# detrex -> the official names; the rules of the layers follow from the same two questions as there.
DETREX: Rules = [
    (r"^backbone\.body\.", "backbone.0.body."),
    (r"ffns\.0\.layers\.0\.0\.", "linear1."),
    (r"ffns\.0\.layers\.1\.", "linear2."),
    (r"ffns\.0\.(layers\.0\.1|activation)\.weight", "activation.weight"),
    (r"(encoder\.layers\.\d+)\.norms\.0", r"\1.norm1"),
    (r"(encoder\.layers\.\d+)\.norms\.1", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.norms\.2", r"\1.norm3"),
    (r"(encoder\.layers\.\d+)\.attentions\.0(\.attn)?", r"\1.self_attn"),
    (r"decoder\.post_norm_layer", "decoder.norm"),
    (r"transformer\.level_embeds", "transformer.level_embed"),
    (r"^neck\.convs\.(\d)\.conv", r"input_proj.\1.0"),
    (r"^neck\.convs\.(\d)\.norm", r"input_proj.\1.1"),
    (r"^neck\.extra_convs\.0\.conv", r"input_proj.EXTRA.0"),
    (r"^neck\.extra_convs\.0\.norm", r"input_proj.EXTRA.1"),
    (r"^anchor_box_embed", "refpoint_embed"),
    (r"^(denoising_generator\.)?label_encoder", "label_enc"),
]
DETREX_NORMS_IN_ORDER: Rules = [
    (r"(decoder\.layers\.\d+)\.norms\.([01])", lambda m: f"{m[1]}.norm{int(m[2]) + 1}"),
]
DETREX_CONDITIONAL: Rules = [
    *DETREX_NORMS_IN_ORDER,
    (r"attentions\.0\.(query|key)_content_proj", lambda m: f"sa_{m[1][0]}content_proj"),
    (r"attentions\.0\.(query|key)_pos_proj", lambda m: f"sa_{m[1][0]}pos_proj"),
    (r"attentions\.0\.value_proj", "sa_v_proj"),
    (r"attentions\.1\.(query|key)_content_proj", lambda m: f"ca_{m[1][0]}content_proj"),
    (r"attentions\.1\.query_pos_sine_proj", "ca_qpos_sine_proj"),
    (r"attentions\.1\.(query|key)_pos_proj", lambda m: f"ca_{m[1][0]}pos_proj"),
    (r"attentions\.1\.value_proj", "ca_v_proj"),
    (r"(decoder\.layers\.\d+)\.attentions\.0", r"\1.self_attn"),
    (r"(decoder\.layers\.\d+)\.attentions\.1", r"\1.cross_attn"),
]
DETREX_PLAIN: Rules = [
    *DETREX_NORMS_IN_ORDER,
    (r"(decoder\.layers\.\d+)\.attentions\.0(\.attn)?", r"\1.self_attn"),
    (r"(decoder\.layers\.\d+)\.attentions\.1(\.attn)?", r"\1.multihead_attn"),
]
DETREX_DEFORMABLE: Rules = [
    (r"(decoder\.layers\.\d+)\.norms\.0", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.norms\.1", r"\1.norm1"),
    (r"(decoder\.layers\.\d+)\.attentions\.0(\.attn)?", r"\1.self_attn"),
    (r"(decoder\.layers\.\d+)\.attentions\.1", r"\1.cross_attn"),
]


@dataclass(frozen=True)
class Source:
    """What a file seems to be.

    Attributes:
        system: "DN-DETR", "DINO", ...; "ImageNet ResNet" for a backbone alone.
        code: "this project", "official", "detrex" or "torchvision".
    """

    system: str
    code: str

    def __str__(self) -> str:
        return f"{self.system} ({self.code})"


DINO_LIKE = "the DINO-like model of the DN-DETR repository"
# (system, code, patterns that must all be there); the first that fits holds.
SYSTEMS: list[tuple[str, str, tuple[str, ...]]] = [
    ("a detector", "this project", (r"^(query_source|decoder\.heads)\.",)),
    ("ImageNet ResNet", "torchvision", (r"^layer1\.0\.conv1\.", r"^conv1\.weight$")),
    ("ImageNet ResNet", "detectron2", (r"^(stem|res2)\.",)),
    ("Mask2Former", "official", (r"^sem_seg_head\.predictor\.transformer_cross_attention_layers\.",)),
    ("Mask DINO", "official", (r"^sem_seg_head\.predictor\.decoder\.", r"^sem_seg_head\.predictor\._bbox_embed\.")),
    ("Mask DINO", "detrex", (r"^sem_seg_head\.predictor\.decoder\.",)),
    ("Anchor DETR", "", (r"^transformer\.encoder_layers\.",)),
    ("Deformable-DETR", "", (r"^(query_embed|transformer\.pos_trans)\.", r"^transformer\.level_embed")),
    ("DETR", "", (r"^query_embed\.",)),
    (
        DINO_LIKE,
        "official",
        (r"^transformer\.enc_output\.", r"^class_embed\.6\.", r"^transformer\.encoder\.layers\.0\.linear1"),
    ),
    ("DINO", "", (r"^transformer\.enc_output\.",)),
    ("DN-Deformable-DETR with a deformable encoder only", "", (r"qcontent_proj|query_content_proj", r"level_embed")),
    ("DN-DETR", "", (r"qcontent_proj|query_content_proj", r"label_enc")),
    ("DAB-DETR", "", (r"qcontent_proj|query_content_proj",)),
    ("DN-Deformable-DETR", "", (r"decoder\.layers\.0\.(cross_attn|attentions\.1)\.sampling_off", r"label_enc")),
    ("DAB-Deformable-DETR", "", (r"decoder\.layers\.0\.(cross_attn|attentions\.1)\.sampling_off",)),
]


def identify(keys: Iterable[str]) -> Source | None:
    """Which system and which code a state dict comes from, by its names; None if they fit nothing known."""
    keys = list(keys)
    if keys and all(key.startswith("backbone.") for key in keys):
        return Source("a backbone", "this project")
    guess = "detrex" if any(".attentions.0." in key for key in keys) else "official"
    for system, code, patterns in SYSTEMS:
        if all(any(re.search(pattern, key) for key in keys) for pattern in patterns):
            return Source(system, code or guess)
    return None


def rename_all(keys: list[str], source: Source) -> dict[str, str]:
    """The name here of every name there; several names there may have one name here (tied copies)."""
    if source.code == "torchvision":
        return {key: "backbone." + apply(TORCHVISION, key) for key in keys if not key.startswith("fc.")}
    if source.code == "detectron2":
        return {key: "backbone." + key for key in keys if not key.startswith(("linear.", "stem.fc."))}
    conditional = any("query_content_proj" in key or "sa_qcontent_proj" in key for key in keys)
    deformable = any(re.search(r"encoder\.layers\.0\..*sampling_offsets", key) for key in keys)
    official = _official_names(keys, source, conditional)
    if source.system in ("Deformable-DETR", DINO_LIKE):  # the seventh heads belong to the encoder
        official = {
            key: re.sub(r"^(transformer\.decoder\.)?(class|bbox)_embed\.6", r"transformer.enc_out_\2_embed", x)
            for key, x in official.items()
        }
    if source.system == "Anchor DETR":
        official = {key: apply(ANCHOR_DETR, name) for key, name in official.items()}
    rules = OFFICIAL + (DEFORMABLE_ENCODER if deformable else DENSE_ENCODER)
    plain = PLAIN_DECODER if source.system == "DETR" else DEFORMABLE_DECODER
    rules = rules + (CONDITIONAL_DECODER if conditional else plain)
    renamed = {}
    for key, name in official.items():
        if name.startswith("backbone.0.body."):
            renamed[key] = "backbone." + apply(TORCHVISION, name.removeprefix("backbone.0.body."))
        elif name.startswith("backbone."):
            renamed[key] = name
        else:
            renamed[key] = apply(rules, re.sub(r"^transformer\.decoder\.(bbox|class)_embed", r"\1_embed", name))
    return renamed


def _official_names(keys: list[str], source: Source, conditional: bool) -> dict[str, str]:
    """The name in the authors' DETRs of every name of detrex, and of the models with masks."""
    if source.system in ("Mask2Former", "Mask DINO"):
        rules = MASKS if source.system == "Mask2Former" else MASK_DINO
        return {key: key if key.startswith("backbone.") else apply(rules, key) for key in keys}
    if source.code != "detrex":
        return {key: key for key in keys}
    plain = DETREX_PLAIN if source.system == "DETR" else DETREX_DEFORMABLE
    rules = DETREX + (DETREX_CONDITIONAL if conditional else plain)
    last = len({match[1] for key in keys if (match := re.match(r"neck\.convs\.(\d)", key))})
    official = {key: apply(rules, key).replace("EXTRA", str(last)) for key in keys}
    if source.system == "DINO":  # its last heads belong to the encoder
        official = {
            key: re.sub(r"(class|bbox)_embed\.6", r"transformer.enc_out_\1_embed", x) for key, x in official.items()
        }
        official = {key: x.replace("transformer.decoder.transformer.", "transformer.") for key, x in official.items()}
    return official


def apply(rules: Rules, name: str) -> str:
    """All substitutions, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
