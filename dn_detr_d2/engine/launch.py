"""Starts the processes of a run and supervises them; takes ranks from torchrun or SLURM where those start them.

When one process fails, the others have a few seconds to exit; then they print the Python stacks of their threads and are
killed. The error reported is the first cause, not the broken connections that follow from it.
"""

import ctypes
import faulthandler
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
from detectron2.utils import comm

from ..data.worker_process import end_loader_processes
from ..errors import ConfigError, UserError
from ..utils.files import atomic_write
from .hooks.graceful_stop import REQUEUE, SIGNALS

GRACE_PERIOD = 3.0  # seconds for the others to exit by themselves
STACK_SIGNAL = getattr(signal, "SIGUSR2", None)  # makes a process print its stacks and go on; not on Windows
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class ProcessError(RuntimeError):
    """One of several processes has failed; the text is the first cause."""


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process on its machine (``local``) and in the whole run.

    Attributes:
        url: the rendezvous, as ``init_process_group`` takes it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    url: str = "env://"


def rank_info_from_env(environment: Mapping[str, str]) -> RankInfo | None:
    """The rank that torchrun, or a SLURM script, has put into the environment; None if neither has.

    Raises:
        ConfigError: RANK, WORLD_SIZE and LOCAL_RANK are set, but not to numbers that agree, or a restart would hang.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in environment for name in names):
        return None
    texts = [environment[name] for name in names]
    texts.append(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]))
    if not all(text.isdecimal() for text in texts):
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers, got {texts}")
    rank, world, local_rank, local_world = map(int, texts)
    if rank >= world or local_rank >= local_world or local_world < 1 or world % local_world:
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = {texts} do not fit together")
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and environment.get(OWN_STORE) != "1" and not torch.cuda.is_available():
        raise ConfigError(
            f"torchrun --max-restarts over gloo may hang, because restarted processes read the keys of their predecessors "
            f"(pytorch#135712); set {OWN_STORE}=1"
        )
    return RankInfo(rank, world, local_rank, local_world)


def init_distributed(rank_info: RankInfo, timeout: float) -> None:
    """Joins the process group (NCCL with a GPU, else gloo). From then on SIGUSR2 makes this process print its stacks.

    Args:
        rank_info: of this process.
        timeout: seconds that a process waits for the others, here and in collectives.
    """
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL, all_threads=True)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank_info.local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=rank_info.url,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=timedelta(seconds=timeout),
    )
    comm.create_local_process_group(rank_info.local_world_size)
    comm.synchronize()


def launch(
    main: Callable, processes: int, machines: int, machine_rank: int, url: str, timeout: float, args: tuple
) -> int:
    """Runs ``main(*args)`` in all processes of this machine; in this one if it is the only one.

    Args:
        main: a function that can be pickled.
        processes: number on this machine.
        machines, machine_rank: number of machines, and the index of this one.
        url: the rendezvous, "auto" = a free port of this machine.
        timeout: see :func:`init_distributed`.
        args: arguments of ``main``.

    Returns:
        int: 0, or 75 if the run was asked to stop and can be resumed.

    Raises:
        ProcessError: one of the processes has failed.
    """
    world = processes * machines
    if world == 1:
        main(*args)
        return 0
    url = f"tcp://127.0.0.1:{_free_port()}" if url == "auto" else url
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="dn_detr_d2-launch-") as folder:
        supervisor = _Supervisor(Path(folder))
        with supervisor:
            for local_rank in range(processes):
                rank_info = RankInfo(machine_rank * processes + local_rank, world, local_rank, processes, url)
                method = multiprocessing.get_start_method()
                arguments = (main, rank_info, timeout, folder, method, args)
                process = context.Process(target=_run, args=arguments, name=f"rank {rank_info.rank}")
                supervisor.start(process)
            supervisor.wait()
        return supervisor.exit_code()


def check_processes(cfg, num_processes: int, num_machines: int = 1, *, cpu_wanted: bool = False) -> None:
    """Refuses ``--num-gpus`` that this machine cannot serve.

    Args:
        cfg: the config.
        num_processes: on this machine.
        num_machines: of the whole run.
        cpu_wanted: whether the user asked for MODEL.DEVICE cpu, rather than having no GPU.

    Raises:
        ConfigError: more GPUs than exist, several CPU processes where GPUs are visible, or an uneven batch.
    """
    gpus, on_gpu = torch.cuda.device_count(), str(cfg.MODEL.DEVICE).startswith("cuda")
    if num_processes < 1:
        raise ConfigError(f"--num-gpus must be at least 1, got {num_processes}")
    if on_gpu and num_processes > gpus:
        raise ConfigError(f"--num-gpus {num_processes}, but this machine has {gpus}; lower it or add MODEL.DEVICE cpu")
    if not on_gpu and num_processes > 1 and gpus:
        raise ConfigError(
            f"--num-gpus {num_processes} with MODEL.DEVICE cpu starts CPU processes, which must not see a GPU; "
            "set CUDA_VISIBLE_DEVICES=''"
        )
    if not on_gpu and num_processes > 1 and not cpu_wanted:
        raise ConfigError(
            f"--num-gpus {num_processes}, but this machine has no GPU; for {num_processes} CPU processes (gloo) add "
            "MODEL.DEVICE cpu"
        )
    world, steps = num_processes * num_machines, cfg.SOLVER.ACCUMULATION_STEPS
    if steps > 1 and cfg.SOLVER.IMS_PER_BATCH % (world * steps):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH}, which is all images of a step, is not divisible by "
            f"{world} processes x SOLVER.ACCUMULATION_STEPS = {steps}"
        )
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} is not divisible by {world} processes")


class _Supervisor:
    """Waits for processes; ends all when one has failed or exited early, and forwards signals that ask for a stop."""

    def __init__(self, folder: Path):
        self.started, self.folder, self.stop_signal, self.killed = [], folder, None, set()
        self.previous_handlers = {}

    def __enter__(self):
        self.previous_handlers = {number: signal.signal(number, self._forward) for number in SIGNALS}

    def __exit__(self, kind, *_) -> None:
        """Leaves no process behind, whatever goes wrong here, Ctrl-C included."""
        try:
            if kind is not None:
                self._terminate_all()
        finally:
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)

    def start(self, process) -> None:
        """Starts one of the processes; a signal that came before is forwarded to it too."""
        self.started.append(process)
        process.start()
        if self.stop_signal:
            os.kill(process.pid, self.stop_signal)

    def _alive(self) -> list:
        return [process for process in self.started if process.is_alive()]

    def _forward(self, number: int, frame=None) -> None:
        self.stop_signal = number
        for process in self._alive():
            os.kill(process.pid, number)

    def wait(self) -> None:
        """Returns when all have exited. When one has failed or exited early, the others have ``GRACE_PERIOD`` seconds."""
        deadline = None
        while alive := self._alive():
            wait([process.sentinel for process in alive], timeout=0.2)
            left = any(process.exitcode == REQUEUE for process in self.started)
            failed = any(p.exitcode not in (None, 0, REQUEUE) for p in self.started) or any(self.folder.iterdir())
            if left and not self.stop_signal:  # the signal was sent to that process alone
                self._forward(SIGNALS[0])
            if (failed or left) and deadline is None:
                deadline = time.monotonic() + GRACE_PERIOD
            if deadline is not None and time.monotonic() > deadline:
                self._kill(process for process in alive if process not in self.killed)
                deadline = time.monotonic() + 1

    def _terminate_all(self) -> None:
        """After Ctrl-C, which a terminal sends to all: sends it to those that did not get it, and waits for nobody long."""
        for process in self._alive():
            os.kill(process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE_PERIOD
        for process in self.started:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _kill(self, processes: Iterable) -> None:
        for process in processes:
            self.killed.add(process)
            if STACK_SIGNAL is not None:
                print(
                    f"process {process.pid} did not exit and is killed; its stack trace:", file=sys.stderr, flush=True
                )
                os.kill(process.pid, STACK_SIGNAL)
            process.join(0.3)
            process.kill()

    def exit_code(self) -> int:
        """0 or 75 for the whole run; raises ProcessError."""
        codes = [process.exitcode for process in self.started]
        stopped = {0, REQUEUE}
        if self.stop_signal:  # a process that has not begun to train dies of it, those that wait for it are killed
            stopped |= {-number for number in SIGNALS} | {p.exitcode for p in self.killed}
        if set(codes) <= stopped or REQUEUE in codes:  # a process that exits with 75 has written its checkpoint
            return REQUEUE if any(codes) else 0
        raise ProcessError(self._first_cause(codes))

    def _first_cause(self, codes: list[int]) -> str:
        """A process that was killed from outside, else the earliest recorded error, else any exit code."""
        for process, code in zip(self.started, codes, strict=True):
            if code == -signal.SIGKILL and process not in self.killed:
                return (
                    f"{process.name}, process {process.pid}, was killed (SIGKILL); check whether memory ran out (dmesg)"
                )
        records = [json.loads(file.read_text()) for file in self.folder.glob("*.json")]
        if records:
            cause = min(records, key=lambda record: record["time"])["cause"]
            stuck = [str(process.pid) for process in self.started if process in self.killed]
            if stuck:
                cause += f"; process {', '.join(stuck)} did not exit and was killed, see its stack trace above"
            return cause
        return f"the processes of this machine exited with the codes {codes} (-N = killed by signal N)"


def _run(main: Callable, rank_info: RankInfo, timeout: float, folder: str, method: str, args: tuple) -> None:
    """Target of a process of the launcher; records the error before it exits.

    ``method``: how loader processes are started. They would inherit "spawn", and each would import everything again.
    """
    end_with_parent()
    multiprocessing.set_start_method(method, force=True)
    try:
        init_distributed(rank_info, timeout)
        main(*args)
    except SystemExit as leaving:
        leave(leaving.code)
    except (Exception, KeyboardInterrupt) as error:
        _ignore_signals()
        record = {"time": time.time(), "cause": format_error(error, rank_info)}
        with atomic_write(Path(folder) / f"{rank_info.rank}.json", "w") as file:
            file.write(json.dumps(record))
        leave(1)


def leave(code: int) -> None:
    """Exits this process immediately; for one that has failed or was asked to stop.

    Python's own exit can wait for ever: for loader processes, for threads, for other ranks. Here loader processes are ended,
    logs are closed, and nothing else is waited for.

    Args:
        code: exit code.
    """
    _ignore_signals()
    end_loader_processes()
    with suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # unlinks semaphores; finalizers that wait have a lower priority
    with suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _ignore_signals() -> None:
    """This process is exiting: a second signal changes neither how nor with which code."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def format_error(error: BaseException, rank_info: RankInfo | None = None) -> str:
    """An error as one line that is never empty; the traceback of an unexpected one is printed first.

    Args:
        error: as it was caught.
        rank_info: of this process, None = it is the only one.
    """
    several = rank_info is not None and rank_info.world_size > 1
    rank = f"rank {rank_info.rank} of {rank_info.world_size}: " if several else ""
    if isinstance(error, KeyboardInterrupt):
        return f"{rank}interrupted by Ctrl-C (SIGINT); a training goes on from its last checkpoint with --resume"
    message = error_message(error)
    if message and isinstance(error, UserError | FloatingPointError | ProcessError):
        return message
    traceback.print_exception(error)
    return f"{rank}{type(error).__name__}: {message or _origin(error)} (see its traceback above)"


FROM_LOADER = re.compile(r"Caught \w+ in (?:DataLoader worker|loader) process[^\n]*\.\n")


def error_message(error: BaseException) -> str:
    """The message of an error in one line; of one from a loader process without the traceback around it."""
    text = str(error).strip()
    if FROM_LOADER.match(text):
        kinds = r"(?:[A-Za-z_]\w*\.)*" + re.escape(type(error).__name__)
        text = re.split(rf"^{kinds}: ", text, flags=re.MULTILINE)[-1]
        text = text.splitlines()[-1] if FROM_LOADER.match(text) else text  # it had another kind there
    return " ".join(text.split())


def _origin(error: BaseException) -> str:
    """Where an error without a message was raised."""
    exhausted = "an iterator, such as the data loader's, is exhausted; " if isinstance(error, StopIteration) else ""
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    return exhausted + "".join(f"raised in {x.name}, {Path(x.filename).name} line {x.lineno}" for x in frames)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
