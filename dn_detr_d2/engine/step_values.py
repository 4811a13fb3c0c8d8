"""Loss terms and gradient norm of a training step: added up over the processes and judged on the device.

The host asks for the numbers when it likes. What the judgement decides (optimizer, loss scale, moving statistics) is decided
on the device, so nobody has to wait for it.

Shapes: T loss terms, W processes.
"""

import math
import zlib

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from ..structures import HostCopy, to_device

NORM = "gradient_norm"
SLOTS = 512  # loss terms that a row has room for where there are several processes
NORM_PLACE, SCALE_PLACE, NAMES_PLACE, TIMES = range(
    4
)  # in a row: norm, loss scale, checksum of the names, then W times


class StepValues:
    """The numbers of one step of all processes; a collective, with one all-reduce of one row of float64.

    A row holds the norm of the gradient, the loss scale, a checksum of the names of the terms, a place for the ``data_time``
    of each process, and the terms. Its length does not depend on the terms, because a process whose forward pass has failed
    does not know how many there are: all its terms are NaN.

    Args:
        names: of the loss terms, the same on all processes.
        terms: (T,) of this process; None if its forward pass has failed.
        norm: () norm of the gradient, which all processes share.
        data_time: seconds that this process has waited for its images.
        scale: () loss scale of fp16, 0 without.

    Attributes:
        failed: () bool on the device: the step is to be discarded by all processes.
        skip: () float32 on the device, 1 where the optimizer must not step: the step has failed, or its gradient overflows
            under a loss scale that can still fall.

    Raises:
        ValueError: more terms than a row has room for.
    """

    def __init__(self, names: list[str], terms: Tensor | None, norm: Tensor, data_time: float, scale: Tensor):
        self.names, self._world, self._host = names, comm.get_world_size(), None
        several = self._world > 1
        if several and len(names) > SLOTS:
            raise ValueError(
                f"a model with {len(names)} loss terms cannot be trained by several processes, which exchange at most "
                f"{SLOTS}: add some of them up, or train on one process"
            )
        if terms is None:
            terms = norm.new_full((SLOTS if several else 1,), math.nan)
        times = [0.0] * self._world
        times[comm.get_rank()] = data_time
        known = torch.tensor([self._checksum(), *times], dtype=torch.float64)
        parts = [norm[None], scale[None], to_device(known, norm.device), terms]
        if several:
            parts.append(terms.new_zeros(SLOTS - len(terms)))
        self._own = torch.cat([x.to(torch.float64) for x in parts])
        total = self._own
        if several:
            total = total.clone()
            dist.all_reduce(total)
        overflow = ~total[NORM_PLACE].isfinite()
        finite_terms = total[TIMES + self._world :].isfinite().all()
        self.failed = ~finite_terms | (overflow & (total[SCALE_PLACE] < self._world))
        self.skip = (self.failed | overflow).float()
        self._copy = HostCopy(torch.cat([total, torch.stack([self.failed, overflow]).to(torch.float64)]))

    def _read(self) -> list[float]:
        """The summed row with (failed, overflow) behind it; waits for the device the first time."""
        if self._host is None:
            self._host = self._copy.wait().numpy().tolist()
        return self._host

    def has_failed(self) -> bool:
        """``failed`` on the host."""
        return self._read()[-2] != 0

    def may_step(self) -> bool:
        """Whether the optimizer may step, on the host."""
        return self._read()[-2:] == [0, 0]

    @property
    def scale(self) -> float:
        """The loss scale of this step, 0 without."""
        return self._read()[SCALE_PLACE] / self._world

    def means(self) -> dict[str, float]:
        """Loss terms and norm, averaged over the processes, and the longest ``data_time``, of a step that has not failed.

        Raises:
            RuntimeError: the processes have different loss terms.
        """
        row, first = self._read(), TIMES + self._world
        if row[NAMES_PLACE] != self._world * self._checksum():
            raise RuntimeError(
                f"the processes have different loss terms; those of rank {comm.get_rank()}: {self.names}"
            )
        terms = dict(zip(self.names, row[first : first + len(self.names)], strict=True))
        means = {name: value / self._world for name, value in {**terms, NORM: row[NORM_PLACE]}.items()}
        return {"data_time": max(row[TIMES:first]), **means}

    def fault(self) -> str:
        """Which number of this process alone is not finite, for a step that has failed; "" if all are."""
        row = self._read() if self._world == 1 else self._own.tolist()
        first = TIMES + self._world
        for name, value in zip(self.names, row[first:], strict=False):
            if not math.isfinite(value):
                return f"loss term {name} is {value}"
        curable = self.scale >= 1
        return "" if math.isfinite(row[NORM_PLACE]) or curable else f"{NORM} is {row[NORM_PLACE]}"

    def _checksum(self) -> int:
        """Of the names; sums over processes are exact in float64."""
        return zlib.crc32("\n".join(self.names).encode())
