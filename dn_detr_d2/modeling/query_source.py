"""Where queries come from, and how a box and a label become one: ``embed`` is the plug of denoising.

Shapes: N images, Q matching queries, D denoising queries, C channels, P classes.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..denoising import LabelEncoder, NoisedTargets, embed_boxes
from ..errors import ConfigError
from ..layers import sine_encoding
from ..structures import Memory, ObjectQueries, Predictions, Targets, slice_queries
from .encoder import cell_points
from .heads import DetectionHeads
from .registry import QUERY_SOURCE_REGISTRY


def common_arguments(root) -> dict:
    """The constructor arguments that all sources share, from ``MODEL.DN_DETR``."""
    return {
        "num_queries": root.NUM_QUERIES,
        "dim": root.HIDDEN_DIM,
        "num_classes": root.NUM_CLASSES,
        "denoising": bool(root.DENOISING.NAME),
    }


def without_size(points: Tensor) -> Tensor:
    """(..., 2) centres -> (..., 4) references whose width and height are not known: 0.5."""
    return F.pad(points, (0, 2), value=0.5)


def refuse_patterns(root, name: str) -> None:
    """Raises ConfigError if a source without content patterns is asked for some, or for no query."""
    if root.QUERY_SOURCE.NUM_PATTERNS or root.NUM_QUERIES < 1:
        raise ConfigError(
            f"MODEL.DN_DETR.QUERY_SOURCE.NAME = {name!r} needs QUERY_SOURCE.NUM_PATTERNS 0 and NUM_QUERIES above 0, got "
            f"{root.QUERY_SOURCE.NUM_PATTERNS} and {root.NUM_QUERIES}"
        )


def arguments_without_patterns(cls, cfg) -> dict:
    """Constructor arguments from ``MODEL.DN_DETR`` of a source that patterns do not go with; a ``from_config``."""
    root = cfg.MODEL.DN_DETR
    refuse_patterns(root, cls.__name__)
    return common_arguments(root)


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
        xavier_patterns: whether patterns start from Xavier instead of N(0, 1).
    """

    CONTENTS = ("zero", "unknown", "learned")

    @configurable
    def __init__(
        self,
        *,
        num_queries: int,
        dim: int,
        num_classes: int,
        content: str,
        num_patterns: int,
        denoising: bool,
        xavier_patterns: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.anchors = nn.Embedding(num_queries, 4)  # logits
        self.patterns = nn.Embedding(num_patterns, dim) if num_patterns else None
        if num_patterns and xavier_patterns:
            nn.init.xavier_uniform_(self.patterns.weight)
        self.label_encoder = LabelEncoder(num_classes, dim) if denoising or content == "unknown" else None
        self.content = nn.Embedding(num_queries, dim - denoising) if content == "learned" else None
        self.num_queries = num_queries * max(num_patterns, 1)

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
        return common_arguments(root) | {
            "content": node.CONTENT,
            "num_patterns": node.NUM_PATTERNS,
            "xavier_patterns": root.INITIALIZATION == "dn_encoder_only",
        }

    def forward(self, memory: Memory) -> ObjectQueries:
        """The matching queries, the same for every image."""
        copies = max(len(self.patterns.weight) if self.patterns is not None else 0, 1)
        content, boxes = self._content().tile(copies, 1), self.anchors.weight.sigmoid().tile(copies, 1)
        n = memory.tokens.shape[0]
        return ObjectQueries(self._add_patterns(content).expand(n, -1, -1), boxes.expand(n, -1, -1))

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries."""
        return embed_boxes(self.label_encoder, noised)

    @property
    def takes_labels(self) -> bool:
        """Whether :meth:`prompt` can be called: content that is learned has no label that another could replace."""
        return self.content is None and self.label_encoder is not None

    def prompt(self, queries: ObjectQueries, labels: Tensor) -> ObjectQueries:
        """The matching queries with the embedding of a label, (N,) one an image, in the place of the unknown one."""
        content = self.label_encoder.prompt(labels)[:, None].expand_as(queries.content)
        return replace(queries, content=self._add_patterns(content))

    def _add_patterns(self, content: Tensor) -> Tensor:
        """(..., Q, C) with the pattern of each query, if there are patterns."""
        if self.patterns is None:
            return content
        return content + self.patterns.weight.repeat_interleave(len(self.anchors.weight), 0)

    def _content(self) -> Tensor:
        """(num_queries, C) content of the anchors."""
        if self.content is not None:
            return F.pad(self.content.weight, (0, self.dim - self.content.weight.shape[1]))
        if self.label_encoder is not None:
            return self.label_encoder.unknown().expand(len(self.anchors.weight), -1)
        return torch.zeros_like(self.anchors.weight[:, :1]).expand(-1, self.dim)


@QUERY_SOURCE_REGISTRY.register()
class LearnedPositions(nn.Module):
    """DETR's object queries: learned positions, no content and no reference box.

    A denoising query's position is a linear function of the noised box, (cx, cy, w, h) as it is, plus the embedding of the
    noised label (DN-DETR, TPAMI 2024); no indicator, because matching queries are free vectors without a place for one.

    Args:
        num_queries: Q.
        dim: C.
        num_classes: P.
        denoising: whether ``embed`` will be called.
    """

    PARTS = 1  # of a row: the position

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int = 1, denoising: bool = False):
        super().__init__()
        self.num_queries = num_queries
        self.queries = nn.Embedding(num_queries, self.PARTS * dim)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False) if denoising else None
        self.box_embed = nn.Linear(4, dim) if denoising else None
        if self.box_embed is not None:
            nn.init.xavier_uniform_(self.box_embed.weight)
            nn.init.zeros_(self.box_embed.bias)

    from_config = classmethod(arguments_without_patterns)

    def forward(self, memory: Memory) -> ObjectQueries:
        """The same queries for every image; with 0.5 as reference the box heads say the box itself."""
        position = self.queries.weight.expand(memory.tokens.shape[0], -1, -1)
        boxes = torch.full_like(position[..., :4], 0.5)
        return ObjectQueries(torch.zeros_like(position), boxes, position=position)

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries; like the matching ones they have no content and no reference."""
        position = self.box_position(noised) + self.label_encoder(noised)
        boxes = torch.full_like(noised.boxes, 0.5)
        return ObjectQueries(torch.zeros_like(position), boxes, position=position)

    @property
    def takes_labels(self) -> bool:
        """Whether :meth:`prompt` can be called."""
        return self.label_encoder is not None

    def prompt(self, queries: ObjectQueries, labels: Tensor) -> ObjectQueries:
        """The matching queries with the embedding of a label, (N,) one an image, added to each position."""
        return replace(queries, position=queries.position + self.label_encoder.prompt(labels)[:, None])

    def box_position(self, noised: NoisedTargets) -> Tensor:
        """(N, D, C) linear function of the noised boxes; zeros where padded."""
        return self.box_embed(noised.boxes) * noised.valid[..., None]


@QUERY_SOURCE_REGISTRY.register()
class LearnedQueries(LearnedPositions):
    """Learned positions and contents of Deformable DETR; the position says where the reference point is.

    A denoising query's position is a linear function of the noised box, its reference point the centre of that box, and its
    content the embedding of the noised label. The papers do not say how; this follows DETR's and Anchor DETR's denoising.

    Args:
        num_queries, dim, num_classes, denoising: as for :class:`LearnedPositions`.
    """

    PARTS = 2  # position, then content

    @configurable
    def __init__(self, *, dim: int, **arguments):
        super().__init__(dim=dim, **arguments)
        self.reference = nn.Linear(dim, 2)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)

    def forward(self, memory: Memory) -> ObjectQueries:
        """The same queries for every image; width and height of their references are not known yet: 0.5."""
        position, content = self.queries.weight.expand(memory.tokens.shape[0], -1, -1).chunk(2, -1)
        with torch.autocast(position.device.type, enabled=False):  # boxes are float32
            points = self.reference(position).sigmoid()
        return ObjectQueries(content, without_size(points), position=position)

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries; width and height of their references are 0.5, as those of the matching queries."""
        boxes = without_size(noised.boxes[..., :2])
        return ObjectQueries(self.label_encoder(noised), boxes, position=self.box_position(noised))

    def prompt(self, queries: ObjectQueries, labels: Tensor) -> ObjectQueries:
        """The matching queries with the embedding of a label, (N,) one an image, as content."""
        return replace(queries, content=self.label_encoder.prompt(labels)[:, None].expand_as(queries.content))


@QUERY_SOURCE_REGISTRY.register()
class LearnedPoints(nn.Module):
    """Anchor DETR's queries: learned anchor points, each with several content patterns.

    A denoising query's point is the centre of the noised box, and its content the embedding of the noised label, in the
    place of a pattern (DN-DETR, TPAMI 2024).

    Args:
        num_queries: points; Q = num_queries * num_patterns, pattern-major.
        dim: C.
        num_patterns: at least 1.
        num_classes: P.
        denoising: whether ``embed`` will be called.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_patterns: int, num_classes: int = 1, denoising: bool = False):
        super().__init__()
        self.num_queries = num_queries * num_patterns
        self.points = nn.Embedding(num_queries, 2)  # in [0, 1], not logits
        self.patterns = nn.Embedding(num_patterns, dim)
        nn.init.uniform_(self.points.weight)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False) if denoising else None

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR``."""
        root = cfg.MODEL.DN_DETR
        patterns = root.QUERY_SOURCE.NUM_PATTERNS
        if patterns < 1 or root.NUM_QUERIES < 1:
            raise ConfigError(
                "MODEL.DN_DETR.QUERY_SOURCE.NAME = 'LearnedPoints' needs QUERY_SOURCE.NUM_PATTERNS and NUM_QUERIES above 0, "
                f"got {patterns} and {root.NUM_QUERIES}"
            )
        return common_arguments(root) | {"num_patterns": patterns}

    def forward(self, memory: Memory) -> ObjectQueries:
        """The same queries for every image; width and height of their references are not known: 0.5."""
        content = self.patterns.weight.repeat_interleave(len(self.points.weight), 0)
        boxes = without_size(self.points.weight).tile(len(self.patterns.weight), 1)
        n = memory.tokens.shape[0]
        return ObjectQueries(content.expand(n, -1, -1), boxes.expand(n, -1, -1))

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries: one for each noised object, whatever the number of patterns."""
        return ObjectQueries(self.label_encoder(noised), without_size(noised.boxes[..., :2]))

    @property
    def takes_labels(self) -> bool:
        """Whether :meth:`prompt` can be called."""
        return self.label_encoder is not None

    def prompt(self, queries: ObjectQueries, labels: Tensor) -> ObjectQueries:
        """One matching query for each point, with the embedding of a label, (N,) one an image, in the place of a pattern."""
        points = slice_queries(queries, slice(len(self.points.weight)))
        content = self.label_encoder.prompt(labels)[:, None].expand_as(points.content)
        # or the patterns would have no gradient, for which DistributedDataParallel would wait
        return replace(points, content=content + 0 * self.patterns.weight.sum())


