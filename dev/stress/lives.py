"""Trainings that are cut off again and again, and compared with one that was left in peace.

A *harm* is what happens to a life: it strikes at a moment and says afterwards whether the life ended as it should.
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
from .toy import begin, differing, load, log_of

EVERY_STEP = ["SOLVER.CHECKPOINT_PERIOD", 1]


class Harm:
    """What is done to a life.

    Args:
        folder: of the training.
        draw: of the moments and the like.
    """

    options = EVERY_STEP

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.notes = folder, draw, {}

    def strike(self, child: int) -> None:
        """Does it."""
        raise NotImplementedError

    def verdict(self, code: int) -> str | None:
        """What is wrong with how the life ended, None = nothing."""
        return None

    def relieve(self) -> None:
        """Takes the harm away, as far as it lasts."""

    def note(self, what: str) -> None:
        """Counts something for the table."""
        self.notes[what] = self.notes.get(what, 0) + 1

    def await_writing(self, within: float) -> tuple | None:
        """Waits until a checkpoint is being written, and up to ``within`` seconds more; returns the part before it."""
        before, end = self.part(), time.monotonic() + 20
        while self.part() == before and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(self.draw.uniform(0, within))
        return before

    def part(self) -> tuple | None:
        """Name, number and time of the file that is being written."""
        for path in self.folder.glob(".*.pth.part"):
            try:
                found = path.stat()
                return path.name, found.st_ino, found.st_mtime_ns
            except FileNotFoundError:
                continue
        return None


class Kill(Harm):
    """``kill -9`` of all processes; every second one waits until a checkpoint is being written."""

    def strike(self, child: int) -> None:
        """SIGKILL to the group."""
        before = self.await_writing(0.02) if sum(self.notes.values()) % 2 else self.part()
        os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
        self.note("inside the writing" if self.part() not in (None, before) else "elsewhere")


class Ask(Harm):
    """SIGTERM and SIGUSR1 by turns; nothing else writes a checkpoint."""

    options = ["SOLVER.CHECKPOINT_PERIOD", 10**6]

    def strike(self, child: int) -> None:
        """The signal, to the one process that a cluster knows."""
        number = signal.SIGTERM if sum(self.notes.values()) % 2 else signal.SIGUSR1
        os.kill(child, number)
        self.note(number.name)

    def verdict(self, code: int) -> str | None:
        """The exit code, and a checkpoint that is the last iteration said in the log."""
        if code != REQUEUE:
            return f"a life that was asked to stop ended with code {code}"
        said = [line for line in log_of(self.folder).read_text().splitlines() if "stopped after iteration" in line]
        found = find_resumable(self.folder)
        number = int(said[-1].split("stopped after iteration ")[1].split(",")[0])
        return (
            None if found and found.stem == f"model_{number:07d}" else f"stopped after {number}, but {found} is there"
        )


class NarrowFiles(Harm):
    """A limit to the size of files (RLIMIT_FSIZE), somewhere in the checkpoint: its writing fails at a random byte."""

    def strike(self, child: int) -> None:
        """From outside, while it runs."""
        size = self.size()
        resource.prlimit(child, resource.RLIMIT_FSIZE, (self.draw.randrange(20_000, size), resource.RLIM_INFINITY))

    def size(self) -> int:
        """Bytes of a checkpoint, of which there may be none so far."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.pth")]
        self.had, self.heard = bool(sizes), len(log_of(self.folder).read_text())
        return max(sizes, default=1_000_000)

    def verdict(self, code: int) -> str | None:
        """The error names the file, the last checkpoint is whole, and no part is left."""
        said = log_of(self.folder).read_text()[self.heard :]
        if code != 1 or "checkpoint '" not in said or not any(x in said for x in ("cannot be written", "MB are free")):
            return f"a life whose disk was full ended with code {code}: {said.strip().splitlines()[-1]!r}"
        if list(self.folder.glob(".*.part")):
            return "a part was left behind"
        self.note("no space, told beforehand" if "MB are free" in said else "told while writing")
        return "no checkpoint is left" if self.had and find_resumable(self.folder) is None else None


class FullDisk(NarrowFiles):
    """A disk of its own (tmpfs, root only) that another file fills up to a random rest."""

    def strike(self, child: int) -> None:
        """Leaves less than a checkpoint, every second time while one is being written."""
        size = self.size()
        rest = self.draw.randrange(size // 2)
        if sum(self.notes.values()) % 2:
            self.await_writing(0.005)
        free = shutil.disk_usage(self.folder).free
        with open(self.folder / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - rest))

    def relieve(self) -> None:
        """Empties the disk."""
        (self.folder / "filler").unlink(missing_ok=True)


def harm_after(child: int, harm: Harm, delay: float) -> tuple[bool, int]:
    """Harms a life some seconds after its training has started; returns whether, and how it ended (-N = by signal N)."""
    due, struck, deadline = None, False, time.monotonic() + 600
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return struck, os.waitstatus_to_exitcode(status)
        if due is None and (harm.folder / "started").exists():
            due = time.monotonic() + delay
        if not struck and due is not None and time.monotonic() > due:
            harm.strike(child)
            struck = True
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def in_peace(folder: Path, options: list, processes: int) -> float:
    """Trains without harm; returns the seconds of a step."""
    code = harm_after(begin(folder, options, processes), Harm(folder, None), float("inf"))[1]
    if code != 0:
        raise SystemExit(f"error: the toy does not train:\n{log_of(folder).read_text()[-3000:]}")
    begun, ended = (folder / "started").stat().st_mtime, (folder / "model_final.pth").stat().st_mtime
    return (ended - begun) / options[1]


def cut_off(scratch: Path, kind: type[Harm], times: int, processes: int, workers: int, seed: int) -> Result:
    """Lives until one comes to its end, and compares it with one in peace.

    Args:
        scratch: an empty folder.
        kind: of the harm.
        times: so many lives are harmed, less if the training ends before.
        processes, workers: of a life.
        seed: of the moments.
    """
    start, draw = time.monotonic(), random.Random(seed)
    options = ["SOLVER.MAX_ITER", 4 * times + 10, *kind.options, "DATALOADER.NUM_WORKERS", workers]
    peaceful, harmed = scratch / "peaceful", scratch / "harmed"
    for folder in (peaceful, harmed):
        folder.mkdir()
    if kind is FullDisk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(harmed)], check=True)
    try:
        step = in_peace(peaceful, [*options, *Ask.options], processes)
        harm, wrong, done = kind(harmed, draw), [], 0
        while True:
            delay = draw.uniform(0, 6 * step) if done < times else float("inf")
            struck, code = harm_after(begin(harmed, options, processes), harm, delay)
            harm.relieve()
            if code == 0:
                break
            fault = harm.verdict(code) if struck else f"a life ended by itself with code {code}"
            wrong += [fault] if fault else []
            if not struck:
                break
            done += 1
            if sys.stderr.isatty():
                print(f"\r{kind.__name__}: {done} of {times}", end="", file=sys.stderr)
        if (harmed / "model_final.pth").exists():
            wrong += [f"differs: {name}" for name in differing(load(peaceful), load(harmed))]
        else:
            wrong.append(f"no end was reached: {log_of(harmed).read_text()[-1500:]}")
    finally:
        if kind is FullDisk:
            subprocess.run(["umount", str(harmed)], check=True)
    seen = ", ".join(f"{n} {what}" for what, n in sorted(harm.notes.items()))
    name = f"{kind.__name__}, {processes} process{'es' * (processes > 1)}, {workers} loader workers"
    return Result(name, done, f"{seen}; {options[1]} iterations", wrong, time.monotonic() - start)
