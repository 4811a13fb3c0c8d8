"""Runs functions of the tests on several ranks over gloo, without importing everything again for each of them.

One fork server lives as long as the test session (with pytest-xdist, one in each of its processes). It has imported the
packages and computed nothing, so a rank is a process of its own that starts in milliseconds, with a state that no test
before it has touched. A rank that raises or dies fails the test with its traceback, and the other rank is ended.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.utils import comm

PRELOADED = ["ranks", "conftest", "pytest", "dn_detr_d2.engine"]
TIMEOUT = 100  # seconds that a rank waits for the other


def fork_server() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from the server; starts it at the first call."""
    if multiprocessing.forkserver._forkserver._forkserver_pid is None:
        multiprocessing.set_forkserver_preload(PRELOADED)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(
            path or os.getcwd() for path in sys.path
        )  # Python hands on no path here
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return multiprocessing.get_context("forkserver")


def fork_what_is_spawned(patch) -> None:
    """The package's launcher takes its processes from the server, as long as the monkeypatch holds."""
    given, server = torch.multiprocessing.get_context, fork_server()
    patch.setattr(
        torch.multiprocessing, "get_context", lambda method=None: server if method == "spawn" else given(method)
    )


class _Forked(multiprocessing.context.ForkProcess):
    """A fork that receives signals as a new process does."""

    def run(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        super().run()


class _Forking(multiprocessing.context.ForkContext):
    Process = _Forked


def fork_directly() -> None:
    """In a process that has computed nothing: the package's launcher forks its processes, which are its children."""
    given = torch.multiprocessing.get_context
    torch.multiprocessing.get_context = lambda method=None: _Forking() if method == "spawn" else given(method)


def on_ranks(function, *args, ranks: int = 2) -> None:
    """Calls ``function(*args)`` on each rank of a new process group, in new processes with one thread each.

    Args:
        function: one that can be pickled; the modules of tests are found.
        args: the same for each rank.
        ranks: how many.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank has raised; the text has its traceback.
        torch.multiprocessing.ProcessExitedException: a rank was killed or has left with a code.
    """
    fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        meeting = f"file://{Path(folder, 'store')}"
        given = (ranks, meeting, function, args)
        torch.multiprocessing.start_processes(_rank, given, ranks, start_method="forkserver")


def _rank(rank: int, ranks: int, meeting: str, function, args) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    comm.create_local_process_group(ranks)
    comm.synchronize()
    function(*args)
    torch.distributed.destroy_process_group()
