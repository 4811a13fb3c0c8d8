"""One training step: forward, backward, and a check on all ranks before any weight changes."""

import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
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
from .nonfinite import NonfiniteTensor, search, write_report
from .optimizer import ClipsWholeModel, total_norm

logger = logging.getLogger(__name__)

NORM = "gradient_norm"
NONFINITE_BOXES = "infinite or NaN"  # what Detectron2's Boxes.clip says, which the stages of a cascade call


@dataclass(frozen=True)
class Snapshot:
    """What a forward pass changes, as it was before."""

    rng_state: dict[str, Tensor]
    statistics: list[Tensor]  # buffers of batch norms


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of an iteration after forward and backward, before the optimizer.

    Attributes:
        faults: for each rank what is not finite, "" if everything is.
        values: for each rank its loss terms, the norm of the gradient and ``data_time``; [] if a forward pass failed.
        norm: the norm of the gradient on the device, None if a forward pass failed.
    """

    faults: list[str]
    values: list[dict[str, float]] = field(default_factory=list)
    norm: Tensor | None = None

    @property
    def failed(self) -> bool:
        """Whether the step must not be taken."""
        return any(self.faults)

    @property
    def only_gradients(self) -> bool:
        """Whether every loss term was finite. A loss that is not spoils the gradients of all ranks: they say nothing."""
        return all(fault.startswith(NORM) for fault in self.faults if fault)


class TrainStep(SimpleTrainer):
    """One training iteration on any device, with or without mixed precision.

    The weights never see a loss or a gradient that is not finite: the step is discarded before the optimizer, on all ranks;
    all loss terms are read in one device-to-host copy. The error, the same on all ranks, names the first tensor that is not
    finite, the iteration, the rank and its image files; that rank writes a report.

    A gradient that overflows under fp16 is left to the loss scaler, which skips the step and lowers the scale; only when the
    scale has fallen below 1 it is an error.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer.
        amp_dtype: autocast precision, None = float32.
        dump_folder: where reports are written.
        may_skip: how many steps of the whole training may be skipped instead of raising the error.
        accumulation: number of parts that a batch is split into; their gradients add up to the batch's. A model that has
            :meth:`~dn_detr_d2.modeling.meta_arch.DenoisingDETR.step_normalizers` divides the losses of each part by those of
            the whole batch; of any other the mean over the parts counts.

    Attributes:
        stepped: whether the last iteration has changed the weights.
        skipped, overflows: steps skipped for a number that is not finite, and by the loss scaler.
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
    ):
        super().__init__(model, data_loader, optimizer)
        self.amp_dtype, self.dump_folder, self.may_skip = amp_dtype, Path(dump_folder), may_skip
        self.accumulation = accumulation
        self.device = next(model.parameters()).device
        self.scaler = self._fresh_scaler()
        self.stepped, self.skipped, self.overflows = False, 0, 0
        self._normalizers = getattr(unwrap(model), "step_normalizers", None)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]

    def run_step(self) -> None:
        """Forward, backward, check, optimizer."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        before = Snapshot(torch_state(self.device), [buffer.clone() for buffer in self._statistics])
        self.optimizer.zero_grad()
        parts = self._parts(batch)
        outcome = self._forward_backward(parts, data_time)
        if outcome.failed:
            cause = self._diagnose(batch, parts, outcome, before)
            self._discard(before)
            self._skip_or_raise(cause)
        else:
            self._update(outcome)
            self._log(outcome.values)

    def _forward_backward(self, parts: list[tuple], data_time: float) -> StepOutcome:
        """Gradients of all parts, checked together with the other ranks."""
        earlier, losses, fault = [], {}, ""
        try:
            with self._no_sync():
                earlier = [self._backward(self._losses(self.model, *part)) for part in parts[:-1]]
            losses = self._losses(self.model, *parts[-1])
        except FloatingPointError as error:
            fault = str(error)
        # A rank without losses must not leave the others waiting in the backward pass, where gradients are all-reduced.
        faults = comm.all_gather(fault)
        if any(faults):
            return StepOutcome(faults)
        terms = sum(earlier, self._backward(losses))
        values, norm = self._read(list(losses), terms)
        values = comm.all_gather({"data_time": data_time, **values})
        return StepOutcome([self._fault(rank) for rank in values], values, norm)

    def _update(self, outcome: StepOutcome) -> None:
        """Lets the optimizer step, unless fp16 gradients have overflowed."""
        self.stepped = math.isfinite(outcome.values[0][NORM])
        self.overflows += not self.stepped
        if self.stepped:
            known = {"norm": outcome.norm} if isinstance(self.optimizer, ClipsWholeModel) else {}
            self.scaler.step(self.optimizer, **known)
        self.scaler.update()

    def _parts(self, batch: list[dict]) -> list[tuple]:
        """What the model gets for each part of the batch: images, and in accumulation the normalizers of the step."""
        if self.accumulation == 1:
            return [(batch,)]
        size, rest = divmod(len(batch), self.accumulation)
        if rest or not size:
            raise ConfigError(
                f"the {len(batch)} images that a process gets of SOLVER.IMS_PER_BATCH are not divisible by "
                f"SOLVER.ACCUMULATION_STEPS = {self.accumulation}"
            )
        shared = ()
        if self._normalizers is not None:
            shared = (self._normalizers(batch),)
        return [(batch[i : i + size], *shared) for i in range(0, len(batch), size)]

    def _no_sync(self) -> contextlib.AbstractContextManager:
        """Where backward passes do not all-reduce gradients."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else contextlib.nullcontext()

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
        """Adds the gradients to those of the parameters; returns the terms."""
        terms = torch.stack(list(losses.values()))
        self.scaler.scale(terms.sum()).backward()
        return terms.detach()

    def _read(self, names: list[str], terms: Tensor) -> tuple[dict[str, float], Tensor]:
        """The terms and the norm of the gradient by name, and the norm on the device."""
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips; a no-op unless fp16
        norm = total_norm(self.optimizer)
        values = torch.cat([terms, norm[None]]).tolist()  # one transfer for all
        return dict(zip([*names, NORM], values, strict=True)), norm

    def _fault(self, values: dict[str, float]) -> str:
        """What is not finite in the values of one rank; "" if all are finite, or if the scaler deals with it."""
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is None or (bad == NORM and self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return ""
        return f"{NORM} is {values[bad]}" if bad == NORM else f"loss term {bad} is {values[bad]}"

    def _discard(self, before: Snapshot) -> None:
        """Undoes what forward and backward have changed, except that their random numbers are used up."""
        for buffer, kept in zip(self._statistics, before.statistics, strict=True):
            buffer.copy_(kept)
        self.optimizer.zero_grad()
        self.scaler = self._fresh_scaler(self.scaler.state_dict())  # one that has not seen these gradients
        self.stepped = False

    def _skip_or_raise(self, cause: str) -> None:
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
        get_event_storage().put_scalar("skipped_steps", self.skipped, smoothing_hint=False)

    def _fresh_scaler(self, state: dict | None = None) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        if state:
            scaler.load_state_dict(state)
        return scaler

    def _diagnose(self, batch: list[dict], parts: list[tuple], outcome: StepOutcome, before: Snapshot) -> str:
        """Repeats the pass on all ranks and reports what is found; returns the first cause, the same on all ranks."""
        rng_state = torch_state(self.device)
        set_torch_state(before.rng_state, self.device)
        model = unwrap(self.model)
        finding, (images, *_) = search(
            model, parts, lambda part: self._losses(model, *part), with_gradients=outcome.only_gradients
        )
        fault, message = outcome.faults[comm.get_rank()], ""
        found_somewhere = any(comm.all_gather(finding is not None))
        if finding is not None or (fault and not found_somewhere):
            message = self._report(finding, fault, batch, images, before.rng_state)
        set_torch_state(rng_state, self.device)
        return next(message for message in comm.all_gather(message) if message)

    def _report(
        self, finding: NonfiniteTensor | None, fault: str, batch: list[dict], images: list[dict], rng_state: dict
    ) -> str:
        """Writes the report of this rank; returns its sentence."""
        rank = comm.get_rank()
        path = self.dump_folder / f"iteration_{self.iter}_rank_{rank}"
        names = [file_name(image) for image in images]
        what = f"{finding} ({fault})" if finding and fault else str(finding or f"{fault}, but not when repeated")
        content = {
            "iteration": self.iter,
            "rank": rank,
            "processes": comm.get_world_size(),
            "fault": fault,
            "tensor": finding and finding.tensor,
            "statistics": finding and finding.statistics,
            "images": names,
            "learning_rates": sorted({group["lr"] for group in self.optimizer.param_groups}),
            "precision": str(self.amp_dtype or torch.float32),
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "device": str(self.device),
            "skipped": self.skipped,
        }
        write_report(path, batch, rng_state, content)
        return f"iteration {self.iter}, rank {rank}: {what}; images: {', '.join(names)}; see {path}.json"

    def _log(self, values: list[dict[str, float]]) -> None:
        """Logs every term under its name, their sum, and the sums of the groups main / aux / dn for the console."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        means = {name: sum(rank[name] for rank in values) / len(values) for name in values[0]}
        means["data_time"] = max(rank["data_time"] for rank in values)
        terms, groups = {name: value for name, value in means.items() if name not in (NORM, "data_time")}, {}
        for name, value in terms.items():
            if "/" in name:
                group = f"loss_{name.split('/')[0]}"
                groups[group] = groups.get(group, 0.0) + value
        storage.put_scalars(total_loss=sum(terms.values()), **groups, **means)
        if self.scaler.is_enabled():
            storage.put_scalar("overflow_steps", self.overflows, smoothing_hint=False)

    def state_dict(self) -> dict:
        """Adds the gradient scaler's state and the numbers of skipped steps."""
        counts = {"skipped": self.skipped, "overflows": self.overflows}
        return {**super().state_dict(), "scaler": self.scaler.state_dict(), **counts}

    def load_state_dict(self, state_dict: dict) -> None:
        """Counterpart of :meth:`state_dict`; takes those of older versions too."""
        super().load_state_dict(state_dict)
        self.skipped, self.overflows = state_dict.get("skipped", 0), state_dict.get("overflows", 0)
        self.scaler = self._fresh_scaler(state_dict.get("scaler"))  # empty when the checkpoint was trained without fp16
