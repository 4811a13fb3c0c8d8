"""The detector: roles, matcher, criterion, and the meta-architecture that joins them. Importing registers them."""

from .backbone import build_dc5_resnet_backbone, build_swin_backbone, build_vitdet_backbone
from .build import (
    DECODER_LAYER_REGISTRY,
    DECODER_REGISTRY,
    DENOISING_REGISTRY,
    ENCODER_REGISTRY,
    QUERY_SOURCE_REGISTRY,
)
from .criterion import SetCriterion, SoftmaxCriterion
from .decoder import (
    LookForwardOnceDecoder,
    LookForwardTwiceDecoder,
    NormalisedStaticDecoder,
    PlainLookForwardTwiceDecoder,
    RefiningDecoder,
    StaticDecoder,
)
from .decoder_layer import (
    ConditionalDecoderLayer,
    DeformableDecoderLayer,
    DinoDecoderLayer,
    FirstPointDecoderLayer,
    MultiLevelConditionalDecoderLayer,
    PlainDecoderLayer,
    PointDecoderLayer,
    QueryDecoderLayer,
)
from .encoder import DeformableEncoder, DenseEncoder, PlainEncoder
from .heads import DetectionHeads
from .matcher import HungarianMatcher, SoftmaxMatcher
from .meta_arch import DenoisingDETR
from .neck import Neck
from .query_source import (
    LabelEncoder,
    LearnedAnchors,
    LearnedPositions,
    LearnedQueries,
    ObjectnessAnchors,
    TopKAnchors,
    TwoStageQueries,
)

__all__ = [
    "DECODER_LAYER_REGISTRY",
    "DECODER_REGISTRY",
    "DENOISING_REGISTRY",
    "ENCODER_REGISTRY",
    "QUERY_SOURCE_REGISTRY",
    "ConditionalDecoderLayer",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DenoisingDETR",
    "DenseEncoder",
    "DetectionHeads",
    "DinoDecoderLayer",
    "FirstPointDecoderLayer",
    "HungarianMatcher",
    "LabelEncoder",
    "LearnedAnchors",
    "LearnedPositions",
    "LearnedQueries",
    "LookForwardOnceDecoder",
    "LookForwardTwiceDecoder",
    "MultiLevelConditionalDecoderLayer",
    "Neck",
    "NormalisedStaticDecoder",
    "ObjectnessAnchors",
    "PlainDecoderLayer",
    "PlainEncoder",
    "PlainLookForwardTwiceDecoder",
    "PointDecoderLayer",
    "QueryDecoderLayer",
    "RefiningDecoder",
    "SetCriterion",
    "SoftmaxCriterion",
    "SoftmaxMatcher",
    "StaticDecoder",
    "TopKAnchors",
    "TwoStageQueries",
    "build_dc5_resnet_backbone",
    "build_swin_backbone",
    "build_vitdet_backbone",
]
