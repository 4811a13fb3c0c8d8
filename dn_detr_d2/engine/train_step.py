"""One training step: forward, backward, and a check that all ranks make before any weight changes."""

import contextlib
import logging
import math
import time
from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import ConfigError
from ..utils.rng import set_torch_state, torch_state
from .nonfinite import file_name, search, write_report

logger = logging.getLogger(__name__)

NORM = "gradient_norm"


class TrainStep(SimpleTrainer):
    """One training iteration on any device, with or without mixed precision.

    The weights never see a loss or a gradient that is not finite: the step is left before the optimizer, on all ranks, all
    loss terms having been read in one transfer. The error, the same on all ranks, names the first bad tensor, the iteration,
    the rank and its image files; that rank writes a report.

    A gradient that overflows under fp16 is the loss scaler's business, which leaves the step out and lowers the scale; only
    when the scale has come below 1 it is an error.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer.
        amp_dtype: autocast precision, None = float32.
        dump_folder: where reports go.
        may_skip: how many steps may be left out instead of raising the error, in the whole training.
        accumulation: parts that a batch passes in, one after the other; their gradients add up to the batch's. With more
            than one, ``model`` has :meth:`~dn_detr_d2.modeling.DenoisingDETR.step_normalizers`.

    Attributes:
        stepped: whether the last iteration has changed the weights.
        skipped, overflows: steps left out for a number that is not finite, and by the loss scaler.
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
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._moving = [buffer for norm in norms for buffer in norm.buffers()]  # what a forward pass changes

    def run_step(self) -> None:
        """Forward, backward, check, step."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        before = torch_state(self.device), [buffer.clone() for buffer in self._moving]
        self.optimizer.zero_grad()
        parts = self._parts(batch)
        earlier, losses, fault = [], {}, ""
        try:
            with self._no_exchange():
                earlier = [self._backward(self._losses(self.model, *part)) for part in parts[:-1]]
            losses = self._losses(self.model, *parts[-1])
        except FloatingPointError as error:
            fault = str(error)
        # A rank without losses must not leave the others waiting in the backward pass, where they exchange gradients.
        faults, everyone = comm.all_gather(fault), []
        if not any(faults):
            terms = sum(earlier, self._backward(losses))
            everyone = comm.all_gather({"data_time": data_time, **self._read(list(losses), terms)})
            faults = [self._fault(values) for values in everyone]
        if any(faults):
            del losses  # the graph makes room for the search
            self._leave_out(batch, parts, faults, before)
            return
        self.stepped = math.isfinite(everyone[0][NORM])
        self.overflows += not self.stepped
        if self.stepped:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self._record(everyone)

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
        normalizers = self._plain_model.step_normalizers([len(image["instances"]) for image in batch])
        return [(batch[i : i + size], normalizers) for i in range(0, len(batch), size)]

    @property
    def _plain_model(self) -> nn.Module:
        """The model without the wrapper of several processes."""
        return getattr(self.model, "module", self.model)

    def _no_exchange(self) -> contextlib.AbstractContextManager:
        """Where backward passes leave gradients with their process."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else contextlib.nullcontext()

    def _losses(self, model: nn.Module, *part) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return model(*part)

    def _backward(self, losses: dict[str, Tensor]) -> Tensor:
        """Adds the gradients to those of the parameters; returns the terms."""
        terms = torch.stack(list(losses.values()))
        self.scaler.scale(terms.sum()).backward()
        return terms.detach()

    def _read(self, names: list[str], terms: Tensor) -> dict[str, float]:
        """The terms and the norm of the gradient."""
        self.scaler.unscale_(self.optimizer)  # before the optimizer clips; a no-op unless fp16
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        *values, norm = torch.cat([terms, norm[None]]).tolist()  # one transfer for all
        return {**dict(zip(names, values, strict=True)), NORM: norm}

    def _fault(self, values: dict[str, float]) -> str:
        """What is not finite in the values of one rank; "" if all is well, or the scaler's business."""
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is None or (bad == NORM and self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return ""
        return f"{'' if bad == NORM else 'loss term '}{bad} is {values[bad]}"

    def _leave_out(self, batch: list[dict], parts: list[tuple], faults: list[str], before: tuple) -> None:
        """Puts everything back, then raises or skips; ``before``: random state and moving statistics."""
        random_state, statistics = before
        now = torch_state(self.device)
        set_torch_state(random_state, self.device)
        cause = self._explain(batch, parts, faults, random_state)
        set_torch_state(now, self.device)
        for buffer, kept in zip(self._moving, statistics, strict=True):
            buffer.copy_(kept)
        self.optimizer.zero_grad()
        self.scaler = self._fresh_scaler(self.scaler.state_dict())  # one that has not seen these gradients
        self.stepped = False
        if self.skipped >= self.may_skip:
            allowed = f" {self.skipped} steps have been skipped, as SOLVER.NONFINITE_LIMIT allows." * bool(
                self.may_skip
            )
            raise FloatingPointError(
                f"{cause}. No weight has been changed by it.{allowed} Look at the images and boxes, lower SOLVER.BASE_LR, "
                "or use bf16 for fp16"
            )
        self.skipped += 1
        logger.warning("%s. The step is skipped, the %d. of at most %d", cause, self.skipped, self.may_skip)
        get_event_storage().put_scalar("skipped_steps", self.skipped, smoothing_hint=False)

    def _fresh_scaler(self, state: dict | None = None) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        if state:
            scaler.load_state_dict(state)
        return scaler

    def _explain(self, batch: list[dict], parts: list[tuple], faults: list[str], random_state: dict) -> str:
        """Repeats the pass on all ranks and reports what is found; returns the first cause, the same on all ranks."""
        # A loss that is not finite on one rank spoils the gradients of all: then they say nothing.
        only_gradients = all(fault.startswith(NORM) for fault in faults if fault)
        model = self._plain_model
        finding, (part, *_) = search(model, parts, lambda part: self._losses(model, *part), only_gradients)
        rank, fault, sentence = comm.get_rank(), faults[comm.get_rank()], ""
        found_somewhere = any(comm.all_gather(finding is not None))
        if finding is not None or (fault and not found_somewhere):
            path = self.dump_folder / f"iteration_{self.iter}_rank_{rank}"
            images = [file_name(image) for image in part]
            what = str(finding) + f" ({fault})" * bool(fault) if finding else f"{fault}, but not when repeated"
            sentence = f"iteration {self.iter}, rank {rank}: {what}; images: {', '.join(images)}; see {path}.json"
            content = {"iteration": self.iter, "rank": rank, "processes": comm.get_world_size(), "fault": fault}
            content |= {
                "tensor": finding and finding.tensor,
                "statistics": finding and finding.statistics,
                "images": images,
            }
            write_report(path, batch, random_state, content | self._circumstances())
        return next(sentence for sentence in comm.all_gather(sentence) if sentence)

    def _circumstances(self) -> dict:
        return {
            "learning_rates": sorted({group["lr"] for group in self.optimizer.param_groups}),
            "precision": str(self.amp_dtype or torch.float32),
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "device": str(self.device),
            "skipped": self.skipped,
        }

    def _record(self, everyone: list[dict[str, float]]) -> None:
        """Logs every term under its name, and the sums of the groups main / aux / dn for the console."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        means = {name: sum(rank[name] for rank in everyone) / len(everyone) for name in everyone[0]}
        means["data_time"] = max(rank["data_time"] for rank in everyone)
        groups = {}
        for name, value in means.items():
            if "/" in name:
                group = f"loss_{name.split('/')[0]}"
                groups[group] = groups.get(group, 0.0) + value
        storage.put_scalars(total_loss=sum(groups.values()), **groups, **means)
        if self.scaler.is_enabled():
            storage.put_scalar("overflow_steps", self.overflows, smoothing_hint=False)

    def state_dict(self) -> dict:
        """Adds the gradient scaler's state and the steps that were left out."""
        left_out = {"skipped": self.skipped, "overflows": self.overflows}
        return {**super().state_dict(), "scaler": self.scaler.state_dict(), **left_out}

    def load_state_dict(self, state_dict: dict) -> None:
        """Counterpart of :meth:`state_dict`; takes those of older versions too."""
        super().load_state_dict(state_dict)
        self.skipped, self.overflows = state_dict.get("skipped", 0), state_dict.get("overflows", 0)
        self.scaler = self._fresh_scaler(state_dict.get("scaler"))  # empty when the checkpoint was trained without fp16
