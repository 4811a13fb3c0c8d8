"""The detector: roles, matcher, criterion, and the meta-architecture that joins them. Importing registers them."""

from .backbone import build_dc5_resnet_backbone
from .build import (
    DECODER_LAYER_REGISTRY,
    DECODER_REGISTRY,
    DENOISING_REGISTRY,
    ENCODER_REGISTRY,
    QUERY_SOURCE_REGISTRY,
)
from .criterion import SetCriterion
from .decoder import LookForwardOnceDecoder, LookForwardTwiceDecoder, RefiningDecoder
from .decoder_layer import (
    ConditionalDecoderLayer,
    DeformableDecoderLayer,
    DinoDecoderLayer,
    MultiLevelConditionalDecoderLayer,
)
from .encoder import DeformableEncoder, DenseEncoder
from .heads import DetectionHeads
from .matcher import HungarianMatcher
from .meta_arch import DenoisingDETR
from .neck import Neck
from .query_source import LabelEncoder, LearnedAnchors, TopKAnchors

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
    "HungarianMatcher",
    "LabelEncoder",
    "LearnedAnchors",
    "LookForwardOnceDecoder",
    "LookForwardTwiceDecoder",
    "MultiLevelConditionalDecoderLayer",
    "Neck",
    "RefiningDecoder",
    "SetCriterion",
    "TopKAnchors",
    "build_dc5_resnet_backbone",
]
