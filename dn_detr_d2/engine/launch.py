"""Processes that start together and end together: our own launcher, and the places that torchrun or SLURM assign.

When one process fails, the others have a few seconds to leave; then they show the Python stacks of their threads and are
killed. What is told is the first cause, not the broken connections that follow from it.
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

GRACE = 3.0  # seconds for the others to leave by themselves
SHOW_STACK = getattr(signal, "SIGUSR2", None)  # a process of ours writes where it stands, and goes on; not on Windows
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class ProcessError(RuntimeError):
    """One of several processes has failed; the text is the first cause."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among all: on its machine (``local``) and in the whole run.

    Attributes:
        url: where they meet, as ``init_process_group`` takes it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    url: str = "env://"


def assigned_place(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun, or a SLURM script, has put into the environment; None if it has not.

    Raises:
        ConfigError: RANK, WORLD_SIZE and LOCAL_RANK are there but no numbers that fit, or a restart would hang.
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
    return Place(rank, world, local_rank, local_world)


def join(place: Place, timeout: float) -> None:
    """Meets the other processes, over NCCL where there is a GPU, else over gloo; SIGUSR2 shows this one's stack from now on.

    Args:
        place: of this process.
        timeout: seconds that a process waits for the others, here and later.
    """
    if SHOW_STACK is not None:
        faulthandler.register(SHOW_STACK, all_threads=True)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.url,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout),
    )
    comm.create_local_process_group(place.local_world_size)
    comm.synchronize()


