"""Signal handling of the worker processes of PyTorch's DataLoader, which end together with the process that reads from them.

PyTorch and ``multiprocessing`` send a loader process one SIGTERM and then wait for it; a cluster sends SIGTERM to all
processes of a job, and the training still needs the images of its last step. So a loader process checks who sent the signal:
one of its parent ends it, any other is forwarded to the parent, which decides.
"""

import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from PIL import Image
from torch._utils import ExceptionWrapper

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
POLL = 1.0  # seconds between two checks whether the parent is alive
GRACE_PERIOD = 1.0  # seconds that loader processes have to exit after SIGTERM
# Priority of a finalizer: those from 0 on run before multiprocessing waits for its children.
BEFORE_MULTIPROCESSING = 10
# PyTorch's sentence where it misses a loader process before the signal tells how that one has ended.
UNEXPECTED_EXIT = re.compile(r"DataLoader worker \(pid\(s\) .*\) exited unexpectedly")
MEMORY_HINT = "if nobody did it, look whether memory ran out (dmesg)"
_registered: set[int] = set()  # process ids, because a forked process starts without the finalizers of its parent


def init_worker(worker: int, then: Callable[[int], None] | None = None) -> None:
    """``worker_init_fn`` of every loader; to be called in the main thread of the loader process.

    Ctrl-C reaches all processes of a terminal and is left to the parent. SIGTERM and SIGUSR1 end this process if the parent
    sent them, and are forwarded to the parent if not. When the parent is gone, this process ends within ``POLL`` seconds.
    Where the system does not tell who sent a signal (macOS), it is forwarded once and the second one ends this process.

    Args:
        worker: number of the loader process.
        then: another ``worker_init_fn`` to call.
    """
    keep_image_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = _tell_feeder_error
    sys.excepthook = _say_unless_parent_left
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_answer_signals, args=(os.getppid(), _folder()), name="signals", daemon=True).start()
    if then is not None:
        then(worker)


def keep_image_memory(blocks: int = 8) -> None:
    """Lets Pillow keep memory of images that are gone for the next ones; it is cheaper than new pages from the system.

    Args:
        blocks: how many, of 16 MB at most each; see "Block allocator" in Pillow's documentation.
    """
    Image.core.set_blocks_max(blocks)


@contextmanager
def signals_wait() -> Iterator[None]:
    """A context to start loader processes in: signals are blocked until the processes can handle them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell_feeder_error(queue, error: Exception, sent) -> None:
    """Sends an error instead of a batch that could not be sent, such as when no socket can be made in TMPDIR.

    By default Python prints it and drops the batch, for which the parent then waits for ever.
    """
    if isinstance(sent, tuple) and len(sent) == 2 and not isinstance(sent[1], ExceptionWrapper):
        where = f"in loader process {os.getpid()}, which could not send a batch to its parent"
        queue.put((sent[0], ExceptionWrapper((type(error), error, error.__traceback__), where)))
    else:
        traceback.print_exception(error)
        _leave("")


def _say_unless_parent_left(kind: type, error: BaseException, trace) -> None:
    """An excepthook: a parent that exits while it receives a batch is no error of this process."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def explained(batches: Iterator) -> Iterator:
    """The batches of loader processes; one that is killed is reported as such, whichever way PyTorch notices it.

    Raises:
        RuntimeError: instead of the error of the broken connection, and of PyTorch's that names the process alone.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught "):  # raised by what reads the images, and told by PyTorch
            raise
        raise RuntimeError(
            f"a loader process was killed while it handed over a batch ({type(error).__name__}); {MEMORY_HINT}"
        ) from error
    except RuntimeError as error:
        if not UNEXPECTED_EXIT.match(str(error)):
            raise
        raise RuntimeError(f"{error}: a loader process was killed or has crashed; {MEMORY_HINT}") from error


def _answer_signals(parent: int, inherited: str) -> None:
    """Handles signals in a thread of the loader process. ``inherited``: temporary folder of the parent."""
    forwarded = False
    while True:
        if hasattr(signal, "sigtimedwait"):
            received = signal.sigtimedwait(STOP_SIGNALS, POLL)
            if os.getppid() != parent:
                _leave(inherited)
            if received is None:
                continue
            number, own = received.si_signo, received.si_pid == parent
        else:
            number, own = signal.sigwait(STOP_SIGNALS), forwarded
        if own:
            _leave(inherited)
        forwarded = True
        os.kill(parent, number)


def _folder() -> str:
    """The temporary folder of this process for sockets; "" before it is needed."""
    return multiprocessing.current_process()._config.get("tempdir") or ""


def _leave(inherited: str) -> None:
    """Exits at once, and removes the sockets that this process has made."""
    if _folder() and _folder() != inherited:
        shutil.rmtree(_folder(), ignore_errors=True)
    os._exit(0)


def guard(loader):
    """The same loader with :func:`init_worker`, and with loader processes that do not outlive this process.

    Args:
        loader: a DataLoader, or one of Detectron2's wrappers of it.
    """
    inner = loader
    while not hasattr(inner, "worker_init_fn"):
        inner = getattr(inner, "_dataset", None) or inner.dataset
    inner.worker_init_fn = partial(init_worker, then=inner.worker_init_fn)
    end_at_exit()
    return loader


def end_at_exit() -> None:
    """At the exit of this process, ends its loader processes before ``multiprocessing`` waits for them without limit."""
    if os.getpid() not in _registered:
        _registered.add(os.getpid())
        multiprocessing.util.Finalize(None, end_loader_processes, exitpriority=BEFORE_MULTIPROCESSING)


def end_loader_processes(grace: float = GRACE_PERIOD) -> None:
    """Ends the daemonic child processes of this process, which loader processes are: SIGTERM, then SIGKILL.

    Args:
        grace: seconds between the two.
    """
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if not children:
        return
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise because a loader process has exited.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + grace
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()
