"""Decoders: from queries and memory to the predictions of every layer. A decoder owns its heads.

Shapes: K layers, N images, Q queries, C channels.
"""

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import LayerStack
from ..structures import Memory, ObjectQueries, Predictions
from .build import DECODER_LAYER_REGISTRY, DECODER_REGISTRY, initialise_transformer, lookup
from .decoder_layer import QueryPosition
from .encoder import transformer_arguments
from .heads import DetectionHeads


@DECODER_REGISTRY.register()
class RefiningDecoder(LayerStack):
    """A query's position is its box, and every layer corrects the box (Deformable DETR, DAB-Deformable-DETR).

    The gradient stops between layers: each corrects what the one before said, and is not to blame for it.

    Args:
        dim: C.
        num_layers: K.
        layer: class of the layers, with its ``Position``.
        layer_arguments: for the layers, all but ``index``.
        heads: of all layers.
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
        content, reference = queries.content, queries.boxes
        seen, logits, boxes = reference, [], []  # `seen` is the reference as the layer sees it
        for i, layer in enumerate(self.layers):
            content = self.run(self.step, layer, content, seen, queries, memory, i == 0)
            hidden = self.normalise(content)
            logits.append(self.heads.classify(hidden, i))
            boxes.append(self.heads.refine(hidden, reference, i))
            if i + 1 < len(self.layers):
                reference = self.next_reference(content, seen, boxes[-1], i)
                seen = self.enter_layer(reference)
        return Predictions(torch.stack(logits), torch.stack(boxes))

    def step(
        self, layer: nn.Module, content: Tensor, seen: Tensor, queries: ObjectQueries, memory: Memory, first: bool
    ) -> Tensor:
        """(N, Q, C) -> (N, Q, C): one layer with the positions that it needs."""
        if queries.position is None:
            position = self.position(content, seen, memory, first=first)
        else:
            position = QueryPosition(queries.position)
        return layer(content, position, seen, memory, queries.blocked)

    def normalise(self, content: Tensor) -> Tensor:
        """What the heads get; here the content as it is."""
        return content

    def enter_layer(self, reference: Tensor) -> Tensor:
        """The reference as the next layer sees it."""
        return reference.detach()

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """(N, Q, 4) reference of the next layer: the predicted boxes, without gradient."""
        return predicted.detach()


@DECODER_REGISTRY.register()
class PlainLookForwardTwiceDecoder(RefiningDecoder):
    """Looks forward twice without a final norm (the DINO-like model in the DN-DETR repository)."""

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """The predicted boxes, with a gradient towards this layer's correction but not to the layers before."""
        return self.heads.refine(content, seen, layer)


@DECODER_REGISTRY.register()
class StaticDecoder(RefiningDecoder):
    """Every layer predicts from the references of the start (plain Deformable DETR)."""

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """The same again, with its gradient."""
        return seen

    def enter_layer(self, reference: Tensor) -> Tensor:
        """As it is: the loss of every layer reaches it."""
        return reference


@DECODER_REGISTRY.register()
class LookForwardOnceDecoder(RefiningDecoder):
    """A final norm stands before the heads, while the next reference is refined from the content before that norm.

    The gradient stops between layers: DINO's ablation without looking forward twice.
    """

    @configurable
    def __init__(self, *, dim: int, **arguments):
        super().__init__(dim=dim, **arguments)
        self.norm = nn.LayerNorm(dim)

    def normalise(self, content: Tensor) -> Tensor:
        """One norm shared by all layers."""
        return self.norm(content)

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """Refined from the content before the norm, without gradient."""
        return self.heads.refine(content, seen, layer).detach()


@DECODER_REGISTRY.register()
class NormalisedStaticDecoder(LookForwardOnceDecoder):
    """A final norm, and every layer predicts from the references of the start (DETR)."""

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """The same again."""
        return seen


@DECODER_REGISTRY.register()
class LookForwardTwiceDecoder(LookForwardOnceDecoder):
    """The loss of layer i + 1 also reaches the box of layer i (DINO Sec. 3.5; DAB-DETR and DN-DETR do it unnamed)."""

    def next_reference(self, content: Tensor, seen: Tensor, predicted: Tensor, layer: int) -> Tensor:
        """Refined from the content before the norm; keeps its gradient towards this layer's box."""
        return self.heads.refine(content, seen, layer)
