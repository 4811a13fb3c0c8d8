"""Runs functions of the tests on several ranks over gloo, and programs, without importing everything again for each.

One fork server lives as long as the test session (with pytest-xdist, one in each of its processes). It has imported the
packages and computed nothing, so a rank is a process of its own that starts in milliseconds, with a state that no test
before it has touched. A rank that raises or dies fails the test with its traceback, and the other rank is ended.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from conftest import ROOT
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


def _forking() -> multiprocessing.context.BaseContext:
    """A context whose processes receive signals as this one does now, before the launcher listens itself."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    class Forked(multiprocessing.context.ForkProcess):
        def run(self):
            for number, handler in handlers.items():
                signal.signal(number, handler)
            super().run()

    class Forking(multiprocessing.context.ForkContext):
        Process = Forked

    return Forking()


def fork_directly() -> None:
    """In a process that has computed nothing: the package's launcher forks its processes, which are its children."""
    given = torch.multiprocessing.get_context
    torch.multiprocessing.get_context = lambda method=None: _forking() if method == "spawn" else given(method)


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


def run_program(*line, cwd: Path = ROOT, timeout: float = 200) -> subprocess.CompletedProcess:
    """Runs ``python line...`` from the server; for programs of this project, where their imports are not what is tested.

    Returns:
        subprocess.CompletedProcess: with the exit code, and what was printed as text.
    """
    line = [str(x) for x in line]
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        screens = [Path(folder, name) for name in ("stdout", "stderr")]
        process = fork_server().Process(target=_program, args=(line, cwd, screens))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, process.exitcode, *(screen.read_text() for screen in screens))


def _program(line: list[str], cwd: Path, screens: list[Path]) -> None:
    for target, screen in zip((1, 2), screens, strict=True):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT), target)
    sys.stdout.reconfigure(encoding="utf-8", errors="strict")
    os.chdir(cwd)
    sys.argv, sys.path[0:0] = line, [str(Path(line[0]).resolve().parent)]
    runpy.run_path(line[0], run_name="__main__")


def _rank(rank: int, ranks: int, meeting: str, function, args) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    comm.create_local_process_group(ranks)
    comm.synchronize()
    function(*args)
    torch.distributed.destroy_process_group()
