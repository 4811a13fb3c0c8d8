"""What losses are divided by: numbers of objects, averaged over processes; the host knows them before the forward pass."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..structures import Targets


@dataclass
class LossNormalizers:
    """What the losses of one kind of queries, matching or denoising, are divided by.

    Attributes:
        num_pairs: scalar, what sums over pairs of queries and objects are divided by.
        step_counts: objects of each image of this process in the whole training step, on the host; a loss that is a mean
            over queries is one over the queries of all these images.
    """

    num_pairs: Tensor
    step_counts: list[int]

    @classmethod
    def of(cls, value: "LossNormalizers | Tensor | float", targets: Targets) -> "LossNormalizers":
        """``value`` itself, or a number of pairs where the images of ``targets`` are the whole step."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Tensor):
            value = torch.full((), float(value), device=targets.labels.device)
        return cls(value, targets.counts)


@dataclass
class StepNormalizers:
    """The normalizers of a training step; where gradients of several passes are added up, all of them have the same.

    Attributes:
        matching: of matching queries and proposals.
        denoising: of denoising queries.
    """

    matching: LossNormalizers
    denoising: LossNormalizers

    @property
    def step_counts(self) -> list[int]:
        """Objects of each image of this process in this step, on the host."""
        return self.matching.step_counts

    def at_least(self, others: "StepNormalizers") -> "StepNormalizers":
        """The same with a number of matched pairs that is not below that of ``others``; that of noised objects grows by the
        same factor.

        It may not be compared itself: where there are few objects each has more copies, of a budget of denoising queries.
        """
        factor = (others.matching.num_pairs / self.matching.num_pairs).clamp(min=1)
        matching, denoising = (
            replace(one, num_pairs=one.num_pairs * factor) for one in (self.matching, self.denoising)
        )
        return StepNormalizers(matching, denoising)


def mean_over_ranks(counts: list[int], device: torch.device | str) -> Tensor:
    """(n,) means of n counts over the processes, each at least 1; all processes call it together.

    Nothing is read back from the device.
    """
    total = torch.stack([torch.full((), float(count), device=device) for count in counts])
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(total)
    return (total / processes).clamp(min=1)


def step_normalizers(
    counts: list[int],
    num_noised: int,
    device: torch.device | str,
    local_denoising: bool = False,
    *,
    denoised: list[int] | None = None,
) -> StepNormalizers:
    """The normalizers of a step, with one all-reduce for both; all processes call it together.

    Args:
        counts: objects of each image of this process.
        num_noised: noised objects of this process.
        device: of the result.
        local_denoising: divide denoising losses by the noised objects of this process (official DN-DETR) instead of the mean
            over all.
        denoised: objects of each image in the denoising part, where they are others than those of the matching part.
    """
    objects, noised = mean_over_ranks([sum(counts), num_noised], device)
    if local_denoising:
        noised = torch.full((), float(max(num_noised, 1)), device=device)
    denoised = counts if denoised is None else denoised
    return StepNormalizers(LossNormalizers(objects, counts), LossNormalizers(noised, denoised))
