"""Fault injection: trainings that are interrupted again and again, compared with one that was not.

A :class:`Fault` is injected into a run at a random moment; afterwards it says whether the run ended as it should.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from dn_detr_d2.checkpoint.resume import find_resumable
from dn_detr_d2.engine import REQUEUE

from .results import Result
from .toy import differing, load, log_of, start_run

NEVER = float("inf")  # seconds until a fault
TIMEOUT = 600.0  # seconds of a run; then it is killed


class Fault:
    """Something that interrupts a run.

    Args:
        folder: OUTPUT_DIR of the run.
        draw: source of random moments and sizes.
    """

    options = ["SOLVER.CHECKPOINT_PERIOD", 1]

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.counts = folder, draw, {}

    def inject(self, pid: int) -> None:
        """Injects the fault into the process group ``pid``."""
        raise NotImplementedError

    def check_exit(self, code: int) -> str | None:
        """What is wrong with how the run ended, None = nothing."""
        return None

    def clear(self) -> None:
        """Removes the fault if it outlasts the run."""

    def count(self, outcome: str) -> None:
        """Counts an outcome for the table."""
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def is_odd(self) -> bool:
        """Whether an odd number of outcomes has been counted, for faults that alternate."""
        return sum(self.counts.values()) % 2 == 1

    def wait_for_write(self, delay: float) -> tuple | None:
        """Waits until a checkpoint is being written, and up to ``delay`` seconds more; returns the earlier partial file."""
        before, end = self.partial_file(), time.monotonic() + 20
        while self.partial_file() == before and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(self.draw.uniform(0, delay))
        return before

    def partial_file(self) -> tuple | None:
        """Name, inode and modification time of the checkpoint that is being written, None without one."""
        for path in self.folder.glob(".*.pth.part"):
            try:
                found = path.stat()
                return path.name, found.st_ino, found.st_mtime_ns
            except FileNotFoundError:
                continue
        return None


class SigKill(Fault):
    """``kill -9`` of all processes; every second one waits until a checkpoint is being written."""

    def inject(self, pid: int) -> None:
        """Sends SIGKILL to the process group."""
        before = self.wait_for_write(0.02) if self.is_odd() else self.partial_file()
        os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
        self.count("while a checkpoint was written" if self.partial_file() not in (None, before) else "elsewhere")


class GracefulStop(Fault):
    """SIGTERM and SIGUSR1 in alternation; no other checkpoint is written."""

    options = ["SOLVER.CHECKPOINT_PERIOD", 10**6]

    def inject(self, pid: int) -> None:
        """Sends the signal to the launcher, the one process that a cluster knows."""
        number = signal.SIGTERM if self.is_odd() else signal.SIGUSR1
        os.kill(pid, number)
        self.count(number.name)

    def check_exit(self, code: int) -> str | None:
        """Checks the exit code, and that the checkpoint is of the iteration that the log names."""
        if code != REQUEUE:
            return f"a run that was asked to stop ended with code {code}"
        lines = [line for line in log_of(self.folder).read_text().splitlines() if "stopped after iteration" in line]
        found = find_resumable(self.folder)
        number = int(lines[-1].split("stopped after iteration ")[1].split(",")[0])
        if found and found.stem == f"model_{number:07d}":
            return None
        return f"stopped after {number}, but {found} is there"


class WriteFailure(Fault):
    """A limit to the size of files (RLIMIT_FSIZE) below that of a checkpoint: writing one fails at a random byte."""

    def inject(self, pid: int) -> None:
        """Sets the limit of the running process from outside."""
        size = self.checkpoint_size()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.draw.randrange(20_000, size), resource.RLIM_INFINITY))

    def checkpoint_size(self) -> int:
        """Bytes of a checkpoint; an estimate if there is none so far."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.pth")]
        self.had_checkpoint, self.log_length = bool(sizes), len(log_of(self.folder).read_text())
        return max(sizes, default=1_000_000)

    def check_exit(self, code: int) -> str | None:
        """Checks that the error names the file, the last checkpoint is intact, and no partial file is left."""
        log = log_of(self.folder).read_text()[self.log_length :]
        if code != 1 or "checkpoint '" not in log or not any(x in log for x in ("cannot be written", "MB are free")):
            return f"a run whose disk was full ended with code {code}: {log.strip().splitlines()[-1]!r}"
        if list(self.folder.glob(".*.part")):
            return "a partial file was left behind"
        self.count("refused before writing" if "MB are free" in log else "failed while writing")
        return "no checkpoint is left" if self.had_checkpoint and find_resumable(self.folder) is None else None


