"""Building blocks with weights and no opinion about detection."""

from .activation_checkpointing import LayerStack
from .attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    CrossAttention,
    MultiLevelConditionalCrossAttention,
    MultiScaleDeformableAttention,
    SelfAttention,
    added_to_scores,
    attend,
    project_values,
)
from .autocast import autocast_dtype, lowered
from .kernels import kernel_is_broken, missing_kernel, uses_kernel
from .mlp import MLP, FeedForward, map_together
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .position_encoding import SinePositionEncoding, encode_boxes, sine_encoding
from .row_column_attention import AxisEncoding, RowColumnAttention, axis_coordinates

__all__ = [
    "MLP",
    "AxisEncoding",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "CrossAttention",
    "FeedForward",
    "LayerStack",
    "MultiLevelConditionalCrossAttention",
    "MultiScaleDeformableAttention",
    "RowColumnAttention",
    "SelfAttention",
    "SinePositionEncoding",
    "added_to_scores",
    "attend",
    "autocast_dtype",
    "axis_coordinates",
    "encode_boxes",
    "kernel_is_broken",
    "lowered",
    "map_together",
    "missing_kernel",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "project_values",
    "sine_encoding",
    "uses_kernel",
]