def launch(
    main: Callable, processes: int, machines: int, machine_rank: int, url: str, timeout: float, args: tuple
) -> int:
    """Runs ``main(*args)`` in all processes of this machine; in this one if it is the only one.

    Args:
        main: a function that can be pickled.
        processes: on this machine.
        machines, machine_rank: how many there are, and which is this.
        url: where the processes meet, "auto" = a free port of this machine.
        timeout: see :func:`join`.
        args: of ``main``.

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
        watch = _Watch(Path(folder))
        with watch:
            for local_rank in range(processes):
                place = Place(machine_rank * processes + local_rank, world, local_rank, processes, url)
                method = multiprocessing.get_start_method()
                watch.start(context.Process(target=_run, args=(main, place, timeout, folder, method, args)))
            watch.wait()
        return watch.exit_code()


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


class _Watch:
    """Waits for processes; ends all when one has failed or left, and hands on the request to stop."""

    def __init__(self, folder: Path):
        self.started, self.folder, self.asked, self.killed, self.before = [], folder, None, set(), {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self._hand_on) for number in SIGNALS}

    def __exit__(self, kind, *_) -> None:
        """Whatever goes wrong here, Ctrl-C included, leaves no process behind."""
        try:
            if kind is not None:
                self._end_all()
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def start(self, process) -> None:
        """Starts one of the processes; one that comes too late for a request to stop gets it too."""
        self.started.append(process)
        process.start()
        if self.asked:
            os.kill(process.pid, self.asked)

    def _alive(self) -> list:
        return [process for process in self.started if process.is_alive()]

    def _hand_on(self, number: int, frame=None) -> None:
        self.asked = number
        for process in self._alive():
            os.kill(process.pid, number)

    def wait(self) -> None:
        """Returns when all are gone. One that has failed or left gives the others ``GRACE`` seconds."""
        deadline = None
        while alive := self._alive():
            wait([process.sentinel for process in alive], timeout=0.2)
            left = any(process.exitcode == REQUEUE for process in self.started)
            failed = any(p.exitcode not in (None, 0, REQUEUE) for p in self.started) or any(self.folder.iterdir())
            if left and not self.asked:  # it was asked by itself
                self._hand_on(SIGNALS[0])
            if (failed or left) and deadline is None:
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                self._kill(process for process in alive if process not in self.killed)
                deadline = time.monotonic() + 1

    def _end_all(self) -> None:
        """Ctrl-C, which a terminal sends to all: those that have not got it do so now, and nobody is waited for long."""
        for process in self._alive():
            os.kill(process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process in self.started:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _kill(self, processes: Iterable) -> None:
        for process in processes:
            self.killed.add(process)
            if SHOW_STACK is not None:
                print(
                    f"process {process.pid} does not leave and is killed; it stands here:", file=sys.stderr, flush=True
                )
                os.kill(process.pid, SHOW_STACK)
            process.join(0.3)
            process.kill()

    def exit_code(self) -> int:
        """0 or 75 of the whole; raises ProcessError."""
        codes = [process.exitcode for process in self.started]
        stopped = {0, REQUEUE}
        if self.asked:  # a process that has not begun to train dies of the signal, those that wait for it are killed
            stopped |= {-number for number in SIGNALS} | {p.exitcode for p in self.killed}
        if set(codes) <= stopped or REQUEUE in codes:  # one that left with 75 has left all its work on the disk
            return REQUEUE if any(codes) else 0
        raise ProcessError(self._first_cause(codes))

    def _first_cause(self, codes: list[int]) -> str:
        """A process that was killed from outside, else the earliest record, else any exit code."""
        for process, code in zip(self.started, codes, strict=True):
            if code == -signal.SIGKILL and process not in self.killed:
                return f"process {process.pid} was killed (SIGKILL); if nobody did, look whether memory ran out (dmesg)"
        records = [json.loads(file.read_text()) for file in self.folder.glob("*.json")]
        if records:
            cause = min(records, key=lambda record: record["time"])["cause"]
            stuck = [str(process.pid) for process in self.started if process in self.killed]
            return cause + f"; meanwhile process {', '.join(stuck)} stood where its stack above says" * bool(stuck)
        return f"the processes of this machine ended with the codes {codes} (-N = by signal N)"


def _run(main: Callable, place: Place, timeout: float, folder: str, method: str, args: tuple) -> None:
    """What a process of the launcher does; writes down why it failed before it leaves.

    ``method``: how loader processes are to start. Python would hand down "spawn", and each would import everything again.
    """
    end_with_parent()
    multiprocessing.set_start_method(method, force=True)
    try:
        join(place, timeout)
        main(*args)
    except SystemExit as leaving:
        leave(leaving.code)
    except (Exception, KeyboardInterrupt) as error:
        _ignore_signals()
        record = {"time": time.time(), "cause": describe(error, place)}
        with atomic_write(Path(folder) / f"{place.rank}.json", "w") as file:
            file.write(json.dumps(record))
        leave(1)


def leave(code: int) -> None:
    """Ends this process at once and for certain; for one that has failed or was asked to stop.

    What Python does at the end of a process can wait for ever: for loader processes, for threads, for the other ranks.
    Loader processes are ended, logs are closed, and nothing else is waited for.

    Args:
        code: of the process.
    """
    _ignore_signals()
    end_loader_processes()
    with suppress(Exception):
        multiprocessing.util._run_finalizers(0)  # names of semaphores go; those that wait have a lower priority
    with suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _ignore_signals() -> None:
    """From here on this process leaves, and a second signal changes neither how nor with which code."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """A launcher that is killed takes this process with it (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def describe(error: BaseException, place: Place | None = None) -> str:
    """An error as one line that is never empty; an unexpected one is printed with its traceback first.

    Args:
        error: as it was caught.
        place: of this process among several, None = it is the only one.
    """
    rank = f"rank {place.rank} of {place.world_size}: " if place is not None and place.world_size > 1 else ""
    if isinstance(error, KeyboardInterrupt):
        return f"{rank}interrupted by Ctrl-C (SIGINT); a training goes on from its last checkpoint with --resume"
    told = sentence(error)
    if told and isinstance(error, UserError | FloatingPointError | ProcessError):
        return told
    traceback.print_exception(error)
    return f"{rank}{type(error).__name__}: {told or _without_words(error)} (its traceback stands above)"


FROM_LOADER = re.compile(r"Caught \w+ in (?:DataLoader worker|loader) process[^\n]*\.\n")


def sentence(error: BaseException) -> str:
    """The words of an error in one line; of one that comes from a loader process without the traceback around them."""
    text = str(error).strip()
    if FROM_LOADER.match(text):
        kinds = r"(?:[A-Za-z_]\w*\.)*" + re.escape(type(error).__name__)
        text = re.split(rf"^{kinds}: ", text, flags=re.MULTILINE)[-1]
        text = text.splitlines()[-1] if FROM_LOADER.match(text) else text  # it had another kind there
    return " ".join(text.split())


def _without_words(error: BaseException) -> str:
    """What can be said of an error that says nothing: where it was raised."""
    ended = "an iterator, such as the data loader's, has no more to give; " * isinstance(error, StopIteration)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return ended + "".join(f"raised in {x.name}, {Path(x.filename).name} line {x.lineno}" for x in place)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
