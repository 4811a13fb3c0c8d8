"""Stopping on request: SIGTERM or SIGUSR1 means a checkpoint after the present step, and exit code 75."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...data.interruption import Interrupted
from ...data.worker_process import STOP_SIGNALS as SIGNALS
from ...data.worker_process import end_loader_processes

logger = logging.getLogger(__name__)

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on


class StopRequest:
    """Whether somebody has asked this process to stop.

    Attributes:
        received: name of the signal, None = nobody has.
    """

    def __init__(self):
        self.received, self._before, self._may_raise, self._told = None, {}, False, False

    def listen(self) -> None:
        """Takes over both signals, which only a main thread can."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        if self._may_raise:
            self._may_raise = False
            raise Interrupted

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once, so nobody may be waiting for this process."""
        before, self._may_raise = self._may_raise, True
        try:
            yield
        finally:
            self._may_raise = before and self.received is None

    def interruptible(self) -> AbstractContextManager:
        """The same where this is the only process; nothing where others could be waiting for it."""
        return self.raising() if comm.get_world_size() == 1 else nullcontext()

    def anywhere(self) -> bool:
        """Whether this rank is to stop, or another one has told that it is; never waits for the others."""
        if comm.get_world_size() == 1:
            return self.received is not None
        store = dist.distributed_c10d._get_default_store()
        # torchrun keeps the store when it starts again
        key = f"dn_detr_d2/stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if self.received and not self._told:
            store.set(key, self.received)
            self._told = True
        return self._told or store.check([key])

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class StopHook(HookBase):
    """Asks after each step whether any rank is to stop; then all write a checkpoint and leave. To be the first.

    Args:
        request: of this process.
    """

    def __init__(self, request: StopRequest):
        self.request, self.agreed = request, None

    def after_step(self) -> None:
        """Agrees with the other ranks."""
        received = comm.all_gather(self.request.received)
        self.agreed = next((name for name in received if name), None)


class LeaveHook(HookBase):
    """Counterpart of :class:`StopHook` that ends the training. To stand after the checkpoint, before the evaluation.

    An evaluation that would be due is done by the training that is resumed, see
    :class:`~.repeat_evaluation.EvaluationRecord`.

    Args:
        stop: says whether.
    """

    def __init__(self, stop: StopHook):
        self.stop = stop

    def after_step(self) -> None:
        """Raises Interrupted on all ranks; a training that is through anyway is let through."""
        if self.stop.agreed is not None and self.trainer.iter + 1 < self.trainer.max_iter:
            raise Interrupted


def leave_training(received: str, done: int) -> None:
    """Raises SystemExit(75) once the checkpoint is on the disk; every rank must call.

    Args:
        received: name of the signal.
        done: iterations done.
    """
    end_loader_processes()  # what they say when nobody reads from them any more comes before the last line
    comm.synchronize()  # nobody leaves before the checkpoint is on the disk
    logger.warning(
        "%s: stopped after iteration %d, a checkpoint is written; the same command with --resume goes on (exit code %d)",
        received,
        done - 1,
        REQUEUE,
    )
    raise SystemExit(REQUEUE)
