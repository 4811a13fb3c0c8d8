"""Where queries come from, and how a box and a label become one: ``embed`` is the plug of denoising.

Shapes: N images, Q matching queries, D denoising queries, C channels, P classes.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..boxes import logit
from ..denoising import NoisedTargets
from ..errors import ConfigError
from ..structures import Memory, ObjectQueries
from .build import QUERY_SOURCE_REGISTRY


class LabelEncoder(nn.Module):
    """Label embedding with indicator (DN-DETR Sec. 4.3): [embedding of the label ‖ 1 if the query denoises, else 0].

    Args:
        num_classes: P; row P of the table is "unknown", the content of DN-DETR's matching queries.
        dim: C; the table has C - 1 columns.
    """

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embed = nn.Embedding(num_classes + 1, dim - 1)

    def forward(self, noised: NoisedTargets) -> Tensor:
        """(N, D, C) content of the denoising queries; zeros where padded."""
        return F.pad(self.embed(noised.labels), (0, 1), value=1.0) * noised.valid[..., None]

    def unknown(self) -> Tensor:
        """(C,) content of a query that has no label."""
        return F.pad(self.embed.weight[-1], (0, 1))


@QUERY_SOURCE_REGISTRY.register()
class LearnedAnchors(nn.Module):
    """Learned anchor boxes of DAB-DETR, with the content that each system gives them.

    Args:
        num_queries: anchors Q / max(num_patterns, 1).
        dim: C.
        num_classes: P.
        content: "zero" (DAB-DETR), "unknown" (DN-DETR: the unknown label) or "learned" (deformable family).
        num_patterns: 0, or how many content patterns share each anchor (Anchor DETR); Q = num_queries * num_patterns,
            pattern-major.
        denoising: whether ``embed`` will be called; then contents end in an indicator.
    """

    @configurable
    def __init__(
        self, *, num_queries: int, dim: int, num_classes: int, content: str, num_patterns: int, denoising: bool
    ):
        super().__init__()
        self.dim = dim
        self.anchors = nn.Embedding(num_queries, 4)  # logits
        self.patterns = nn.Embedding(num_patterns, dim) if num_patterns else None
        self.label_encoder = LabelEncoder(num_classes, dim) if denoising or content == "unknown" else None
        self.content = nn.Embedding(num_queries, dim - denoising) if content == "learned" else None
        self.num_queries = num_queries * max(num_patterns, 1)

    CONTENTS = ("zero", "unknown", "learned")

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR`` and its ``QUERY_SOURCE``."""
        root = cfg.MODEL.DN_DETR
        node = root.QUERY_SOURCE
        if node.CONTENT not in cls.CONTENTS:
            raise ConfigError(f"MODEL.DN_DETR.QUERY_SOURCE.CONTENT must be one of {cls.CONTENTS}, got {node.CONTENT!r}")
        if root.DENOISING.NAME and node.CONTENT == "zero":
            raise ConfigError(
                f"MODEL.DN_DETR.DENOISING.NAME = {root.DENOISING.NAME!r} needs QUERY_SOURCE.CONTENT 'unknown' or "
                "'learned', got 'zero': matching queries must carry the indicator that denoising queries carry"
            )
        if root.NUM_QUERIES < 1 or node.NUM_PATTERNS < 0:
            raise ConfigError(
                f"MODEL.DN_DETR.NUM_QUERIES = {root.NUM_QUERIES} must be positive and QUERY_SOURCE.NUM_PATTERNS = "
                f"{node.NUM_PATTERNS} not negative"
            )
        return {
            "num_queries": root.NUM_QUERIES,
            "dim": root.HIDDEN_DIM,
            "num_classes": root.NUM_CLASSES,
            "content": node.CONTENT,
            "num_patterns": node.NUM_PATTERNS,
            "denoising": bool(root.DENOISING.NAME),
        }

    def forward(self, memory: Memory) -> ObjectQueries:
        """The matching queries, the same for every image."""
        copies = max(len(self.patterns.weight) if self.patterns is not None else 0, 1)
        content, boxes = self._content().tile(copies, 1), self.anchors.weight.sigmoid().tile(copies, 1)
        if self.patterns is not None:
            content = content + self.patterns.weight.repeat_interleave(len(self.anchors.weight), 0)
        n = len(memory.tokens)
        return ObjectQueries(content.expand(n, -1, -1), boxes.expand(n, -1, -1))

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries. Boxes pass through the clamped logit as anchors do, so none has a side of 0."""
        return ObjectQueries(self.label_encoder(noised), logit(noised.boxes).sigmoid())

    def _content(self) -> Tensor:
        """(num_queries, C) content of the anchors."""
        if self.content is not None:
            return F.pad(self.content.weight, (0, self.dim - self.content.weight.shape[1]))
        if self.label_encoder is not None:
            return self.label_encoder.unknown().expand(len(self.anchors.weight), -1)
        return torch.zeros_like(self.anchors.weight[:, :1]).expand(-1, self.dim)
