"""The detector: roles, matcher, criterion, and the meta-architecture that joins them. Importing registers them."""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
from ..denoising import LabelEncoder
from ..losses import HungarianMatcher, SetCriterion, SoftmaxCriterion, SoftmaxMatcher
from .backbone import build_dc5_resnet_backbone, build_swin_backbone, build_vitdet_backbone
from .decoder import Decoder, MaskDinoDecoder, MaskedDecoder
from .decoder_layer import (
    ConditionalDecoderLayer,
    DeformableDecoderLayer,
    DinoDecoderLayer,
    FirstPointDecoderLayer,
    MaskedDecoderLayer,
    MultiLevelConditionalDecoderLayer,
    PlainDecoderLayer,
    PointDecoderLayer,
    QueryDecoderLayer,
    RowColumnDecoderLayer,
)
from .encoder import DeformableEncoder, DenseEncoder, PlainEncoder, RowColumnEncoder
from .heads import DetectionHeads
from .mask_queries import LearnedMaskAnchors, LearnedMaskQueries, MaskDinoQueries
from .meta_arch import DenoisingDETR
from .neck import Neck
from .outputs import ForwardOutputs
from .pixel_decoder import PixelDecoder
from .query_source import (
    LearnedAnchors,
    LearnedPoints,
    LearnedPositions,
    LearnedQueries,
    ObjectnessAnchors,
    TopKAnchors,
    TwoStageQueries,
)
from .reference_update import Detached, LookForwardTwice, ReferenceUpdate, Static
from .registry import (
    DECODER_LAYER_REGISTRY,
    DECODER_REGISTRY,
    DENOISING_REGISTRY,
    ENCODER_REGISTRY,
    QUERY_SOURCE_REGISTRY,
)
from .roi_heads import DenoisingCascadeROIHeads, DenoisingROIHeads
from .timm_backbone import TimmBackbone, build_timm_backbone

__all__ = [
    "DECODER_LAYER_REGISTRY",
    "DECODER_REGISTRY",
    "DENOISING_REGISTRY",
    "ENCODER_REGISTRY",
    "QUERY_SOURCE_REGISTRY",
    "ConditionalDecoderLayer",
    "Decoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DenoisingCascadeROIHeads",
    "DenoisingDETR",
    "DenoisingROIHeads",
    "DenseEncoder",
    "Detached",
    "DetectionHeads",
    "DinoDecoderLayer",
    "FirstPointDecoderLayer",
    "ForwardOutputs",
    "HungarianMatcher",
    "LabelEncoder",
    "LearnedAnchors",
    "LearnedMaskAnchors",
    "LearnedMaskQueries",
    "LearnedPoints",
    "LearnedPositions",
    "LearnedQueries",
    "LookForwardTwice",
    "MaskDinoDecoder",
    "MaskDinoQueries",
    "MaskedDecoder",
    "MaskedDecoderLayer",
    "MultiLevelConditionalDecoderLayer",
    "Neck",
    "ObjectnessAnchors",
    "PixelDecoder",
    "PlainDecoderLayer",
    "PlainEncoder",
    "PointDecoderLayer",
    "QueryDecoderLayer",
    "ReferenceUpdate",
    "RowColumnDecoderLayer",
    "RowColumnEncoder",
    "SetCriterion",
    "SoftmaxCriterion",
    "SoftmaxMatcher",
    "Static",
    "TimmBackbone",
    "TopKAnchors",
    "TwoStageQueries",
    "build_dc5_resnet_backbone",
    "build_swin_backbone",
    "build_timm_backbone",
    "build_vitdet_backbone",
]
