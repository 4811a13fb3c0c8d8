"""Prediction heads: class logits, and boxes as a correction of a reference box in logit space."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..boxes import LOGIT_EPS, logit
from ..layers import MLP, map_together
from ..losses.functional import float32

# Start with a foreground probability of 0.01 (focal loss, RetinaNet Sec. 3.3).
PRIOR_PROB = 0.01


class DetectionHeads(nn.Module):
    """Class, box and mask heads of all decoder layers; the decoder owns them.

    Args:
        dim: channels C of the input.
        num_classes: P.
        num_heads: 1 for heads shared by all layers, otherwise one a layer.
        first_size_bias: start of the width and height logits of the first head; -2 lets Deformable DETR begin with
            small boxes, 0 keeps the reference.
        logit_eps: clamp of the reference's logit.
        no_object: give each class head one logit more, the last, for "no object" (DETR). Then no head starts from a
            prior, as in DETR.
        class_prior: whether class heads without "no object" start at the probability :data:`PRIOR_PROB`.
        boxes: whether there are box heads; Mask2Former has none.
        masks: whether there are mask heads (Mask2Former, Mask DINO).
        zero_boxes: whether box heads start from zero, so that the first boxes are the references; in DETR they never do.
    """

    FLOAT32 = ("box_heads",)  # children that run without autocast

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_heads: int,
        first_size_bias: float = 0.0,
        logit_eps: float = LOGIT_EPS,
        no_object: bool = False,
        class_prior: bool = True,
        boxes: bool = True,
        masks: bool = False,
        zero_boxes: bool = True,
    ):
        super().__init__()
        self.logit_eps = logit_eps
        classify, refine = nn.Linear(dim, num_classes), MLP(dim, dim, dim, 4)
        if class_prior and not no_object:
            nn.init.constant_(classify.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))
        if zero_boxes and (masks or not no_object):
            nn.init.zeros_(refine.layers[-1].weight)
            nn.init.zeros_(refine.layers[-1].bias)
        self.class_heads = nn.ModuleList(copy.deepcopy(classify) for _ in range(num_heads))
        self.box_heads = nn.ModuleList(copy.deepcopy(refine) for _ in range(num_heads if boxes else 0))
        # Beside the class heads and not in them, so that their rows are always the classes.
        self.no_object_heads = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_heads if no_object else 0))
        self.mask_heads = nn.ModuleList(MLP(dim, dim, dim, dim) for _ in range(num_heads if masks else 0))
        if first_size_bias and boxes:
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], first_size_bias)

    def classify(self, content: Tensor, layer: int) -> Tensor:
        """(..., C) -> (..., P) logits of decoder layer ``layer``; (..., P + 1) with one for "no object"."""
        logits = self.class_heads[layer % len(self.class_heads)](content)
        if not self.no_object_heads:
            return logits
        return torch.cat([logits, self.no_object_heads[layer % len(self.no_object_heads)](content)], -1)

    def classify_layers(self, contents: Tensor, layers: Sequence[int]) -> Tensor:
        """:meth:`classify` of several decoder layers: (K, ..., C) contents, one set a layer -> (K, ..., P)."""
        if len(self.class_heads) == 1:
            return self.classify(contents, 0)
        if self.no_object_heads or not torch.is_grad_enabled():  # fewer operators count in training
            return torch.stack([self.classify(x, i) for x, i in zip(contents, layers, strict=True)])
        heads = [self.class_heads[i % len(self.class_heads)] for i in layers]
        return map_together(heads, contents.flatten(1, -2)).unflatten(1, contents.shape[1:-1])

    def embed_masks(self, content: Tensor, layer: int) -> Tensor | None:
        """(..., C) -> (..., C) mask embeddings of decoder layer ``layer``; None without mask heads."""
        return self.mask_heads[layer % len(self.mask_heads)](content) if self.mask_heads else None

    def refine(self, content: Tensor, boxes: Tensor, layer: int) -> Tensor:
        """Corrects reference boxes: sigmoid(head(content) + logit(boxes)), in float32 also under autocast.

        Eight bits of bfloat16 would put a box that is corrected by 1 (in logits) up to a pixel aside.

        A correction that is infinite makes the coordinate not a number: the sigmoid alone would make it 0 or 1, and hide it.

        Args:
            content: (..., C).
            boxes: (..., 4) cxcywh in [0, 1].
        """
        with torch.autocast(content.device.type, enabled=False):
            content, boxes = float32(content, boxes)
            delta = self.box_heads[layer % len(self.box_heads)](content)
        return (delta + logit(boxes, self.logit_eps)).sigmoid() + (delta - delta).detach()