class FullDisk(WriteFailure):
    """A file system of its own (tmpfs, root only) that another file fills up to a random rest."""

    def inject(self, pid: int) -> None:
        """Leaves less space than a checkpoint needs, every second time while one is being written."""
        size = self.checkpoint_size()
        rest = self.draw.randrange(size // 2)
        if self.is_odd():
            self.wait_for_write(0.005)
        free = shutil.disk_usage(self.folder).free
        with open(self.folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - rest))

    def clear(self) -> None:
        """Empties the file system."""
        (self.folder / "filler").unlink(missing_ok=True)


def run_with_fault(pid: int, fault: Fault, delay: float) -> tuple[bool, int]:
    """Injects a fault some seconds after a run has begun to train.

    Returns:
        tuple: whether the fault was injected before the end, and the exit code (-N = by signal N).
    """
    due, injected, deadline = None, False, time.monotonic() + TIMEOUT
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return injected, os.waitstatus_to_exitcode(status)
        if due is None and (fault.folder / "started").exists():
            due = time.monotonic() + delay
        if not injected and due is not None and time.monotonic() > due:
            fault.inject(pid)
            injected = True
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)


def reference_run(folder: Path, options: list, processes: int) -> float:
    """Trains without a fault; returns the seconds of a step. ``options`` begins with SOLVER.MAX_ITER and its value."""
    code = run_with_fault(start_run(folder, options, processes), Fault(folder, None), NEVER)[1]
    if code != 0:
        raise SystemExit(f"error: the toy training fails:\n{log_of(folder).read_text()[-3000:]}")
    begun, ended = (folder / "started").stat().st_mtime, (folder / "model_final.pth").stat().st_mtime
    return (ended - begun) / options[1]


def run_until_done(scratch: Path, kind: type[Fault], times: int, processes: int, workers: int, seed: int) -> Result:
    """Resumes an interrupted training until it reaches its end, and compares it with an uninterrupted one.

    Args:
        scratch: an empty folder.
        kind: of the fault.
        times: number of faults, fewer if the training ends before.
        processes, workers: of a run.
        seed: of the moments.
    """
    start, draw = time.monotonic(), random.Random(seed)
    options = ["SOLVER.MAX_ITER", 4 * times + 10, *kind.options, "DATALOADER.NUM_WORKERS", workers]
    reference, interrupted = scratch / "reference", scratch / "interrupted"
    for folder in (reference, interrupted):
        folder.mkdir()
    if kind is FullDisk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(interrupted)], check=True)
    try:
        step = reference_run(reference, [*options, *GracefulStop.options], processes)
        fault = kind(interrupted, draw)
        injected, wrong = _inject_repeatedly(fault, options, processes, times, 6 * step)
        if (interrupted / "model_final.pth").exists():
            wrong += [f"differs: {name}" for name in differing(load(reference), load(interrupted))]
        else:
            wrong.append(f"the training did not reach its end: {log_of(interrupted).read_text()[-1500:]}")
    finally:
        if kind is FullDisk:
            subprocess.run(["umount", str(interrupted)], check=True)
    observed = ", ".join(f"{n} {outcome}" for outcome, n in sorted(fault.counts.items()))
    plural = "es" if processes > 1 else ""
    name = f"{kind.__name__}, {processes} process{plural}, {workers} loader workers"
    return Result(name, injected, f"{observed}; {options[1]} iterations", wrong, time.monotonic() - start)


def _inject_repeatedly(
    fault: Fault, options: list, processes: int, times: int, longest_delay: float
) -> tuple[int, list[str]]:
    """Starts runs until one ends without a fault; returns how many faults were injected, and what was wrong."""
    done, wrong = 0, []
    while True:
        delay = fault.draw.uniform(0, longest_delay) if done < times else NEVER
        injected, code = run_with_fault(start_run(fault.folder, options, processes), fault, delay)
        fault.clear()
        if code == 0:
            return done, wrong
        violation = fault.check_exit(code) if injected else f"a run ended with code {code} without a fault"
        if violation:
            wrong.append(violation)
        if not injected:
            return done, wrong
        done += 1
        if sys.stderr.isatty():
            print(f"\r{type(fault).__name__}: {done} of {times}", end="", file=sys.stderr)
