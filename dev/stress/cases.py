"""Many small cases in forked children: a case that hangs or takes its process with it is named, and the others go on."""

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
LONGEST = 5.0  # seconds of a case; then its child is killed


def run_cases(
    make: Callable[[Path], Callable[[int], str]], count: int, folder: Path, jobs: int
) -> tuple[Counter, list]:
    """Runs the cases 0 to ``count`` - 1.

    Args:
        make: is given a folder of its own and returns ``case(number)``, which says in a word how it ended; a word that
            begins with "WRONG" tells what must not happen. Called in each child.
        count: of the cases.
        folder: for the children.
        jobs: children at a time.

    Returns:
        tuple: how often each word was said, and what went wrong.
    """
    words, wrong, waiting = Counter(), [], [(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
    running = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            child = _Child(make, *waiting.pop(), folder)
            running[child.pid] = child
        pid, status = os.wait()
        child = running.pop(pid)
        for word in child.words():
            if word.startswith("WRONG"):
                wrong.append(word.removeprefix("WRONG "))
            else:
                words[word] += 1
        if code := os.waitstatus_to_exitcode(status):
            number = child.number()
            if number < child.first:
                raise RuntimeError(f"a child of {folder} could not begin, see its traceback")
            wrong.append(f"case {number} took more than {LONGEST} s" if code == -signal.SIGALRM else
                         f"case {number} ended its process with {code}")  # fmt: skip
            if number + 1 < child.end:
                waiting.append((number + 1, child.end))
    return words, wrong


class _Child:
    """A process with some of the cases; tells the number of the present one through shared memory."""

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
        with open(
            self.home / "words", "w", buffering=1
        ) as words:  # a line at a time, so that none is lost with the child
            for number in range(first, self.end):
                self.shared[:] = struct.pack("q", number)
                signal.setitimer(signal.ITIMER_REAL, LONGEST)
                word = case(number)
                signal.setitimer(signal.ITIMER_REAL, 0)
                fault = word.startswith("WRONG")
                print(f"WRONG case {number}:{word[5:]}" if fault else word, file=words)
        return 0

    def number(self) -> int:
        """Of the present case."""
        return struct.unpack("q", self.shared[:])[0]

    def words(self) -> list[str]:
        """Those that it has said."""
        path = self.home / "words"
        return path.read_text().splitlines() if path.exists() else []
