"""One training step: forward, backward, and a check on all ranks before any weight changes."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import ConfigError
from ..structures import file_name
from ..utils.distributed import unwrap
from ..utils.rng import set_torch_state, torch_state
from .hooks.noise_schedule import find_generators
from .loss_scaler import LossScaler
from .nonfinite import NonfiniteTensor, search, write_report
from .optimizer import ClipsWholeModel, skips_on_device, step_unless, total_norm
from .step_values import NORM, StepValues

logger = logging.getLogger(__name__)

NONFINITE_BOXES = "infinite or NaN"  # what Detectron2's Boxes.clip says, which the stages of a cascade call


@dataclass(frozen=True)
class Snapshot:
    """What a forward pass changes or depends on besides weights and images, as it was before."""

    rng_state: dict[str, Tensor]
    statistics: list[Tensor]  # buffers of batch norms
    noise_factors: list[float]  # of the generators of denoising


@dataclass(frozen=True)
class Launched:
    """A step that the host has launched, with all it takes to repeat its pass.

    Attributes:
        values: its numbers, on their way to the host.
        fault: why the forward pass of this process has failed, "" if it has not.
        batch: of this process.
        parts: of the batch, as the model got them.
        before: the state that the pass began with.
        iteration: of the training.
        logged_as: iteration of the event storage; None where nothing is logged.
        learning_rates: that the optimizer had.
    """

    values: StepValues
    fault: str
    batch: list[dict]
    parts: list[tuple]
    before: Snapshot
    iteration: int
    logged_as: int | None
    learning_rates: list[float]


class TrainStep(SimpleTrainer):
    """One training iteration on any device, with or without mixed precision.

    The weights never see a loss or a gradient that is not finite: the device discards the step on all ranks, with the state
    of the optimizer, moving statistics of batch norms and the loss scale. The error, the same on all ranks, names the first
    tensor that is not finite, the iteration, the rank and its image files; that rank writes a report.

    The host does not wait for the numbers of a step on a GPU. It reads them in the next one, once that one's forward pass is
    launched; if the step has failed, that pass is given up, the failure is looked into, and the pass is launched again. A
    step that is skipped leaves the same weights and random numbers as if it had been read at once. :meth:`settle` reads at
    once.

    A gradient that overflows under fp16 is left to the loss scaler, which skips the step and lowers the scale; only when the
    scale has fallen below 1 it is an error.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer. An optimizer that cannot leave out a step on the device (see
            :func:`~.optimizer.skips_on_device`) makes the host wait before each of its steps.
        amp_dtype: autocast precision, None = float32.
        dump_folder: where reports are written.
        may_skip: how many steps of the whole training may be skipped instead of raising the error.
        accumulation: number of parts that a batch is split into; their gradients add up to the batch's. A model that has
            :meth:`~dn_detr_d2.modeling.meta_arch.DenoisingDETR.step_normalizers` divides the losses of each part by those of
            the whole batch; of any other the mean over the parts counts.
        delayed: whether the numbers of a step are read in the next one; None = on a GPU.

    Attributes:
        skipped, overflows: steps skipped for a number that is not finite, and by the loss scaler, as far as they are read.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        amp_dtype: torch.dtype | None,
        dump_folder: str,
        *,
        may_skip: int = 0,
        accumulation: int = 1,
        delayed: bool | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.amp_dtype, self.dump_folder, self.may_skip = amp_dtype, Path(dump_folder), may_skip
        self.accumulation = accumulation
        self.device = next(model.parameters()).device
        self.delayed = self.device.type == "cuda" if delayed is None else delayed
        self.scaler = self._fresh_scaler()
        self.skipped, self.overflows = 0, 0
        self._unread, self._stepped, self._callbacks = None, False, []
        self._normalizers = getattr(unwrap(model), "step_normalizers", None)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._generators = find_generators(model)

    def run_step(self) -> None:
        """Forward, backward, judgement, optimizer; reads the numbers of the step before, or (not ``delayed``) its own."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        before = self._snapshot()
        self.optimizer.zero_grad()
        parts = self._parts(batch)
        with self._no_sync(len(parts) > 1):
            losses, fault = self._pass(parts[0])
        if self._unread is not None and self._unread.values.has_failed():
            del losses  # with what autograd keeps for it
            self._restore(before)
            self.settle()
            with self._no_sync(len(parts) > 1):
                losses, fault = self._pass(parts[0])
        elif self._unread is not None:
            with self._with_statistics(before):
                self.settle()
        self._launch(losses, fault, batch, parts, before, data_time)
        if not self.delayed:
            self.settle()

    def settle(self) -> None:
        """Reads the last step if that has not been done: logs it, or looks into its failure. Waits for the device.

        All processes call it after the same step, because a failure is looked into by all together.

        Raises:
            FloatingPointError: the step has failed, and no more may be skipped.
        """
        step, self._unread = self._unread, None
        if step is None:
            return
        failed, self._stepped = step.values.has_failed(), step.values.may_step()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self._stepped)
        if failed:
            self.optimizer.zero_grad()
            self._skip_or_raise(self._diagnose(step), step)
        else:
            self.overflows += not self._stepped
            self._log(step)

    @property
    def stepped(self) -> bool:
        """Whether the last iteration has changed the weights; :meth:`settle` comes first."""
        self.settle()
        return self._stepped

    def when_settled(self, callback: Callable[[bool], None]) -> None:
        """Calls ``callback(stepped)`` as soon as the last step is read, with weights and statistics as that step left them.

        Args:
            callback: must not change the training.
        """
        if self._unread is None:
            callback(self._stepped)
        else:
            self._callbacks.append(callback)

    def close(self) -> None:
        """Logs a step that is still unread when an error ends the training; nothing is asked of other processes."""
        step, self._unread = self._unread, None
        if step is None:
            return
        try:
            if step.values.has_failed():
                logger.error(
                    "iteration %d was not finite, and its step was discarded; the cause was not looked for, because another "
                    "error ends the training",
                    step.iteration,
                )
            else:
                self._log(step)
        except RuntimeError as error:  # of the device, which must not hide why the training ends
            logger.warning("the numbers of iteration %d cannot be read: %s", step.iteration, error)

    def _snapshot(self) -> Snapshot:
        factors = [generator.noise_factor for generator in self._generators]
        return Snapshot(torch_state(self.device), [buffer.clone() for buffer in self._statistics], factors)

    def _restore(self, state: Snapshot) -> None:
        set_torch_state(state.rng_state, self.device)
        for buffer, kept in zip(self._statistics, state.statistics, strict=True):
            buffer.copy_(kept)
        for generator, factor in zip(self._generators, state.noise_factors, strict=True):
            generator.noise_factor = factor

    @contextlib.contextmanager
    def _with_statistics(self, state: Snapshot) -> Iterator[None]:
        """A context with the moving statistics of an earlier moment, for those who wait for the step that ended there.

        Autograd, which keeps the statistics for the backward pass, is not told: they are the same again by then.
        """
        pairs = list(zip(self._statistics, state.statistics, strict=True)) if self._callbacks else []
        present = [buffer.clone() for buffer, _ in pairs]
        for buffer, kept in pairs:
            buffer.data.copy_(kept)
        yield
        for (buffer, _), kept in zip(pairs, present, strict=True):
            buffer.data.copy_(kept)

    def _pass(self, part: tuple) -> tuple[dict[str, Tensor], str]:
        """(losses, "") of a forward pass, or ({}, why it has failed)."""
        try:
            return self._losses(self.model, *part), ""
        except FloatingPointError as error:
            return {}, str(error)

    def _launch(
        self,
        losses: dict[str, Tensor],
        fault: str,
        batch: list[dict],
        parts: list[tuple],
        before: Snapshot,
        data_time: float,
    ) -> None:
        """The rest of a step whose first forward pass is launched; changes weights only where the device allows it."""
        terms = {}  # by the names of a part's losses: parts with the same ones add up
        for i, part in enumerate(parts):
            with self._no_sync(i + 1 < len(parts)):
                if i > 0:
                    losses, again = self._pass(part)
                    fault = fault or again
                names, found = tuple(losses), self._backward(losses)
                terms[names] = terms[names] + found if names in terms else found
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips; a no-op unless fp16
        norm = total_norm(self.optimizer)
        scale = self.scaler.on_device(norm.device)
        known_terms = None if fault else torch.cat([*terms.values()])
        values = StepValues([*itertools.chain(*terms)], known_terms, norm, data_time, scale)
        known = {"norm": norm} if isinstance(self.optimizer, ClipsWholeModel) else {}
        rates = sorted({group["lr"] for group in self.optimizer.param_groups})
        if skips_on_device(self.optimizer):
            step_unless(self.optimizer, values.skip, **known)
        elif values.may_step():
            self.optimizer.step(**known)
        for buffer, kept in zip(self._statistics, before.statistics, strict=True):
            buffer.copy_(torch.where(values.failed, kept, buffer))
        self.scaler.update_unless(values.failed)
        logged_as = get_event_storage().iter if comm.is_main_process() else None
        self._unread = Launched(values, fault, batch, parts, before, self.iter, logged_as, rates)

    def _parts(self, batch: list[dict]) -> list[tuple]:
        """What the model gets for each part of the batch: images, and in accumulation the normalizers of the step."""
        if self.accumulation == 1:
            return [(batch,)]
        parts, shared = self._split(batch), ()
        if self._normalizers is not None:
            shared = (self._normalizers(batch),)
        return [(part, *shared) for part in parts]

    def _split(self, batch: list[dict]) -> list[list[dict]]:
        """The images of each pass; raises ConfigError if they are not equally many."""
        size, rest = divmod(len(batch), self.accumulation)
        if rest or not size:
            raise ConfigError(
                f"the {len(batch)} images that a process gets of SOLVER.IMS_PER_BATCH are not divisible by "
                f"SOLVER.ACCUMULATION_STEPS = {self.accumulation}"
            )
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def _no_sync(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Where backward passes do not all-reduce gradients, if ``wanted``."""
        return self.model.no_sync() if wanted and hasattr(self.model, "no_sync") else contextlib.nullcontext()

    def _losses(self, model: nn.Module, *part) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            try:
                losses = model(*part)
            except AssertionError as error:
                if NONFINITE_BOXES not in str(error):
                    raise
                raise FloatingPointError(str(error)) from error
        if self._normalizers is None and self.accumulation > 1:
            losses = {name: value / self.accumulation for name, value in losses.items()}
        return losses

    def _backward(self, losses: dict[str, Tensor]) -> Tensor:
        """Adds the gradients to those of the parameters; returns the terms.

        A forward pass that has failed stands in with NaN for every parameter: the other processes wait for its part of
        their all-reduces, and learn from it that the step is to be discarded.
        """
        if losses:
            terms = torch.stack(list(losses.values()))
        else:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            terms = torch.stack([p.sum().float() for p in parameters]).sum()[None] * math.nan
            if getattr(self.model, "require_backward_grad_sync", False):  # of DistributedDataParallel
                self.model.reducer.prepare_for_backward([terms])  # which the pass did not come to
        self.scaler.scale(terms.sum()).backward()
        return terms.detach()

    def _skip_or_raise(self, cause: str, step: Launched) -> None:
        """Counts a discarded step; raises FloatingPointError if no more may be skipped."""
        if self.skipped >= self.may_skip:
            allowed = ""
            if self.may_skip:
                allowed = f" {self.skipped} steps have been skipped, as SOLVER.NONFINITE_LIMIT allows."
            raise FloatingPointError(
                f"{cause}. No weight has been changed by it.{allowed} Look at the images and boxes, lower SOLVER.BASE_LR, "
                "or use bf16 for fp16"
            )
        self.skipped += 1
        logger.warning("%s. The step is skipped, number %d of at most %d", cause, self.skipped, self.may_skip)
        if step.logged_as is not None:
            storage = get_event_storage()
            storage.put_scalar("skipped_steps", self.skipped, smoothing_hint=False, cur_iter=step.logged_as)

    def _fresh_scaler(self, state: dict | None = None) -> LossScaler:
        scaler = LossScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        if state:
            scaler.load_state_dict(state)
        return scaler

    def _diagnose(self, step: Launched) -> str:
        """Repeats the pass on all ranks and reports what is found; returns the first cause, the same on all ranks."""
        fault = step.fault or step.values.fault()
        faults = [rank for rank in comm.all_gather(fault) if rank]
        # A loss that is not finite spoils the gradients of all ranks, which then say nothing.
        only_gradients = all(rank.startswith(NORM) for rank in faults)
        present = self._snapshot()
        self._restore(step.before)
        model, message = unwrap(self.model), ""
        finding, (images, *_), again = search(
            model, step.parts, lambda part: self._losses(model, *part), with_gradients=only_gradients
        )
        found_somewhere = any(comm.all_gather(finding is not None))
        if finding is not None or (fault and not found_somewhere):
            message = self._report(finding, fault if again else f"{fault}, but not when repeated", step, images)
        self._restore(present)
        return next(message for message in comm.all_gather(message) if message)

    def _report(self, finding: NonfiniteTensor | None, fault: str, step: Launched, images: list[dict]) -> str:
        """Writes the report of this rank; returns its sentence."""
        rank = comm.get_rank()
        path = self.dump_folder / f"iteration_{step.iteration}_rank_{rank}"
        names = [file_name(image) for image in images]
        what = f"{finding} ({fault})" if finding and fault else str(finding or fault)
        content = {
            "iteration": step.iteration,
            "rank": rank,
            "processes": comm.get_world_size(),
            "fault": fault,
            "tensor": finding and finding.tensor,
            "statistics": finding and finding.statistics,
            "images": names,
            "learning_rates": step.learning_rates,
            "precision": str(self.amp_dtype or torch.float32),
            "loss_scale": step.values.scale if self.scaler.is_enabled() else None,
            "device": str(self.device),
            "skipped": self.skipped,
        }
        write_report(path, [record for part in step.parts for record in part[0]], step.before.rng_state, content)
        return f"iteration {step.iteration}, rank {rank}: {what}; images: {', '.join(names)}; see {path}.json"

    def _log(self, step: Launched) -> None:
        """Logs every term under its name, their sum, and the sums of the groups main / aux / dn for the console."""
        if step.logged_as is None:
            return
        storage, means = get_event_storage(), step.values.means()
        terms, groups = {name: value for name, value in means.items() if name not in (NORM, "data_time")}, {}
        for name, value in terms.items():
            if "/" in name:
                group = f"loss_{name.split('/')[0]}"
                groups[group] = groups.get(group, 0.0) + value
        storage.put_scalars(total_loss=sum(terms.values()), **groups, **means, cur_iter=step.logged_as)
        if self.scaler.is_enabled():
            storage.put_scalar("overflow_steps", self.overflows, smoothing_hint=False, cur_iter=step.logged_as)

    def state_dict(self) -> dict:
        """Adds the gradient scaler's state and the numbers of skipped steps; :meth:`settle` comes first."""
        self.settle()
        counts = {"skipped": self.skipped, "overflows": self.overflows}
        return {**super().state_dict(), "scaler": self.scaler.state_dict(), **counts}

    def load_state_dict(self, state_dict: dict) -> None:
        """Counterpart of :meth:`state_dict`; takes those of older versions too."""
        self._unread = None
        super().load_state_dict(state_dict)
        self.skipped, self.overflows = state_dict.get("skipped", 0), state_dict.get("overflows", 0)
        self.scaler = self._fresh_scaler(state_dict.get("scaler"))  # empty when the checkpoint was trained without fp16
