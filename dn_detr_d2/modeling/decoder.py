"""Decoders: from queries and memory to the predictions of every layer. A decoder owns its heads.

Shapes: K layers, N images, Q queries, C channels.
"""

from collections.abc import Callable

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import LayerStack
from ..structures import Memory, ObjectQueries, Predictions
from .decoder_layer import LayerInputs, QueryPosition
from .encoder import transformer_arguments
from .heads import DetectionHeads
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
    """

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
    ):
        super().__init__(activation_checkpointing)
        self.layers = nn.ModuleList(layer(dim=dim, index=i, **layer_arguments) for i in range(num_layers))
        self.position = layer.Position(dim)
        if num_layers == 1:  # then they get no gradient, for which DistributedDataParallel would wait
            for part in getattr(layer.Position, "AFTER_FIRST", ()):
                getattr(self.position, part).requires_grad_(False)
        initialise_transformer(self)
        self.heads = heads  # joins after the Xavier pass; its start has a meaning
        self.norm = nn.LayerNorm(dim) if norm else None
        self.update = update

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DECODER``."""
        root = cfg.MODEL.DN_DETR
        node = root.DECODER
        arguments = transformer_arguments(cfg, "DECODER")
        own = {key: arguments.pop(key) for key in ("dim", "num_layers", "activation_checkpointing")}
        dim, num_layers = own["dim"], own["num_layers"]
        heads = DetectionHeads(
            dim,
            root.NUM_CLASSES,
            1 if node.SHARE_HEADS else num_layers,
            node.FIRST_SIZE_BIAS,
            node.LOGIT_EPS,
            no_object=root.LOSS.CLASS_LOSS == "softmax",
        )
        return {
            **own,
            "layer": lookup(DECODER_LAYER_REGISTRY, node.LAYER, "MODEL.DN_DETR.DECODER.LAYER"),
            "layer_arguments": {**arguments, "num_levels": root.NUM_FEATURE_LEVELS, "num_points": node.NUM_POINTS},
            "heads": heads,
        }

    def forward(self, queries: ObjectQueries, memory: Memory) -> Predictions:
        """Predictions of all layers, boxes relative to the reference that entered the layer."""
        content, references = queries.content, References(queries.boxes, queries.boxes)
        logits, boxes = [], []
        for i, layer in enumerate(self.layers):
            content = self.checkpointed(self.step, layer, content, references.entering, queries, memory, i == 0)
            hidden = content if self.norm is None else self.norm(content)
            logits.append(self.heads.classify(hidden, i))
            boxes.append(self.heads.refine(hidden, references.refined, i))
            if i + 1 < len(self.layers):
                references = self.update(references, self._correction(content, references, boxes[-1], i))
        return Predictions(torch.stack(logits), torch.stack(boxes))

    def step(
        self, layer: nn.Module, content: Tensor, boxes: Tensor, queries: ObjectQueries, memory: Memory, first: bool
    ) -> Tensor:
        """(N, Q, C) -> (N, Q, C): one layer with the positions that it needs."""
        if queries.position is None:
            position = self.position(content, boxes, memory, first=first)
        else:
            position = QueryPosition(queries.position)
        return layer(content, LayerInputs(position, boxes, memory, queries.blocked))

    def _correction(
        self, content: Tensor, references: References, predicted: Tensor, layer: int
    ) -> Callable[[], Tensor]:
        """Gives the entering references corrected from the content before the norm; often that is what was predicted."""
        if self.norm is None and references.refined is references.entering:
            return lambda: predicted
        return lambda: self.heads.refine(content, references.entering, layer)


# Registered name -> (final norm, rule). The names are those of MODEL.DN_DETR.DECODER.NAME.
DECODERS = {
    "RefiningDecoder": (False, Detached),  # Deformable DETR with box refinement, DAB-Deformable-DETR
    "StaticDecoder": (False, Static),  # plain Deformable DETR, Anchor DETR
    "NormalisedStaticDecoder": (True, Static),  # DETR
    "LookForwardOnceDecoder": (True, Detached),  # DINO's ablation without looking forward twice
    "LookForwardTwiceDecoder": (True, LookForwardTwice),  # DAB-DETR, DN-DETR, DINO
    "PlainLookForwardTwiceDecoder": (False, LookForwardTwice),  # the DINO-like model in the DN-DETR repository
}


def _register(name: str, norm: bool, rule: type[ReferenceUpdate]) -> None:
    def _build(cfg) -> Decoder:
        return Decoder(cfg, norm=norm, update=rule())

    _build.__name__ = _build.__qualname__ = name
    DECODER_REGISTRY.register(_build)


for _name, (_norm, _rule) in DECODERS.items():
    _register(_name, _norm, _rule)
