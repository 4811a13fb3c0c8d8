"""The small dataclasses that pass between the parts of a detector; they need torch and numpy alone.

Shapes: N images, M ground truths of the fullest image (at least 1), C channels, L feature levels, S = sum of h * w over
the levels, Q queries, K prediction sets (decoder layers), T matched pairs, P classes.
In every mask True means blocked or padded, except ``Targets.valid``, which says what is real.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass
class Targets:
    """Ground truth of a batch, padded to the fullest image so that no image and no batch is a special case.

    Attributes:
        labels: (N, M) int64 in [0, num_classes), 0 where padded.
        boxes: (N, M, 4) cxcywh in [0, 1] of the unpadded image, float32, 0.5 where padded.
        valid: (N, M) bool, False where padded.
        counts: objects of each image, on the host.
        masks: (N, M, h, w) bool in pixels of the padded image, False where padded; None where no part of the model asks
            for them.
        weights: (N, M) what the losses of each object are multiplied with; None = 1.
        noise_factors: (N, M) positive, how much more box noise each object gets than others, see
            :meth:`~dn_detr_d2.DenoisingGenerator.noise_boxes`; None = 1.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: list[int]
    masks: Tensor | None = None
    weights: Tensor | None = None
    noise_factors: Tensor | None = None

    @classmethod
    def pad(
        cls,
        labels: list[Tensor],
        boxes: list[Tensor],
        device: torch.device | str = "cpu",
        *,
        masks: list[Tensor] | None = None,
        weights: list[Tensor] | None = None,
        noise_factors: list[Tensor] | None = None,
        min_slots: int = 1,
    ) -> "Targets":
        """Joins one (n_i,) label and one (n_i, 4) box tensor per image; pads on their device, uploads once.

        Args:
            labels, boxes: of each image.
            device: of the result.
            masks: (n_i, h, w) bool of each image, all of one size.
            weights, noise_factors: (n_i,) of each image.
            min_slots: M is at least this, so that a part of a batch can have the layout of all of it.

        Raises:
            ValueError: labels and boxes, or anything else, do not pair up.
        """
        counts = [len(image) for image in labels]
        optional = {"masks": masks, "weights": weights, "noise_factors": noise_factors}
        for name, others in ({"boxes": boxes} | optional).items():
            if others is not None and counts != [len(image) for image in others]:
                raise ValueError(
                    f"labels and {name} must pair up, got {counts} labels and {[len(x) for x in others]} {name}"
                )
        slots = max([*counts, min_slots, 1])
        valid = torch.arange(slots) < torch.tensor(counts, dtype=torch.int64).reshape(len(counts), 1)
        return cls(
            to_device(_pad(labels, slots, (), 0, torch.int64), device),
            to_device(_pad(boxes, slots, (4,), 0.5, torch.get_default_dtype()), device),
            to_device(valid, device),
            counts,
            None if masks is None else to_device(_pad(masks, slots, masks[0].shape[1:], False, torch.bool), device),
            *(
                None if x is None else to_device(_pad(x, slots, (), 1.0, torch.get_default_dtype()), device)
                for x in (weights, noise_factors)
            ),
        )


