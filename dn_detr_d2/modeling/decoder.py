"""Decoders: from queries and memory to the predictions of every layer. A decoder owns its heads.

Shapes: K layers, N images, Q queries, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import (
    LayerStack,
    MultiScaleDeformableAttention,
    SinePositionEncoding,
    added_to_scores,
    project_values,
)
from ..structures import Memory, ObjectQueries, Predictions
from .decoder_layer import LayerInputs, MaskedDecoderLayer, QueryPosition
from .encoder import transformer_arguments
from .heads import DetectionHeads
from .neck import build_position_encoding
from .reference_update import Detached, LookForwardTwice, References, ReferenceUpdate, Static
from .registry import DECODER_LAYER_REGISTRY, DECODER_REGISTRY, initialise_transformer, lookup


class Decoder(LayerStack):
    """Layers of queries, prediction heads, an optional norm before the heads, and a rule for the reference boxes.

    Args:
        dim: C.
        num_layers: K.
        layer: class of the layers, with its ``Position``.
        layer_arguments: for the layers, all but ``index``.
        heads: of all layers.
        norm: whether a final norm, shared by all layers, stands before the heads; references are corrected from the content
            before it.
        update: how references pass from layer to layer.
        activation_checkpointing: of the layers and their positions, not of the heads; see
            :class:`~dn_detr_d2.layers.LayerStack`.
        initialization: of layers and positions, see :func:`~dn_detr_d2.modeling.registry.initialise_transformer`.
    """

    BOXES = True  # whether the decoder predicts boxes
    PREDICTS_FIRST = False  # whether the queries have predictions before the first layer

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        layer: type,
        layer_arguments: dict,
        heads: DetectionHeads,
        norm: bool,
        update: ReferenceUpdate,
        activation_checkpointing: bool = False,
        initialization: str = "detr",
    ):
        super().__init__(activation_checkpointing)
        self.layers = nn.ModuleList(layer(dim=dim, index=i, **layer_arguments) for i in range(num_layers))
        self.position = layer.Position(dim)
        if num_layers == 1:  # then they get no gradient, for which DistributedDataParallel would wait
            for part in getattr(layer.Position, "AFTER_FIRST", ()):
                getattr(self.position, part).requires_grad_(False)
        initialise_transformer(self, initialization)
        self.heads = heads  # joins after the Xavier pass; its start has a meaning
        self.norm = nn.LayerNorm(dim) if norm else None
        self.update = update

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DECODER``."""
        root = cfg.MODEL.DN_DETR
        node = root.DECODER
        arguments = transformer_arguments(cfg, "DECODER")
        own = {key: arguments.pop(key) for key in ("dim", "num_layers", "activation_checkpointing", "initialization")}
        dim, num_layers = own["dim"], own["num_layers"]
        heads = DetectionHeads(
            dim,
            root.NUM_CLASSES,
            1 if node.SHARE_HEADS else num_layers,
            node.FIRST_SIZE_BIAS,
            node.LOGIT_EPS,
            no_object=root.LOSS.CLASS_LOSS == "softmax",
            class_prior=node.CLASS_PRIOR,
            boxes=cls.BOXES,
            zero_boxes=root.INITIALIZATION != "dn_encoder_only",
            masks=root.MASK.ENABLED,
        )
        return {
            **own,
            "layer": lookup(DECODER_LAYER_REGISTRY, node.LAYER, "MODEL.DN_DETR.DECODER.LAYER"),
            "layer_arguments": {**arguments, "num_levels": root.NUM_FEATURE_LEVELS, "num_points": node.NUM_POINTS},
            "heads": heads,
        }

    def forward(self, queries: ObjectQueries, memory: Memory) -> Predictions:
        """Predictions of all layers, boxes relative to the reference that entered the layer.

        Decoders that predict first give one set more, of the queries as they come.
        """
        content, references = queries.content, References(queries.boxes, queries.boxes)
        queries = replace(queries, blocked=added_to_scores(queries.blocked, queries.isolated, content))
        views = self.views(memory)
        values = self.values(views)
        sets = [self.predict_first(queries)] if self.PREDICTS_FIRST else []
        for i, layer in enumerate(self.layers):
            view = views[i % len(views)]
            blocked = self.blocked_cells(sets, view, queries, i)
            given = (queries, view, i == 0, blocked, values[i])
            content = self.checkpointed(self.step, layer, content, references.entering, *given)
            hidden = content if self.norm is None else self.norm(content)
            sets.append(self.predict(hidden, references.refined, i))
            if i + 1 < len(self.layers):
                references = self.update(references, self._correction(content, references, sets[-1].boxes, i))
        return self.join_sets(sets, memory.mask_features)

    def step(
        self,
        layer: nn.Module,
        content: Tensor,
        boxes: Tensor,
        queries: ObjectQueries,
        memory: Memory,
        first: bool,
        blocked_cells: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """(N, Q, C) -> (N, Q, C): one layer with the positions that it needs."""
        if queries.position is None:
            position = self.position(content, boxes, memory, first=first)
        else:
            position = QueryPosition(queries.position)
        masks = (queries.blocked, blocked_cells, queries.isolated)
        return layer(content, LayerInputs(position, boxes, memory, *masks, value))

    def views(self, memory: Memory) -> list[Memory]:
        """What the layers look at, in turns; here all of the memory."""
        return [memory]

    def values(self, views: list[Memory]) -> list[Tensor | None]:
        """What the deformable attention of each layer samples, in training made for all layers at once; else None.

        Evaluation and activation checkpointing need not hold the values of all layers, so they do not.
        """
        attention = [getattr(layer, "cross_attn", None) for layer in self.layers]
        wanted = self.training and torch.is_grad_enabled() and not self.activation_checkpointing and len(views) == 1
        if not wanted or not all(isinstance(x, MultiScaleDeformableAttention) for x in attention):
            return [None] * len(self.layers)
        return project_values(attention, views[0].tokens, views[0].padding)

    def blocked_cells(
        self, sets: list["LayerOutputs"], view: Memory, queries: ObjectQueries, layer: int
    ) -> Tensor | None:
        """(N, Q, S) bool, which cells of ``view`` a query must not look at in a layer; None = those of the padding."""
        return None

    def predict(self, hidden: Tensor, boxes: Tensor, layer: int) -> "LayerOutputs":
        """Predictions of one layer.

        Args:
            hidden: (N, Q, C) after the final norm, if there is one.
            boxes: (N, Q, 4) references that are corrected.
            layer: index of the layer.
        """
        boxes = self.heads.refine(hidden, boxes, layer) if self.BOXES else None
        return LayerOutputs(hidden, boxes, self.heads.embed_masks(hidden, layer))

    def predict_first(self, queries: ObjectQueries) -> "LayerOutputs":
        """Predictions of the queries before the first layer; their boxes are the references."""
        return self.embed(queries.content, queries.boxes)

    def embed(self, content: Tensor, boxes: Tensor | None, layer: int = 0) -> "LayerOutputs":
        """Predictions from contents before the final norm, by the heads of a layer; boxes as given."""
        hidden = self.norm(content)
        return LayerOutputs(hidden, boxes if self.BOXES else None, self.heads.embed_masks(hidden, layer))

    def join_sets(self, sets: list["LayerOutputs"], mask_features: Tensor | None) -> Predictions:
        """The predictions of K sets as one; classes are predicted here, for all layers at once."""
        before = len(sets) - len(self.layers)
        columns = ([getattr(x, name) for x in sets] for name in ("hidden", "boxes", "mask_embeddings"))
        hidden, boxes, embeddings = (None if column[0] is None else torch.stack(column) for column in columns)
        logits = self.heads.classify_layers(hidden, [max(i - before, 0) for i in range(len(sets))])
        return Predictions(logits, boxes, embeddings, None if embeddings is None else mask_features, before)

    def _correction(
        self, content: Tensor, references: References, predicted: Tensor, layer: int
    ) -> Callable[[], Tensor]:
        """Gives the entering references corrected from the content before the norm; often that is what was predicted."""
        if self.norm is None and references.refined is references.entering:
            return lambda: predicted
        return lambda: self.heads.refine(content, references.entering, layer)


@dataclass
class LayerOutputs:
    """Of one layer: (N, Q, C) what classes are predicted from, (N, Q, 4) boxes and (N, Q, C) mask embeddings, or None."""

    hidden: Tensor
    boxes: Tensor | None
    mask_embeddings: Tensor | None


class MaskedDecoder(Decoder):
    """Mask2Former's decoder (Cheng et al., CVPR 2022, Sec. 3.2): each layer looks at one level, inside the predicted masks.

    The mask that the set before predicts, resized to the level, says which cells a query looks at; where it covers none, the
    query looks at all of them. The queries before the first layer have predictions too, and there are no boxes.

    Args:
        dim: C.
        num_levels: of the memory, coarsest first; layer i looks at level i modulo their number.
        position_encoding: of the cells.
        mask_layers: of how many layers, from the first, denoising queries look inside their noised masks instead.
        arguments: as for :class:`Decoder`.
    """

    BOXES = False
    PREDICTS_FIRST = True

    @configurable
    def __init__(
        self, *, dim: int, num_levels: int, position_encoding: SinePositionEncoding, mask_layers: int = 1, **arguments
    ):
        super().__init__(dim=dim, **arguments)
        self.level_embed = nn.Embedding(num_levels, dim)
        self.position_encoding, self.mask_layers = position_encoding, mask_layers

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR``; refuses layers that look at whole levels."""
        root = cfg.MODEL.DN_DETR
        arguments = super().from_config(cfg)
        if not root.MASK.ENABLED or not issubclass(arguments["layer"], MaskedDecoderLayer):
            raise ConfigError(
                "MODEL.DN_DETR.DECODER.NAME = 'MaskedDecoder' needs MASK.ENABLED True and DECODER.LAYER "
                f"'MaskedDecoderLayer', got {root.MASK.ENABLED} and {root.DECODER.LAYER!r}"
            )
        return arguments | {
            "num_levels": root.NUM_FEATURE_LEVELS,
            "position_encoding": build_position_encoding(cfg),
            "mask_layers": root.DENOISING.MASK_LAYERS,
        }

    def views(self, memory: Memory) -> list[Memory]:
        """One level each, with its own embedding added to the tokens and its sine encoding; mask features of its size."""
        cells = (memory.of_levels(x) for x in (memory.tokens, memory.padding))
        levels = zip(*cells, memory.shapes, self.level_embed.weight, strict=True)
        features = memory.mask_features.detach()
        return [
            Memory(
                tokens + embed,
                self.position_encoding(padding.unflatten(1, shape)).flatten(2).transpose(1, 2).to(tokens.dtype),
                padding,
                [shape],
                memory.valid_ratios,
                mask_features=F.interpolate(features, shape, mode="bilinear", align_corners=False),
            )
            for tokens, padding, shape, embed in levels
        ]

    @torch.no_grad()
    def blocked_cells(
        self, sets: list[LayerOutputs], view: Memory, queries: ObjectQueries, layer: int
    ) -> Tensor | None:
        """Cells outside of the mask that was predicted last, or of the noised one; none where that would be all cells."""
        blocked = self.outside(sets[-1].mask_embeddings, view)
        if queries.noised_cells is not None and layer < self.mask_layers:
            cells = queries.noised_cells(view.shapes[0]).flatten(2)
            blocked = torch.cat([~cells, blocked[:, cells.shape[1] :]], 1)
        blocked = blocked | view.padding[:, None]
        return blocked & ~blocked.all(-1, keepdim=True)

    def outside(self, embeddings: Tensor, view: Memory) -> Tensor:
        """(N, Q, S) bool, cells of a level outside of the masks of (N, Q, C) embeddings.

        Resizing is linear, so the features are resized instead of the masks, once a level.
        """
        return torch.einsum("nqc,ncs->nqs", embeddings, view.mask_features.flatten(2)) < 0


class MaskDinoDecoder(Decoder):
    """Mask DINO's decoder (Li et al., CVPR 2023): DINO's with masks, and with predictions before the first layer.

    It sees the levels in the reverse order of the encoder. Classes and masks are predicted from contents that pass the final
    norm twice, as in the authors' code.
    """

    PREDICTS_FIRST = True

    @classmethod
    def from_config(cls, cfg) -> dict:
        """As of :class:`Decoder`; refuses a config without masks."""
        if not cfg.MODEL.DN_DETR.MASK.ENABLED:
            raise ConfigError("MODEL.DN_DETR.DECODER.NAME = 'MaskDinoDecoder' needs MASK.ENABLED True, got False")
        return super().from_config(cfg)

    def views(self, memory: Memory) -> list[Memory]:
        """All levels, the encoder's last one first."""
        return [memory.reversed_levels()]

    def predict(self, hidden: Tensor, boxes: Tensor, layer: int) -> LayerOutputs:
        """As of :class:`Decoder`, classes and masks from the content normed once more."""
        return self.embed(hidden, self.heads.refine(hidden, boxes, layer), layer)


# Registered name -> (class, final norm, rule). The names are those of MODEL.DN_DETR.DECODER.NAME.
DECODERS = {
    "RefiningDecoder": (Decoder, False, Detached),  # Deformable DETR with box refinement, DAB-Deformable-DETR
    "StaticDecoder": (Decoder, False, Static),  # plain Deformable DETR, Anchor DETR
    "NormalisedStaticDecoder": (Decoder, True, Static),  # DETR
    "LookForwardOnceDecoder": (Decoder, True, Detached),  # DINO's ablation without looking forward twice
    "LookForwardTwiceDecoder": (Decoder, True, LookForwardTwice),  # DAB-DETR, DN-DETR, DINO
    "PlainLookForwardTwiceDecoder": (Decoder, False, LookForwardTwice),  # the DINO-like model in the DN-DETR repository
    "MaskedDecoder": (MaskedDecoder, True, Static),  # Mask2Former
    "MaskDinoDecoder": (MaskDinoDecoder, True, LookForwardTwice),  # Mask DINO
}


def _register(name: str, decoder: type[Decoder], norm: bool, rule: type[ReferenceUpdate]) -> None:
    def _build(cfg) -> Decoder:
        return decoder(cfg, norm=norm, update=rule())

    _build.__name__ = _build.__qualname__ = name
    DECODER_REGISTRY.register(_build)


for _name, _parts in DECODERS.items():
    _register(_name, *_parts)