@QUERY_SOURCE_REGISTRY.register()
class TopKAnchors(nn.Module):
    """Two-stage queries of DINO (Zhang et al., ICLR 2023, Sec. 3.4): the cells most like an object give the anchors.

    Every cell of the memory proposes a box around itself, whose side is 0.05 * 2^l of the image on level l; a class head
    ranks the cells, a box head corrects the Q best. Their boxes, without gradient, are the anchors.

    Args:
        num_queries: Q.
        dim: C.
        num_classes: P.
        content: "learned" (mixed query selection: contents stay learned) or "memory" (pure query selection: contents are the
            chosen cells, without gradient).
        denoising: whether ``embed`` will be called.
    """

    CONTENTS = ("learned", "memory")
    SIDE = 0.05  # of a proposal on the finest level
    MARGIN = 0.01  # proposals that reach closer to 0 or 1 are not used
    XAVIER = True  # whether the projection of the cells starts from Xavier, or as PyTorch's linear layers do
    ALL_CELLS_LEARN = False  # whether proposals have losses that were not chosen

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int, content: str, denoising: bool):
        super().__init__()
        self.num_queries = num_queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        if self.XAVIER:
            nn.init.xavier_uniform_(self.project.weight)
        self.make_heads(dim, num_classes)
        self.content = nn.Embedding(num_queries, dim) if content == "learned" else None
        if self.content is not None:
            nn.init.xavier_uniform_(self.content.weight)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False) if denoising else None

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR`` and its ``QUERY_SOURCE``."""
        root = cfg.MODEL.DN_DETR
        node = root.QUERY_SOURCE
        if node.CONTENT not in cls.CONTENTS:
            raise ConfigError(
                f"MODEL.DN_DETR.QUERY_SOURCE.CONTENT must be one of {cls.CONTENTS} with TopKAnchors, got {node.CONTENT!r}"
            )
        if root.NUM_QUERIES < 1 or node.NUM_PATTERNS:
            raise ConfigError(
                f"MODEL.DN_DETR.NUM_QUERIES = {root.NUM_QUERIES} must be positive, and QUERY_SOURCE.NUM_PATTERNS = "
                f"{node.NUM_PATTERNS} must be 0 with TopKAnchors"
            )
        return common_arguments(root) | {"content": node.CONTENT}

    @property
    def cells_needed(self) -> int:
        """So many cells, or the image has fewer queries."""
        return self.num_queries

    def make_heads(self, dim: int, num_classes: int) -> None:
        """The heads that rank and correct the cells."""
        self.heads = DetectionHeads(dim, num_classes, 1)

    def forward(self, memory: Memory) -> ObjectQueries:
        """The matching queries and what they were chosen from; fewer than Q where the image has fewer cells."""
        boxes, usable = self._propose(memory)
        hidden = self.norm(self.project(memory.tokens * usable[..., None]))
        logits = self.heads.classify(hidden, 0)
        best = self.choose(logits, memory)
        chosen = [take(x, best) for x in (hidden, boxes, usable[..., None])]
        refined = self.refine(*chosen)
        proposals = Predictions(take(logits, best)[None], refined[None])
        if self.ALL_CELLS_LEARN and memory.losses_wanted:
            proposals = Predictions(logits[None], self.refine(hidden, boxes, usable[..., None])[None])
        return ObjectQueries(*self.make_queries(chosen[0].detach(), refined.detach()), proposals=proposals)

    def refine(self, hidden: Tensor, boxes: Tensor, usable: Tensor) -> Tensor:
        """Corrected boxes; 1 throughout where a cell may not be used."""
        return self.heads.refine(hidden, boxes, 0).masked_fill(~usable, 1.0)

    def choose(self, logits: Tensor, memory: Memory) -> Tensor:
        """(N, Q) the cells most like an object by their (N, S, P) logits; padding may be among them unless it is hidden."""
        scores = self.score_cells(logits)
        if memory.hides_padding:
            scores = scores.masked_fill(memory.padding, -torch.inf)
        return scores.topk(torch.sym_min(self.num_queries, logits.shape[1]), 1).indices

    def score_cells(self, logits: Tensor) -> Tensor:
        """(N, S, P) class logits -> (N, S) how much a cell looks like an object."""
        return logits.amax(-1)

    def make_queries(self, hidden: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """(content, boxes) of queries at the chosen cells, (N, Q, C) and (N, Q, 4) without gradient."""
        if self.content is None:
            return hidden, boxes
        return self.content.weight[: hidden.shape[1]].expand(hidden.shape[0], -1, -1), boxes

    def proposal_targets(self, targets: Targets) -> Targets:
        """What the loss of the proposals asks for."""
        return targets

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries."""
        return embed_boxes(self.label_encoder, noised)

    def _propose(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """(N, S, 4) box of each cell, and (N, S) whether it may be used: not padding, and not at the border."""
        points = cell_points(memory)
        sides = [points.new_full((h * w,), self.SIDE * 2**level) for level, (h, w) in enumerate(memory.shapes)]
        sides = torch.cat(sides)[None, :, None].expand(points.shape[0], -1, 2)
        boxes = torch.cat([points, sides], -1)
        inside = ((boxes > self.MARGIN) & (boxes < 1 - self.MARGIN)).all(-1)
        return boxes, inside & ~memory.padding


@QUERY_SOURCE_REGISTRY.register()
class ObjectnessAnchors(TopKAnchors):
    """Two-stage queries of the DINO-like model in the DN-DETR repository.

    Only "object or not" is learned of the proposals: the first class stands for all, and every cell has a loss. Denoising
    contents carry DN-DETR's indicator, which the learned contents of the matching queries do not have room for.

    Args:
        num_queries, dim, num_classes, content, denoising: as for :class:`TopKAnchors`.
    """

    ALL_CELLS_LEARN = True

    @configurable
    def __init__(self, *, dim: int, num_classes: int, denoising: bool, **arguments):
        super().__init__(dim=dim, num_classes=num_classes, denoising=False, **arguments)
        self.label_encoder = LabelEncoder(num_classes, dim) if denoising else None

    def score_cells(self, logits: Tensor) -> Tensor:
        """The logit of the class that stands for all."""
        return logits[..., 0]

    def proposal_targets(self, targets: Targets) -> Targets:
        """All objects are of the first class."""
        return replace(targets, labels=torch.zeros_like(targets.labels))


@QUERY_SOURCE_REGISTRY.register()
class TwoStageQueries(ObjectnessAnchors):
    """Two-stage Deformable DETR: position and content of a query are made from the box of its cell.

    A denoising query's position is made from the noised box in the same way, its reference is that box, and its content the
    embedding of the noised label. The papers do not say how.

    Args:
        num_queries: Q.
        dim: C, divisible by 4.
        num_classes: P.
        denoising: whether ``embed`` will be called.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int, num_classes: int, denoising: bool = False):
        super().__init__(num_queries=num_queries, dim=dim, num_classes=num_classes, content="memory", denoising=False)
        self.heads.logit_eps = 1e-5
        self.transform = nn.Linear(2 * dim, 2 * dim)
        self.transform_norm = nn.LayerNorm(2 * dim)
        nn.init.xavier_uniform_(self.transform.weight)
        self.label_encoder = LabelEncoder(num_classes, dim, indicator=False) if denoising else None

    from_config = classmethod(arguments_without_patterns)

    def make_queries(self, hidden: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """(content, boxes, no mask, position)."""
        position, content = self.position_and_content(boxes)
        return content, boxes, None, position

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries."""
        queries = embed_boxes(self.label_encoder, noised)
        position, _ = self.position_and_content(queries.boxes)
        return replace(queries, position=position * noised.valid[..., None])

    def position_and_content(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """(N, Q, 4) -> (position, content), (N, Q, C) each. Encoded in the order x, y, w, h here, unlike anywhere else."""
        width = self.transform.in_features // 4
        sine = sine_encoding(boxes * (2 * math.pi), width).flatten(-2)
        return self.transform_norm(self.transform(sine)).chunk(2, -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (N, S, E) at (N, Q) -> (N, Q, E)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
