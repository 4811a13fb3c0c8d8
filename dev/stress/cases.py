"""Many small cases in forked children: a case that hangs or crashes its process is named, and the others go on."""

import mmap
import os
import signal
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

BATCH = 5000  # cases of a child
MAX_SECONDS = 5.0  # of a case; then its child is killed


def run_cases(
    make: Callable[[Path], Callable[[int], str]], count: int, folder: Path, jobs: int
) -> tuple[Counter, list]:
    """Runs the cases 0 to ``count`` - 1.

    Args:
        make: is given a folder of its own and returns ``case(number)``, which returns its outcome in a word; an outcome that
            begins with "WRONG" describes a violation. Called in each child.
        count: of the cases.
        folder: for the children.
        jobs: children at a time.

    Returns:
        tuple: how often each outcome occurred, and the violations.
    """
    outcomes, wrong, waiting = Counter(), [], [(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
    running = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            child = _Child(make, *waiting.pop(), folder)
            running[child.pid] = child
        pid, status = os.wait()
        child = running.pop(pid)
        for outcome in child.outcomes():
            if outcome.startswith("WRONG"):
                wrong.append(outcome.removeprefix("WRONG "))
            else:
                outcomes[outcome] += 1
        if code := os.waitstatus_to_exitcode(status):
            number = child.number()
            if number < child.first:
                raise RuntimeError(f"a child of {folder} could not begin, see its traceback")
            hung = code == -signal.SIGALRM
            end = f"took more than {MAX_SECONDS} s" if hung else f"ended its process with {code}"
            wrong.append(f"case {number} {end}")
            if number + 1 < child.end:
                waiting.append((number + 1, child.end))
    return outcomes, wrong


class _Child:
    """A process with some of the cases; publishes the number of the current one in shared memory."""

    def __init__(self, make: Callable, first: int, end: int, folder: Path):
        self.first, self.end, self.shared = first, end, mmap.mmap(-1, 8)
        self.shared[:] = struct.pack("q", first - 1)
        self.home = Path(tempfile.mkdtemp(dir=folder))
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = self._run(make, first)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def _run(self, make: Callable, first: int) -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        case = make(self.home)
        with open(self.home / "outcomes", "w", buffering=1) as file:  # line-buffered: none is lost with the child
            for number in range(first, self.end):
                self.shared[:] = struct.pack("q", number)
                signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
                outcome = case(number)
                signal.setitimer(signal.ITIMER_REAL, 0)
                violation = outcome.startswith("WRONG")
                print(f"WRONG case {number}:{outcome[5:]}" if violation else outcome, file=file)
        return 0

    def number(self) -> int:
        """Of the current case."""
        return struct.unpack("q", self.shared[:])[0]

    def outcomes(self) -> list[str]:
        """Of the cases that are done."""
        path = self.home / "outcomes"
        return path.read_text().splitlines() if path.exists() else []
