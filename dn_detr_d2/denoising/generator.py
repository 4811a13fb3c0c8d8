"""Turns the targets of a batch into noised targets. No parameters, no special case for images without objects.

Shapes: N images, M ground truths of the fullest image, m = min(M, room in a group), G groups, D = G * m queries, in
contrastive denoising 2 G * m.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..structures import Assignment, Targets, upload
from .box_noise import BOX_NOISES, BoxNoise, NoiseScale
from .label_noise import LABEL_NOISES, LabelNoise
from .mask_noise import NoisedMasks
from .noise import jitter_corners, mask_offsets, random_subset
from .noised_targets import NoisedTargets
from .query_groups import QueryGroups


class DenoisingGenerator:
    """Denoising of DN-DETR (Li et al., CVPR 2022): G noised copies of every object, one a group.

    Since the *targets* are padded (M >= 1), a batch or a rank without objects runs the same graph as any other: its slots
    are all padding.

    Args:
        num_classes: number of classes P; index P stands for "unknown".
        num_groups: G >= 1.
        label_noise_prob: gamma in [0, 1], the chance that a label is redrawn.
        center_noise_scale: lambda1 >= 0, centre shift in half sizes.
        size_noise_scale: lambda2 >= 0, change of width and height in sizes.
        max_queries: at most so many denoising queries; 0 = no limit. When G * M is more, each group gets a fresh random
            subset of ``max_queries // G`` objects of each image that has more.
        mask_padding: hide padded slots from the real queries of their group (the official code does not).
        box_noise: a name of :data:`~dn_detr_d2.denoising.BOX_NOISES`, or a function ``(boxes, scale) -> boxes`` of
            (..., 4) cxcywh boxes in [0, 1] and a :class:`~dn_detr_d2.denoising.NoiseScale`.
        label_noise: a name of :data:`~dn_detr_d2.denoising.LABEL_NOISES`, or a function ``(labels, gamma, num_classes) ->
            labels``.

    The defaults are those of the paper's models.

    Attributes:
        noise_factor: what the scales of box and mask noise are multiplied with, 1 unless a schedule sets it.

    Raises:
        ValueError: a value outside its range, or an unknown name.
    """

    COPIES = 1  # of an object in a group

    def __init__(
        self,
        *,
        num_classes: int,
        num_groups: int = 5,
        label_noise_prob: float = 0.2,
        center_noise_scale: float = 0.4,
        size_noise_scale: float = 0.4,
        max_queries: int = 0,
        mask_padding: bool = False,
        box_noise: str | BoxNoise = "uniform",
        label_noise: str | LabelNoise = "uniform",
    ):
        if num_classes < 1 or num_groups < 1:
            raise ValueError(f"num_classes and num_groups must be positive, got {num_classes} and {num_groups}")
        if not 0 <= label_noise_prob <= 1:
            raise ValueError(f"label_noise_prob must lie in [0, 1], got {label_noise_prob}")
        if center_noise_scale < 0 or size_noise_scale < 0:
            raise ValueError(f"noise scales must not be negative, got {center_noise_scale} and {size_noise_scale}")
        least, meaning = self.least_queries(num_groups)
        if max_queries and max_queries < least:
            raise ValueError(f"max_queries must be 0 (no limit) or at least {meaning}, got {max_queries}")
        self.num_classes, self.num_groups = num_classes, num_groups
        self.label_noise_prob = label_noise_prob
        self.center_noise_scale, self.size_noise_scale = center_noise_scale, size_noise_scale
        self.max_queries, self.mask_padding = max_queries, mask_padding
        self.box_noise, self.label_noise = BOX_NOISES.resolve(box_noise), LABEL_NOISES.resolve(label_noise)
        self.noise_factor = 1.0

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DENOISING``."""
        node = cfg.MODEL.DN_DETR.DENOISING
        return {
            "num_classes": cfg.MODEL.DN_DETR.NUM_CLASSES,
            "num_groups": node.NUM_GROUPS,
            "label_noise_prob": node.LABEL_NOISE_PROB,
            "center_noise_scale": node.CENTER_NOISE_SCALE,
            "size_noise_scale": node.SIZE_NOISE_SCALE,
            "max_queries": node.MAX_QUERIES,
            "mask_padding": node.MASK_PADDING,
            "box_noise": BOX_NOISES.from_config(node.BOX_NOISE.NAME, cfg),
            "label_noise": LABEL_NOISES.from_config(node.LABEL_NOISE.NAME, cfg),
        }

    def __call__(self, targets: Targets, step_counts: list[int] | None = None) -> NoisedTargets:
        """Draws fresh noise for a batch; ``targets`` stay as they were.

        Args:
            targets: padded ground truth.
            step_counts: objects of each image of this process in the whole training step, where ``targets`` are a part of
                it (gradient accumulation); None = ``targets`` are all of it.
        """
        groups, room = self.layout(targets.labels.shape[1])
        chosen = _choose(targets, groups, room)  # (N, G, m) index on the target axis
        chosen = chosen[:, :, None].expand(-1, -1, self.COPIES, -1)  # (N, G, copies, m)
        image = torch.arange(len(targets.labels), device=chosen.device)[:, None, None, None]
        labels, boxes, valid = (x[image, chosen] for x in (targets.labels, targets.boxes, targets.valid))

        labels = self.noise_labels(labels)
        labels = torch.where(valid, labels, self.num_classes)
        factors = None if targets.noise_factors is None else targets.noise_factors[image, chosen][..., None]
        boxes = torch.where(valid[..., None], self.noise_boxes(boxes, factors), 0.5)
        has_class_loss = self.has_class_loss(valid, targets.counts if step_counts is None else step_counts)
        return NoisedTargets(
            labels.flatten(1),
            boxes.flatten(1, 3),
            valid.flatten(1),
            QueryGroups.isolated(groups, self.COPIES, room, labels.device),
            replace(_assign(chosen, targets.counts), class_loss_mask=has_class_loss.flatten(1)),
            self.mask_padding,
            self.noise_masks(targets, chosen.flatten(1), valid.flatten(1)),
        )

    @classmethod
    def least_queries(cls, num_groups: int) -> tuple[int, str]:
        """The smallest limit of queries, one object a group, and what it is in words."""
        return num_groups, f"num_groups = {num_groups}"

    def renoised(self, *, label_noise_prob: float, box_noise_scale: float) -> "DenoisingGenerator":
        """The same generator with uniform noise of a given strength and no limit of queries: every object is in every group.

        So what is measured with it is the same for models that are trained with different kinds of noise.

        Args:
            label_noise_prob: gamma in [0, 1].
            box_noise_scale: lambda1 = lambda2, whatever a schedule says; of contrastive denoising the reach of the corners.
                Not negative.

        Raises:
            ValueError: a value outside its range.
        """
        if not 0 <= label_noise_prob <= 1 or box_noise_scale < 0:
            raise ValueError(
                f"label_noise_prob must lie in [0, 1] and box_noise_scale must not be negative, got {label_noise_prob} "
                f"and {box_noise_scale}"
            )
        twin = copy.copy(self)
        twin.label_noise_prob, twin.max_queries, twin.noise_factor = label_noise_prob, 0, 1.0
        twin.box_noise, twin.label_noise = BOX_NOISES.resolve("uniform"), LABEL_NOISES.resolve("uniform")
        twin._scale_boxes(box_noise_scale)
        return twin

    def clean(self) -> "DenoisingGenerator":
        """The same generator with one group in which every object stands as it is, without noise."""
        twin = self.renoised(label_noise_prob=0.0, box_noise_scale=0.0)
        twin.num_groups = 1
        return twin

    def _scale_boxes(self, scale: float) -> None:
        self.center_noise_scale = self.size_noise_scale = scale

    def layout(self, num_objects: int) -> tuple[int, int]:
        """(groups G, objects m that a group has room for) where the fullest image has ``num_objects``."""
        room = self.max_queries // self.num_groups if self.max_queries else num_objects
        return self.num_groups, min(num_objects, room)

    def num_pairs(self, counts: list[int]) -> int:
        """How many slots restore an object in a batch of images with so many objects: the length of the assignment."""
        groups, room = self.layout(max([*counts, 1]))
        return groups * sum(min(count, room) for count in counts)

    def noise_labels(self, labels: Tensor) -> Tensor:
        """(...) clean labels -> noised ones."""
        return self.label_noise(labels, self.label_noise_prob, self.num_classes)

    def noise_boxes(self, boxes: Tensor, factors: Tensor | None = None) -> Tensor:
        """(..., 4) clean boxes -> noised ones, each number (..., 1) ``factors`` times as far from the clean one; None = 1.

        Raises:
            ValueError: the noise gives another shape.
        """
        factor = self.noise_factor
        scale = NoiseScale(factor * self.center_noise_scale, factor * self.size_noise_scale)
        noised = self.box_noise(boxes, scale)
        if noised.shape != boxes.shape:
            raise ValueError(f"box noise must keep the shape {tuple(boxes.shape)}, got {tuple(noised.shape)}")
        return noised if factors is None else (boxes + factors * (noised - boxes)).clamp(0, 1)

    def noise_masks(self, targets: Targets, chosen: Tensor, valid: Tensor) -> NoisedMasks | None:
        """The masks of ``targets``, moved as a centre by ``center_noise_scale``, on their own, whatever the box does.

        Args:
            targets: whose boxes are relative to the padded image where they have masks.
            chosen: (N, D) which object stands in which slot.
            valid: (N, D) bool, False where padded.
        """
        if targets.masks is None:
            return None
        h, w = targets.masks.shape[-2:]
        width, height = targets.boxes.gather(1, chosen[..., None].expand(-1, -1, 4))[..., 2:].unbind(-1)
        size = torch.stack([w * width, h * height], -1)
        offsets = mask_offsets(size, self.noise_factor * self.center_noise_scale)
        return NoisedMasks(targets.masks, chosen, offsets, valid)

    def has_class_loss(self, valid: Tensor, step_counts: list[int]) -> Tensor:
        """(N, G, copies, m) bool: slots with a class loss; here those that restore an object."""
        return valid


