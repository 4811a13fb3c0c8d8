"""Stopping on request: SIGTERM or SIGUSR1 means a checkpoint after the present step, and exit code 75."""

import logging
import signal
import threading

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether somebody has asked this process to stop.

    Attributes:
        received: name of the signal, None = nobody has.
    """

    def __init__(self):
        self.received, self._before = None, {}

    def listen(self) -> None:
        """Takes over both signals, which only a main thread can."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

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
    """Counterpart of :class:`StopHook` that leaves. To be the last hook: an evaluation that is due comes before.

    Args:
        stop: says whether.
    """

    def __init__(self, stop: StopHook):
        self.stop = stop

    def after_step(self) -> None:
        """Raises SystemExit(75) on all ranks; a training that is through anyway is let through."""
        if self.stop.agreed is None or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        comm.synchronize()  # nobody leaves before the checkpoint is on the disk
        logger.warning(
            "%s: stopped after iteration %d, a checkpoint is written; the same command with --resume goes on (exit code %d)",
            *(self.stop.agreed, self.trainer.iter, REQUEUE),
        )
        raise SystemExit(REQUEUE)
