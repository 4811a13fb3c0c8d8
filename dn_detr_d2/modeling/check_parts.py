"""Which parts of a detector go together: what the names of a config may choose, but no model can be made of."""

from torch import nn

from ..denoising import QueryDenoising
from ..errors import ConfigError
from .decoder import Decoder, MaskedDecoder
from .decoder_layer import GivenPosition, MaskedDecoderLayer, RowColumnDecoderLayer
from .encoder import RowColumnEncoder
from .mask_queries import LearnedMaskQueries, MaskDinoQueries
from .neck import Neck
from .query_source import LearnedPositions, TopKAnchors, TwoStageQueries

# Sources whose queries come with positions of their own.
POSITIONED = (LearnedPositions, TwoStageQueries, LearnedMaskQueries)


def check_parts(
    cfg,
    neck: Neck,
    encoder: nn.Module,
    query_source: nn.Module,
    decoder: nn.Module,
    denoising: QueryDenoising | None,
    divisor: int = 1,
) -> None:
    """Refuses parts that cannot work together, or would train something else than they say.

    Classes that are registered by others pass where they do not derive from ours.

    Args:
        cfg: for the names in messages.
        neck, encoder, query_source, decoder, denoising: the parts as they were built.
        divisor: of the padded sides of a batch.

    Raises:
        ConfigError: names the keys and a way out.
    """
    _check_layer(cfg, encoder, query_source, decoder)
    _check_masks(cfg, query_source, decoder)
    if isinstance(query_source, TopKAnchors) and cfg.MODEL.DN_DETR.LOSS.CLASS_LOSS == "softmax":
        raise ConfigError(
            f"MODEL.DN_DETR.QUERY_SOURCE.NAME = {cfg.MODEL.DN_DETR.QUERY_SOURCE.NAME!r} ranks cells by class scores, of "
            "which LOSS.CLASS_LOSS 'softmax' would take the last for no object; set it to 'focal'"
        )
    if denoising is not None:
        _check_denoising(cfg, neck, query_source, decoder, denoising, divisor)


def _check_layer(cfg, encoder: nn.Module, query_source: nn.Module, decoder: nn.Module) -> None:
    """Positions of queries, and rows and columns of the memory, as the decoder's layers want them."""
    if not isinstance(decoder, Decoder):
        return
    root, layer = cfg.MODEL.DN_DETR, type(decoder.layers[0])
    positioned, given = isinstance(query_source, POSITIONED), issubclass(layer.Position, GivenPosition)
    if positioned != given and _is_ours(query_source):
        has, wants = ("have", "makes them from boxes") if positioned else ("have no", "needs them")
        raise ConfigError(
            f"MODEL.DN_DETR.QUERY_SOURCE.NAME = {root.QUERY_SOURCE.NAME!r}: its queries {has} positions of their own, but "
            f"DECODER.LAYER {root.DECODER.LAYER!r} {wants}; take the pair of a config in configs/"
        )
    rows, layer_takes_rows = isinstance(encoder, RowColumnEncoder), issubclass(layer, RowColumnDecoderLayer)
    known = _is_ours(encoder) if layer_takes_rows else _is_ours(decoder.layers[0])
    if rows != layer_takes_rows and known:
        raise ConfigError(
            f"MODEL.DN_DETR.ENCODER.NAME = {root.ENCODER.NAME!r} and DECODER.LAYER {root.DECODER.LAYER!r} do not go "
            "together: RowColumnEncoder needs RowColumnDecoderLayer, and this needs it"
        )
    if issubclass(layer, MaskedDecoderLayer) and not isinstance(decoder, MaskedDecoder):
        raise ConfigError(
            f"MODEL.DN_DETR.DECODER.LAYER = {root.DECODER.LAYER!r} looks inside of masks that DECODER.NAME 'MaskedDecoder' "
            f"predicts, got {root.DECODER.NAME!r}"
        )


def _is_ours(part: nn.Module) -> bool:
    """Whether a part is of this package: what another's needs and gives is not known."""
    return type(part).__module__.startswith(__package__)


def _check_masks(cfg, query_source: nn.Module, decoder: nn.Module) -> None:
    """What the queries of Mask DINO borrow."""
    root = cfg.MODEL.DN_DETR
    if isinstance(query_source, MaskDinoQueries) and (not root.MASK.ENABLED or getattr(decoder, "norm", None) is None):
        raise ConfigError(
            f"MODEL.DN_DETR.QUERY_SOURCE.NAME = {root.QUERY_SOURCE.NAME!r} needs MASK.ENABLED True and a DECODER.NAME with "
            f"a final norm, such as 'MaskDinoDecoder', got {root.MASK.ENABLED} and {root.DECODER.NAME!r}"
        )


def _check_denoising(
    cfg, neck: Neck, query_source: nn.Module, decoder: nn.Module, denoising: QueryDenoising, divisor: int
) -> None:
    root = cfg.MODEL.DN_DETR
    node = root.DENOISING
    if isinstance(query_source, LearnedMaskQueries) and denoising.generator.COPIES > 1:
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.NAME = {node.NAME!r} tells near copies of a box from far ones, but QUERY_SOURCE.NAME "
            f"{root.QUERY_SOURCE.NAME!r} has no boxes; take DenoisingGenerator"
        )
    hiding = {"KNOWN_FRACTION": node.KNOWN_FRACTION, "MASK_PADDING": node.MASK_PADDING}
    if not node.ATTENTION_MASK and (wrong := [f"{key} {value}" for key, value in hiding.items() if value]):
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.ATTENTION_MASK = False leaves nothing hidden, but DENOISING.{wrong[0]} hides padded "
            "slots; set ATTENTION_MASK to True"
        )
    coarsest = max(neck.strides.values()) * 2 ** (root.NUM_FEATURE_LEVELS - len(neck.strides))
    if isinstance(decoder, MaskedDecoder) and divisor % coarsest:
        raise ConfigError(
            f"MODEL.DN_DETR.SIZE_DIVISIBILITY = {root.SIZE_DIVISIBILITY} must be a multiple of {coarsest}, the stride of "
            "the coarsest level, or noised masks would not fall on whole cells"
        )