class BudgetDenoisingGenerator(DenoisingGenerator):
    """Denoising of Mask DINO (Li et al., CVPR 2023): as many groups as a budget of queries allows.

    Padded slots must say "no object".

    Args:
        num_queries: there are ``num_queries // M`` groups, at least one, so that there are about ``num_queries`` slots (of
            DINO near ones), whatever the number of objects M of the fullest image.
        num_groups: groups if ``num_queries`` is 0.
        others: as for :class:`DenoisingGenerator`.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, *, num_queries: int = 100, **others):
        super().__init__(**others)
        if num_queries < 0:
            raise ValueError(f"num_queries must not be negative, got {num_queries}")
        self.num_queries = num_queries

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DENOISING``."""
        return super().from_config(cfg) | {"num_queries": cfg.MODEL.DN_DETR.DENOISING.NUM_QUERIES}

    @classmethod
    def least_queries(cls, num_groups: int) -> tuple[int, str]:
        """All copies of one object: there are fewer groups where the limit asks for it."""
        return cls.COPIES, f"{cls.COPIES}, the copies of one object in a group"

    def clean(self) -> "BudgetDenoisingGenerator":
        """See :meth:`DenoisingGenerator.clean`."""
        twin = super().clean()
        twin.num_queries = 0
        return twin

    def layout(self, num_objects: int) -> tuple[int, int]:
        """As many groups as the budget of queries allows; ``max_queries`` limits all copies together."""
        groups = max(self.num_queries // num_objects, 1) if self.num_queries else self.num_groups
        if not self.max_queries:
            return groups, num_objects
        groups = min(groups, max(self.max_queries // (self.COPIES * num_objects), 1))
        return groups, min(num_objects, max(self.max_queries // (self.COPIES * groups), 1))

    def has_class_loss(self, valid: Tensor, step_counts: list[int]) -> Tensor:
        """All slots, also padded ones, unless the step has no object at all: then there is nothing to tell apart."""
        return torch.full_like(valid, any(step_counts))


class ContrastiveDenoisingGenerator(BudgetDenoisingGenerator):
    """Contrastive denoising of DINO (Zhang et al., ICLR 2023, Sec. 3.3): each group also holds one far copy of every object.

    The near copies restore their object, the far ones and the padded slots must say "no object". Box noise is
    :func:`~dn_detr_d2.denoising.noise.jitter_corners` and no other.

    Args:
        num_classes, label_noise_prob, max_queries, mask_padding, label_noise: as for :class:`DenoisingGenerator`.
        num_queries, num_groups: as for :class:`BudgetDenoisingGenerator`.
        corner_noise_scale: reach of the near copies, in half sizes.
        keep_order: whether far copies are kept from crossing their corners.

    The defaults are those of the published DINO models.

    Raises:
        ValueError: a value outside its range, or box noise of another kind.
    """

    COPIES = 2

    def __init__(
        self, *, corner_noise_scale: float = 1.0, keep_order: bool = False, label_noise_prob: float = 0.25, **others
    ):
        super().__init__(center_noise_scale=0.0, size_noise_scale=0.0, label_noise_prob=label_noise_prob, **others)
        if corner_noise_scale < 0:
            raise ValueError(f"corner_noise_scale must not be negative, got {corner_noise_scale}")
        if self.box_noise is not BOX_NOISES.resolve("uniform"):
            raise ValueError(
                "contrastive denoising has box noise of its own, near and far, so box_noise (BOX_NOISE.NAME) must stay "
                "'uniform'; DenoisingGenerator takes any other"
            )
        self.corner_noise_scale, self.keep_order = corner_noise_scale, keep_order

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Constructor arguments from ``MODEL.DN_DETR.DENOISING``."""
        node = cfg.MODEL.DN_DETR.DENOISING
        arguments = super().from_config(cfg)
        del arguments["center_noise_scale"], arguments["size_noise_scale"]
        return arguments | {"corner_noise_scale": node.CORNER_NOISE_SCALE, "keep_order": node.KEEP_CORNER_ORDER}

    def _scale_boxes(self, scale: float) -> None:
        self.corner_noise_scale = scale

    def noise_boxes(self, boxes: Tensor, factors: Tensor | None = None) -> Tensor:
        """(N, G, 2, m, 4): the first copy of each group stays near, the second goes far.

        What is further than near copies go says "no object", so ``factors`` do not change how far that is: near copies of
        a factor above 1 are more often near that limit, see :func:`~dn_detr_d2.denoising.noise.jitter_corners`.
        """
        near, far = boxes.unbind(2)
        scale = self.noise_factor * self.corner_noise_scale
        spread = None if factors is None else factors[:, :, 0]
        return torch.stack(
            [
                jitter_corners(near, scale, False, self.keep_order, spread),
                jitter_corners(far, scale, True, self.keep_order),
            ],
            2,
        )


def _choose(targets: Targets, groups: int, room: int) -> Tensor:
    """(N, G, m): which ground truth stands in which slot; all of them in order while there is room."""
    n, m = targets.labels.shape
    if room == m:
        return torch.arange(m, device=targets.labels.device).expand(n, groups, m)
    return random_subset(targets.valid[:, None].expand(-1, groups, -1), room)


def _assign(chosen: Tensor, counts: list[int]) -> Assignment:
    """Pairs every real slot of a first copy with its ground truth. Which are real is known on the host: no device read."""
    _, groups, copies, room = chosen.shape
    filled = np.arange(room) < np.minimum(counts, room)[:, None]  # (N, m)
    first = np.arange(copies)[:, None] == 0  # (copies, 1)
    paired = np.tile((filled[:, None] & first).reshape(len(counts), -1), groups)  # (N, D)
    image, slot = upload(np.stack(np.nonzero(paired)), chosen)
    return Assignment(image, slot[None], chosen.flatten(1)[image, slot][None], counts=paired.sum(1).tolist())
