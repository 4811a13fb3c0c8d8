"""Query denoising as a module for any DETR-like model: noised ground truth in, extra queries, their mask and losses out.

Shapes: N images, D denoising queries, Q matching queries, K decoder layers, C channels, P classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..losses import (
    LossNormalizers,
    SetCriterion,
    SoftmaxCriterion,
    StepNormalizers,
    name_layers,
    step_normalizers,
)
from ..structures import Assignment, ObjectQueries, Predictions, Targets, join_queries
from .embedding import LabelEncoder, embed_boxes
from .generator import DenoisingGenerator
from .noised_targets import NoisedTargets
from .outputs import slice_outputs, to_predictions
from .targets import pad_targets


class QueryDenoising(nn.Module):
    """Denoising training (DN-DETR, Li et al., CVPR 2022) as a part of any detector with object queries::

        self.denoising = QueryDenoising(DenoisingGenerator(num_classes=80), dim=256)  # in __init__

        dn = self.denoising(targets if self.training else None)
        content, boxes, mask = dn.prepend(content, boxes)
        outputs, dn_outputs = dn.split(self.decoder(content, boxes, memory, mask))
        losses |= dn.losses(dn_outputs)

    In evaluation mode, or without targets, nothing is added and no loss is returned, so the user's code has no branch. In
    training all processes must call it together, because the normalizer of the losses is averaged over them.

    Args:
        generator: draws the noise.
        dim: C. Makes a label embedding of its own, with the paper's indicator: a channel that is 1 in denoising queries
            and 0 in matching queries.
        embed: in place of ``dim``, a function from :class:`~dn_detr_d2.denoising.NoisedTargets` to the
            :class:`~dn_detr_d2.structures.ObjectQueries` of the model.
        indicator: whether the label embedding has the indicator; DINO's has not.
        criterion: from predictions and pairs to losses. None = by the number of logits that ``losses`` gets:
            :class:`~dn_detr_d2.losses.SetCriterion` (focal) for P, :class:`~dn_detr_d2.losses.SoftmaxCriterion` for P + 1.
        loss_weight: factor of all denoising losses.
        attention_mask: hide denoising queries; False only to show what then happens.
        local_normalizer: divide losses by the noised objects of this process (official DN-DETR) instead of the mean over
            all.

    Raises:
        ValueError: neither or both of ``dim`` and ``embed`` are given, or a value is outside its range.
    """

    def __init__(
        self,
        generator: DenoisingGenerator,
        *,
        dim: int | None = None,
        embed: Callable[[NoisedTargets], ObjectQueries] | None = None,
        indicator: bool = True,
        criterion: SetCriterion | None = None,
        loss_weight: float = 1.0,
        attention_mask: bool = True,
        local_normalizer: bool = False,
    ):
        super().__init__()
        if (dim is None) == (embed is None):
            raise ValueError(f"QueryDenoising needs either dim or embed, got dim = {dim} and embed = {embed}")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight must not be negative, got {loss_weight}")
        if dim is not None and dim <= indicator:
            raise ValueError(f"dim must be at least {1 + indicator}, got {dim}")
        self.generator, self.criterion = generator, criterion
        self.label_encoder = LabelEncoder(generator.num_classes, dim, indicator) if dim is not None else None
        self._embed = embed
        self.loss_weight, self.attention_mask, self.local_normalizer = loss_weight, attention_mask, local_normalizer

    def forward(self, targets: "list[dict[str, Tensor]] | Targets | None" = None) -> "DenoisingQueries":
        """Fresh denoising queries for a batch in training mode, none in evaluation mode or without targets.

        Args:
            targets: a dict an image with ``labels`` (n,) int64 in [0, P) and ``boxes`` (n, 4) cxcywh in [0, 1]; other keys
                are not looked at. Images without objects are fine. Or padded :class:`~dn_detr_d2.structures.Targets`.

        Raises:
            ValueError: labels or boxes of another shape or outside their range.
        """
        if targets is None or not self.training:
            return DenoisingQueries(self)
        if not isinstance(targets, Targets):
            device = self.label_encoder.embed.weight.device if self.label_encoder is not None else None
            targets = pad_targets(targets, self.generator.num_classes, device)
        return self.noise(targets, self.normalizers(targets.counts, targets.labels.device).denoising)

    def noise(
        self, targets: Targets, normalizers: LossNormalizers | None = None, *, known: bool = False
    ) -> "DenoisingQueries":
        """Denoising queries of padded targets in any mode.

        Args:
            targets: clean ground truth.
            normalizers: of the losses, where the targets are a part of a training step; None = of these targets alone,
                without asking other processes.
            known: whether matching queries may see the objects, see :meth:`NoisedTargets.as_known`.
        """
        noised = self.generator(targets, targets.counts if normalizers is None else normalizers.step_counts)
        if known:
            noised = noised.as_known()
        if normalizers is None:
            normalizers = LossNormalizers.of(max(len(noised.assignment), 1), targets)
        return DenoisingQueries(self, targets, noised, self.embed(noised), normalizers)

    def embed(self, noised: NoisedTargets) -> ObjectQueries:
        """The denoising queries as they enter the decoder: (N, D, C) contents and (N, D, 4) boxes."""
        return self._embed(noised) if self._embed is not None else embed_boxes(self.label_encoder, noised)

    def normalizers(
        self, counts: list[int], device: torch.device | str, denoised: list[int] | None = None
    ) -> StepNormalizers:
        """What matching and denoising losses of a step are divided by; all processes call it together.

        Args:
            counts: objects of each image of this process.
            device: of the result.
            denoised: objects of each image in the denoising part, where they are others.
        """
        denoised = counts if denoised is None else denoised
        pairs = self.generator.num_pairs(denoised)
        return step_normalizers(counts, pairs, device, self.local_normalizer, denoised=denoised)

    def renoised(self, *, label_noise_prob: float, box_noise_scale: float) -> "QueryDenoising":
        """The same part, sharing all weights, with :meth:`~dn_detr_d2.DenoisingGenerator.renoised` of its generator."""
        return self._with_generator(
            self.generator.renoised(label_noise_prob=label_noise_prob, box_noise_scale=box_noise_scale)
        )

    def clean(self) -> "QueryDenoising":
        """The same part, sharing all weights, with :meth:`~dn_detr_d2.DenoisingGenerator.clean` of its generator."""
        return self._with_generator(self.generator.clean())

    def _with_generator(self, generator: DenoisingGenerator) -> "QueryDenoising":
        twin = copy.copy(self)
        twin.generator = generator
        return twin

    def criterion_for(self, num_logits: int) -> SetCriterion:
        """The criterion given at construction, or the one that goes with so many logits.

        Raises:
            ValueError: none does.
        """
        if self.criterion is not None:
            return self.criterion
        classes = self.generator.num_classes
        if num_logits not in (classes, classes + 1):
            raise ValueError(
                f"the generator has num_classes = {classes}, so the decoder must give {classes} logits (focal loss) or "
                f"{classes + 1} (softmax with 'no object' as the last), got {num_logits}; give QueryDenoising a "
                "criterion for other heads"
            )
        return SetCriterion() if num_logits == classes else SoftmaxCriterion()


@dataclass
class DenoisingQueries:
    """What :class:`QueryDenoising` makes of one batch; where there is nothing to denoise, all methods pass things through.

    Attributes:
        denoising: the module that made it.
        targets: the padded clean ground truth, or None.
        noised: labels, boxes, groups of the denoising queries, and what each must restore; None where there are none.
        queries: the embedded denoising queries, or None.
        normalizers: what the losses are divided by, or None.
        joined: denoising and matching queries after :meth:`prepend` or :meth:`join`, or None.
    """

    denoising: QueryDenoising
    targets: Targets | None = None
    noised: NoisedTargets | None = None
    queries: ObjectQueries | None = None
    normalizers: LossNormalizers | None = None
    joined: ObjectQueries | None = field(default=None, init=False)

    @property
    def num_queries(self) -> int:
        """D, 0 where there is nothing to denoise."""
        return self.noised.num_queries if self.noised is not None else 0

    @property
    def assignment(self) -> Assignment | None:
        """Which denoising query restores which object, for losses of one's own."""
        return self.noised.assignment if self.noised is not None else None

    @property
    def mask(self) -> Tensor | None:
        """The self-attention mask over all queries, True = blocked, once the matching queries are known; else None."""
        return self.joined.blocked if self.joined is not None and self.noised is not None else None

    def prepend(self, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts the denoising queries before the matching queries.

        Args:
            content: (N, Q, C - 1) of the matching queries, to which the indicator 0 is added; or (N, Q, C), where the last
                channel is the model's own. Always (N, Q, C) where the label embedding has no indicator.
            boxes: (N, Q, 4) their reference boxes, cxcywh in [0, 1]; 0.5 where a query has none.

        Returns:
            tuple: (N, D + Q, C) contents, (N, D + Q, 4) boxes, and the self-attention mask: (D + Q, D + Q) bool [query,
            key], True = blocked, as ``torch.nn.MultiheadAttention`` takes it; (N, D + Q, D + Q) where the generator hides
            padding; None where there is nothing to denoise, D being 0.

        Raises:
            ValueError: shapes that do not go together.
        """
        if content.dim() != 3 or boxes.shape != (*content.shape[:2], 4):
            raise ValueError(
                "prepend() takes contents (N, Q, C) and boxes (N, Q, 4), got "
                f"{tuple(content.shape)} and {tuple(boxes.shape)}; expand() what all images share"
            )
        content = self._with_indicator(content)
        if self.queries is not None and len(content) != len(self.queries.content):
            raise ValueError(f"there are targets of {len(self.queries.content)} images, and queries of {len(content)}")
        joined = self.join(ObjectQueries(content, boxes))
        if torch.is_autocast_enabled(content.device.type):
            return joined.content, joined.boxes, joined.blocked
        return joined.content.to(content.dtype), joined.boxes.to(boxes.dtype), joined.blocked  # of a model in 16 bits

    def _with_indicator(self, content: Tensor) -> Tensor:
        """(N, Q, C) from (N, Q, C) or, where the label embedding has an indicator, (N, Q, C - 1)."""
        encoder = self.denoising.label_encoder
        if encoder is not None and encoder.indicator and content.shape[2] == encoder.dim - 1:
            content = nn.functional.pad(content, (0, 1))
        width = content.shape[2]
        if encoder is not None:
            width = encoder.dim
        elif self.queries is not None:
            width = self.queries.content.shape[2]
        if content.shape[2] != width:
            narrower = f" or {width - 1}" if encoder is not None and encoder.indicator else ""
            raise ValueError(
                f"the matching queries have {content.shape[2]} channels, but denoising queries have {width}, so they need "
                f"{width}{narrower}"
            )
        return content

    def join(self, matching: ObjectQueries) -> ObjectQueries:
        """:meth:`prepend` for :class:`~dn_detr_d2.structures.ObjectQueries` with all their fields."""
        if self.noised is None:
            self.joined = matching
        else:
            mask = (None, None)
            if self.denoising.attention_mask:
                mask = (self.noised.attention_mask(matching.content.shape[1]), self.noised.isolated)
            self.joined = join_queries(self.queries, matching, *mask)
        return self.joined

    def split(self, outputs):
        """(matching part, denoising part) of the decoder's outputs, in the form that they have.

        Args:
            outputs: ``(logits, boxes)`` of shapes (K, N, D + Q, P) and (K, N, D + Q, 4), DETR's dict with ``pred_logits``,
                ``pred_boxes`` and ``aux_outputs``, or :class:`~dn_detr_d2.structures.Predictions`.

        Returns:
            tuple: where there is nothing to denoise, the outputs themselves and None.
        """
        if self.noised is None:
            return outputs, None
        d = self.num_queries
        if isinstance(outputs, Predictions):
            return outputs.split(d)[::-1]
        return slice_outputs(outputs, slice(d, None)), slice_outputs(outputs, slice(None, d))

    def losses(self, outputs) -> dict[str, Tensor]:
        """Weighted denoising losses: ``dn/class``, ``dn/l1``, ``dn/giou`` of the last layer, ``dn/class_i`` ... of layer i.

        Args:
            outputs: the denoising part that :meth:`split` gave.

        Returns:
            dict: scalars, already divided by the number of noised objects; {} where there is nothing to denoise.

        Raises:
            ValueError: outputs of another number of queries, or of logits.
        """
        if self.noised is None:
            return {}
        return name_layers(self.terms(outputs), "dn", "dn")

    def terms(self, outputs) -> dict[str, Tensor]:
        """(K,) weighted denoising losses by term; see :meth:`losses`."""
        predictions = to_predictions(outputs)
        if predictions.logits.shape[2] != self.num_queries:
            raise ValueError(
                f"there are {self.num_queries} denoising queries, and outputs of {predictions.logits.shape[2]}; give "
                "losses() the second of what split() returns"
            )
        criterion, weight = self.denoising.criterion_for(predictions.logits.shape[-1]), self.denoising.loss_weight
        terms = criterion(predictions, self.targets, self.assignment, self.normalizers)
        return {name: weight * value for name, value in terms.items()}
