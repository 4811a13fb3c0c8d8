"""Building blocks with weights and no opinion about detection."""

from .attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    CrossAttention,
    MultiLevelConditionalCrossAttention,
    MultiScaleDeformableAttention,
    SelfAttention,
    attend,
)
from .kernels import missing_kernel, uses_kernel
from .mlp import MLP, FeedForward
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .position_encoding import SinePositionEncoding, encode_boxes, sine_encoding

__all__ = [
    "MLP",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "CrossAttention",
    "FeedForward",
    "MultiLevelConditionalCrossAttention",
    "MultiScaleDeformableAttention",
    "SelfAttention",
    "SinePositionEncoding",
    "attend",
    "encode_boxes",
    "missing_kernel",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "sine_encoding",
    "uses_kernel",
]
