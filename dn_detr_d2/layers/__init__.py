"""Building blocks with weights and no opinion about detection."""

from .attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    MultiScaleDeformableAttention,
    SelfAttention,
    attend,
)
from .mlp import MLP, FeedForward
from .ms_deform_attn import ms_deform_attn
from .position_encoding import SinePositionEncoding, encode_boxes, sine_encoding

__all__ = [
    "MLP",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "FeedForward",
    "MultiScaleDeformableAttention",
    "SelfAttention",
    "SinePositionEncoding",
    "attend",
    "encode_boxes",
    "ms_deform_attn",
    "sine_encoding",
]