def _pad(images: list[Tensor], slots: int, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    """(N, slots, *shape) of one (n_i, *shape) tensor an image, on the device of the first."""
    padded = torch.full((len(images), slots, *shape), value, dtype=dtype, device=images[0].device if images else "cpu")
    for row, image in zip(padded, images, strict=True):
        row[: len(image)] = image
    return padded


@dataclass
class Assignment:
    """Which query answers for which ground truth, as flat pairs (image, query, target).

    The Hungarian matcher makes one with a row for each of the K prediction sets; the noise makes one with a single row
    that holds for all of them. The loss does not know which.

    Attributes:
        image: (T,) int64 index into the batch, the same for all rows; ascending.
        query: (K or 1, T) int64 index on the query axis.
        target: (K or 1, T) int64 index on the target axis (M) of that image.
        class_loss_mask: (N, Q) bool, queries that have a class loss, paired or not; None = all.
        counts: pairs of each image, on the host; None = a loss that needs them reads ``image`` from the device.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    class_loss_mask: Tensor | None = None
    counts: list[int] | None = None

    def __len__(self) -> int:
        """Number of pairs T."""
        return len(self.image)

    def index(self, num_sets: int) -> tuple[Tensor, Tensor, Tensor]:
        """What picks the paired queries out of (K, N, Q, ...) as (K, T, ...): indices of set, image and query."""
        return torch.arange(num_sets, device=self.image.device)[:, None], self.image, self.query

    def image_counts(self, num_images: int) -> list[int]:
        """How many pairs each image has; reads the device only where ``counts`` are not given."""
        if self.counts is not None:
            return self.counts
        return torch.bincount(self.image, minlength=num_images).tolist()

    def per_image(self, num_images: int, row: int = -1) -> list[tuple[Tensor, Tensor]]:
        """The pairs of one row as a list of (query indices, target indices), one entry an image; reads the device."""
        pairs = [self.image == i for i in range(num_images)]
        return [(self.query[row, mine], self.target[row, mine]) for mine in pairs]


@dataclass
class Pyramid:
    """Image features on their way into the encoder, one entry a level, mostly high resolution first.

    Attributes:
        maps: (N, C, h, w) features.
        positions: (N, C, h, w) sine encodings of the cells.
        padding: (N, h, w) bool, True on cells that lie outside the image.
    """

    maps: list[Tensor]
    positions: list[Tensor]
    padding: list[Tensor]


@dataclass
class Memory:
    """What the decoder looks at: all cells of all levels in a row.

    Attributes:
        tokens: (N, S, C).
        positions: (N, S, C) encodings the tokens were given.
        padding: (N, S) bool, True outside the image.
        shapes: (h, w) of each level, Python integers.
        valid_ratios: (N, L, 2) part of each level's (width, height) that lies inside the image.
        axis_encoding: how the encoder turned the coordinates of cells into channels, where the queries must do the same with
            theirs (Anchor DETR): (...) in [0, 1] -> (..., C). None elsewhere.
        mask_features: (N, C, h, w) what mask embeddings are multiplied with, at a quarter of the padded image's height and
            width; None in models without masks.
        hides_padding: whether each image looks as it does alone, so that nothing may depend on the size of its padding.
        losses_wanted: whether losses will be taken of what is predicted from it: in training, and of validation losses.
    """

    tokens: Tensor
    positions: Tensor
    padding: Tensor
    shapes: list[tuple[int, int]]
    valid_ratios: Tensor
    axis_encoding: Callable[[Tensor], Tensor] | None = None
    mask_features: Tensor | None = None
    hides_padding: bool = False
    losses_wanted: bool = False

    @property
    def box_ratios(self) -> Tensor:
        """(N, L, 4) factors of (cx, cy, w, h)."""
        return self.valid_ratios.tile(2)

    def of_levels(self, cells: Tensor) -> tuple[Tensor, ...]:
        """(N, S, ...) -> (N, h * w, ...) of each level."""
        return cells.split([h * w for h, w in self.shapes], 1)

    def reversed_levels(self) -> "Memory":
        """The same cells with the last level first."""
        cells = (torch.cat(self.of_levels(x)[::-1], 1) for x in (self.tokens, self.positions, self.padding))
        tokens, positions, padding = cells
        return replace(
            self,
            tokens=tokens,
            positions=positions,
            padding=padding,
            shapes=self.shapes[::-1],
            valid_ratios=self.valid_ratios.flip(1),
        )


@dataclass(frozen=True)
class IsolatedGroups:
    """Denoising groups of one size that see themselves and the matching queries, which see none of them (DN-DETR Eq. 8-9).

    They stand first on the query axis, one group after the other.

    Attributes:
        number: of groups.
        size: queries of each.
    """

    number: int
    size: int


@dataclass
class ObjectQueries:
    """Queries as they enter the decoder; denoising queries first, matching queries last.

    Fields with the metadata ``query_axis`` have one entry a query on that axis: they are joined along it.

    Attributes:
        content: (N, Q, C).
        boxes: (N, Q, 4) reference boxes, cxcywh in [0, 1]; 0.5 stands for "not known", its logit is 0.
        blocked: (Q, Q) or (N, Q, Q) bool self-attention mask [query, key], or None.
        position: (N, Q, C) embedding of each query's place that stays the same in all layers, or None where it follows from
            the reference box (DAB-DETR and its family).
        proposals: one set of predictions (K = 1) that the matching queries were chosen from and that has a loss of its
            own (two-stage systems), or None.
        noised_cells: which cells of a map of (h, w) cells the noised masks of the denoising queries cover, (h, w) ->
            (N, D, h, w) bool, for decoders with masked attention; None where there are no such masks.
        isolated: the groups that ``blocked`` is the mask of, or None where it has another pattern. Attention that is told
            of them need not look at what is blocked.
    """

    content: Tensor = field(metadata={"query_axis": 1})
    boxes: Tensor = field(metadata={"query_axis": 1})
    blocked: Tensor | None = None
    position: Tensor | None = field(default=None, metadata={"query_axis": 1})
    proposals: "Predictions | None" = None
    noised_cells: Callable[[tuple[int, int]], Tensor] | None = None
    isolated: IsolatedGroups | None = None


@dataclass
class Predictions:
    """Outputs of K prediction sets, one a decoder layer; fields with the metadata ``query_axis`` are split along it.

    Masks are kept as embeddings, because their maps would be (h * w) / C times as large; :meth:`mask_logits` makes maps.

    Attributes:
        logits: (K, N, Q, P) class logits.
        boxes: (K, N, Q, 4) cxcywh in [0, 1] of the unpadded image, float32; None in systems without boxes (Mask2Former).
        mask_embeddings: (K, N, Q, C), or None in models without masks.
        mask_features: (N, C, h, w) that they are multiplied with, or None.
        before_layers: sets that stand before that of the first layer: 1 where the queries as they come have predictions too.
    """

    logits: Tensor = field(metadata={"query_axis": 2})
    boxes: Tensor | None = field(default=None, metadata={"query_axis": 2})
    mask_embeddings: Tensor | None = field(default=None, metadata={"query_axis": 2})
    mask_features: Tensor | None = None
    before_layers: int = 0

    def mask_logits(self, row: int = -1) -> Tensor:
        """(N, Q, h, w) mask logits of one prediction set."""
        return torch.einsum("nqc,nchw->nqhw", self.mask_embeddings[row], self.mask_features)

    def split(self, num_denoising: int) -> tuple["Predictions", "Predictions"]:
        """(denoising part, matching part) by position on the query axis."""
        d = num_denoising
        return slice_queries(self, slice(None, d)), slice_queries(self, slice(d, None))


def slice_queries(item, part: slice):
    """The same dataclass with ``part`` of the query axis of each of its fields that has one."""
    return replace_on_query_axis(item, lambda x, axis, _: x[(slice(None),) * axis + (part,)])


def join_queries(
    denoising: ObjectQueries,
    matching: ObjectQueries,
    blocked: Tensor | None,
    isolated: IsolatedGroups | None = None,
) -> ObjectQueries:
    """Denoising queries first, matching queries last; ``blocked`` is the mask over both, and ``isolated`` its groups.

    Every field on the query axis is joined; all others are those of ``matching``, but for the noised masks.

    Raises:
        ValueError: only one of the two has a field.
    """

    def _join(x: Tensor, axis: int, name: str) -> Tensor:
        return torch.cat([getattr(denoising, name), x], axis)

    for one in (entry.name for entry in fields(matching) if "query_axis" in entry.metadata):
        lacking = [kind for kind, x in (("denoising", denoising), ("matching", matching)) if getattr(x, one) is None]
        if len(lacking) == 1:
            raise ValueError(
                f"the {lacking[0]} queries have no {one!r}, the others do; let forward() and embed() of the query source "
                "give the same fields"
            )
    joined = replace_on_query_axis(matching, _join)
    return replace(joined, blocked=blocked, noised_cells=denoising.noised_cells, isolated=isolated)


def replace_on_query_axis(item, change: Callable[[Tensor, int, str], Tensor]):
    """The same dataclass with ``change(tensor, axis, field name)`` for every field on the query axis that is not None."""
    changed = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        if "query_axis" in entry.metadata and value is not None:
            changed[entry.name] = change(value, entry.metadata["query_axis"], entry.name)
    return replace(item, **changed)


def take_images(item, index: Tensor):
    """The same dataclass with the images of ``index``, (n,) int64, each as often as it stands there.

    Args:
        item: a :class:`Memory`, or :class:`ObjectQueries` without mask: all tensors begin with the axis of the images.
        index: on the device of the tensors.
    """
    tensors = {entry.name: value for entry in fields(item) if isinstance(value := getattr(item, entry.name), Tensor)}
    return replace(item, **{name: value[index] for name, value in tensors.items()})


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``; from the host to a GPU without a wait.

    A copy out of ordinary host memory waits for the work that the GPU still has to do, ``non_blocking`` or not; one out of
    pinned memory does not. PyTorch keeps pinned memory until the copy is over, and then for the next tensor.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # one that is pinned is taken as it is
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor on its way to the host; work that is launched after it began does not delay it.

    Args:
        tensor: on any device, without gradient.
    """

    def __init__(self, tensor: Tensor):
        self._copy, self._done = tensor, None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor in host memory."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.cpu()


def upload(array: np.ndarray, like: Tensor) -> Tensor:
    """A host array as an int64 tensor beside ``like``, by :func:`to_device`."""
    return to_device(torch.as_tensor(array, dtype=torch.int64), like.device)


def file_name(image: dict) -> str:
    """The file of an image of a batch, for messages; "unnamed" where its dict names none."""
    return image.get("file_name", "unnamed")


def group_by_size(batched_inputs: list[dict]) -> list[list[int]]:
    """Indices of the images of each size, so that none has to be padded for another."""
    groups = {}
    for i, image in enumerate(batched_inputs):
        groups.setdefault(image["image"].shape, []).append(i)
    return list(groups.values())


def map_by_size(
    function: Callable[[list[dict]], Iterable],
    batched_inputs: list[dict],
    *,
    together: bool | Callable[[dict], bool] = False,
) -> list:
    """What a function gives for images, in their order.

    Args:
        function: takes the images that pass a model together and gives one result for each.
        batched_inputs: Detectron2's input dicts.
        together: which images pass at once, whatever their sizes: all, none, or those for which a function says so; the
            others pass with those of their size, see :func:`group_by_size`.
    """
    mixed, others = [], []
    for i, image in enumerate(batched_inputs):
        (mixed if (together(image) if callable(together) else together) else others).append(i)
    groups = [[others[i] for i in same] for same in group_by_size([batched_inputs[i] for i in others])]
    found = {}
    for same in [mixed, *groups] if mixed else groups:
        found |= zip(same, function([batched_inputs[i] for i in same]), strict=True)
    return [found[i] for i in range(len(batched_inputs))]
