"""Queries of the models with masks: Mask2Former and Mask DINO.

Shapes: N images, Q matching queries, D denoising queries, C channels, P classes.
"""

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..boxes import boxes_of_masks, logit, xyxy_to_cxcywh
from ..denoising import LabelEncoder, NoisedTargets, embed_boxes
from ..errors import ConfigError
from ..structures import Memory, ObjectQueries, Predictions
from .decoder import Decoder
from .heads import DetectionHeads
from .query_source import LearnedAnchors, TopKAnchors, arguments_without_patterns, take
from .registry import QUERY_SOURCE_REGISTRY

# Clamp of logits of boxes in Mask DINO.
EPS = 1e-5


@QUERY_SOURCE_REGISTRY.register()
class LearnedMaskQueries(nn.Module):
    """Mask2Former's queries: learned contents and positions, and no boxes.

    A denoising query's content is the embedding of the noised label, and its position 0; where it looks is said by its
    noised mask (DN-DETR, TPAMI 2024; the details are those of MP-Former, CVPR 2023).

    Args:
        num_queries: Q.
        dim: C.
        num_classes: P.
        denoising: whether ``embed`` will be called.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int, denoising: bool = False):
        super().__init__()
        self.num_queries = num_queries
        self.content = nn.Embedding(num_queries, dim)
        self.queries = nn.Embedding(num_queries, dim)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False, unknown=False) if denoising else None

    from_config = classmethod(arguments_without_patterns)

    def forward(self, memory: Memory) -> ObjectQueries:
        """The same queries for every image; their references, which nobody reads, are 0.5."""
        content, position = (x.weight.expand(memory.tokens.shape[0], -1, -1) for x in (self.content, self.queries))
        return ObjectQueries(content, torch.full_like(position[..., :4], 0.5), position=position)

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries, with the cells that their noised masks cover."""
        content = self.label_encoder(noised)
        boxes = torch.full_like(noised.boxes, 0.5)
        cells = noised.masks.cells if noised.masks is not None else None
        return ObjectQueries(content, boxes, position=torch.zeros_like(content), noised_cells=cells)


@QUERY_SOURCE_REGISTRY.register()
class LearnedMaskAnchors(LearnedAnchors):
    """Mask DINO's queries without two stages: learned anchors and contents, without an indicator."""

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int, denoising: bool):
        super().__init__(
            num_queries=num_queries,
            dim=dim,
            num_classes=num_classes,
            content="learned",
            num_patterns=0,
            denoising=False,
        )
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False, unknown=False) if denoising else None

    from_config = classmethod(arguments_without_patterns)

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries."""
        return embed_boxes(self.label_encoder, noised, EPS)


@QUERY_SOURCE_REGISTRY.register()
class MaskDinoQueries(TopKAnchors):
    """Two-stage queries of Mask DINO (Li et al., CVPR 2023, Sec. 3.3): contents and boxes are those of the best cells.

    Cells are ranked and corrected by the heads of the decoder. Boxes come from the box head, or from the masks that the
    chosen cells predict.

    Args:
        num_queries: Q.
        dim: C.
        num_classes: P.
        boxes_from_masks: "" for the box head; "mask2box" or "bitmask" for the box of each mask, whose last row and column
            "bitmask" counts in.
        denoising: whether ``embed`` will be called.
    """

    BOXES_FROM_MASKS = ("", "mask2box", "bitmask")
    XAVIER = False

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int, boxes_from_masks: str, denoising: bool):
        super().__init__(num_queries=num_queries, dim=dim, num_classes=num_classes, content="memory", denoising=False)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False, unknown=False) if denoising else None
        self.boxes_from_masks = boxes_from_masks
        self._decoder = ()  # a tuple, for a module would be registered here too

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR`` and its ``QUERY_SOURCE``."""
        way = cfg.MODEL.DN_DETR.QUERY_SOURCE.BOXES_FROM_MASKS
        if way not in cls.BOXES_FROM_MASKS:
            raise ConfigError(
                f"MODEL.DN_DETR.QUERY_SOURCE.BOXES_FROM_MASKS must be one of {cls.BOXES_FROM_MASKS}, got {way!r}"
            )
        return arguments_without_patterns(cls, cfg) | {"boxes_from_masks": way}

    def make_heads(self, dim: int, num_classes: int) -> None:
        """None of its own, see :meth:`borrow_heads`."""

    def borrow_heads(self, decoder: Decoder) -> None:
        """Ranks and corrects cells with the heads and the norm of this decoder from now on."""
        self._decoder = (decoder,)

    @property
    def heads(self) -> DetectionHeads:
        """Those of the decoder."""
        return self._decoder[0].heads

    def forward(self, memory: Memory) -> ObjectQueries:
        """The matching queries and the proposals that they were chosen as; fewer than Q where the image has fewer cells."""
        memory = memory.reversed_levels()
        boxes, usable = self._propose(memory)
        hidden = self.norm(self.project(memory.tokens * usable[..., None]))
        logits = self.heads.classify(hidden, 0)
        best = self.choose(logits, memory)
        chosen = [take(x, best) for x in (hidden, boxes, usable[..., None])]
        first = self._decoder[0].embed(chosen[0], self.refine(*chosen))
        logits = self.heads.classify(first.hidden, 0)
        proposals = Predictions(logits[None], first.boxes[None], first.mask_embeddings[None], memory.mask_features)
        start = first.boxes.detach() if not self.boxes_from_masks else self.first_boxes(proposals)
        return ObjectQueries(chosen[0].detach(), start, proposals=proposals)

    @torch.no_grad()
    def first_boxes(self, proposals: Predictions) -> Tensor:
        """(N, Q, 4) boxes of the masks of the proposals, image by image, because the maps of all would be large."""
        features = proposals.mask_features
        if torch.compiler.is_exporting():  # the number of images is not known
            corners = boxes_of_masks(proposals.mask_logits() > 0)
        else:
            pairs = zip(proposals.mask_embeddings[0], features, strict=True)
            corners = torch.stack([boxes_of_masks(torch.einsum("qc,chw->qhw", *pair) > 0) for pair in pairs])
        x0, y0, x1, y1 = corners.to(features.dtype).unbind(-1)
        height, width = features.shape[-2:]
        if self.boxes_from_masks == "mask2box":
            empty = x1 == 0
            x0, y0 = x0.masked_fill(empty, 2 * width), y0.masked_fill(empty, 2 * height)  # the centre becomes (1, 1)
            x1, y1 = (x1 - 1).clamp(min=0), (y1 - 1).clamp(min=0)
        relative = torch.stack([x0 / width, y0 / height, x1 / width, y1 / height], -1)
        return logit(xyxy_to_cxcywh(relative), EPS).sigmoid()

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries."""
        return embed_boxes(self.label_encoder, noised, EPS)
