"""Graceful stop: after SIGTERM or SIGUSR1 a checkpoint of the present step, then exit code 75."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...data.interruption import Interrupted
from ...data.worker_process import STOP_SIGNALS as SIGNALS
from ...data.worker_process import end_loader_processes

logger = logging.getLogger(__name__)

REQUEUE = 75  # exit code EX_TEMPFAIL of sysexits.h: the same command with --resume continues


class StopRequest:
    """Handles the signals that ask this process to stop.

    Attributes:
        received: name of the signal, None if there was none.
    """

    def __init__(self):
        self.received, self._previous_handlers, self._may_raise, self._published = None, {}, False, False

    def listen(self) -> None:
        """Installs handlers for both signals; does nothing outside the main thread."""
        if not self._previous_handlers and threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        if self._may_raise:
            self._may_raise = False
            raise Interrupted

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which a signal raises Interrupted at once; no other rank may be waiting for this one."""
        before, self._may_raise = self._may_raise, True
        try:
            yield
        finally:
            self._may_raise = before and self.received is None

    def interruptible(self) -> AbstractContextManager:
        """The same if this is the only process; with several, others could be waiting for it, and nothing is raised."""
        return self.raising() if comm.get_world_size() == 1 else nullcontext()

    def anywhere(self) -> bool:
        """Whether this rank is to stop, or another one has published that it is; never waits for the others."""
        if comm.get_world_size() == 1:
            return self.received is not None
        store = dist.distributed_c10d._get_default_store()
        # torchrun keeps the store when it restarts
        key = f"dn_detr_d2/stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if self.received and not self._published:
            store.set(key, self.received)
            self._published = True
        return self._published or store.check([key])

    def release(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


class StopHook(HookBase):
    """Agrees after each step whether to stop; then all ranks write a checkpoint and exit. Register it first.

    Args:
        request: of this process.
    """

    def __init__(self, request: StopRequest):
        self.request, self.agreed = request, None

    def after_step(self) -> None:
        """Exchanges the signals of all ranks, on the host: one number each."""
        name = self.request.received
        if comm.get_world_size() > 1:
            number = torch.tensor(int(signal.Signals[name]) if name else 0)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
            name = signal.Signals(int(number)).name if number else None
        self.agreed = name


class LeaveHook(HookBase):
    """Counterpart of :class:`StopHook` that ends the training. Register it after the checkpoint, before the evaluation.

    An evaluation that is due is run by the training that is resumed, see
    :class:`~.repeat_evaluation.EvaluationRecord`.

    Args:
        stop: of the same training.
    """

    def __init__(self, stop: StopHook):
        self.stop = stop

    def after_step(self) -> None:
        """Raises Interrupted on all ranks, unless this was the last iteration anyway."""
        if self.stop.agreed is not None and self.trainer.iter + 1 < self.trainer.max_iter:
            raise Interrupted


def leave_training(received: str, done: int) -> None:
    """Raises SystemExit(75) once the checkpoint is on the disk; every rank must call.

    Args:
        received: name of the signal.
        done: iterations done.
    """
    end_loader_processes()  # their messages about the closed connection come before the last line
    comm.synchronize()  # no rank exits before the checkpoint is on the disk
    logger.warning(
        "%s: stopped after iteration %d, a checkpoint is written; the same command with --resume goes on (exit code %d)",
        received,
        done - 1,
        REQUEUE,
    )
    raise SystemExit(REQUEUE)
