"""Runs train_net.py as a process of its own, from outside, without importing everything again for each run.

A server imports the packages once. For each run it forks a child that leads a session of its own and executes the program
as ``python train_net.py ...`` would; what the child does at its end (exit code, children, last line) is the program's.
Its ranks are forked too, where Python would start them anew; tests of the command itself do without this server.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Program:
    """The server, seen from a test; to be used in a ``with`` statement."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, __file__]
        self.server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(30)

    def start(self, arguments: list[str], screen: Path, environment: dict | None = None) -> "Run":
        """Starts ``train_net.py arguments``; all that it prints goes to ``screen``."""
        temporary = tempfile.mkdtemp(prefix="exit-")  # not below the test's folder: paths of sockets must be short
        environment = {"TMPDIR": temporary, **(environment or {})}
        order = {"arguments": [str(x) for x in arguments], "screen": str(screen), "environment": environment}
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return Run(int(self.server.stdout.readline()), screen, Path(temporary))


class Run:
    """One run: the leader of a session."""

    def __init__(self, pid: int, screen: Path, temporary: Path):
        self.pid, self.screen, self.temporary = pid, screen, temporary

    def said(self) -> str:
        return self.screen.read_text() if self.screen.exists() else ""

    def code(self) -> int | None:
        """The exit code, -N for signal N, None while it runs."""
        file = Path(f"{self.screen}.code")
        return int(file.read_text()) if file.exists() else None

    def until(self, condition, seconds: float = 120) -> None:
        """Waits for a condition, which is a function or a text on the screen."""
        met = condition if callable(condition) else lambda: condition in self.said()
        end = time.monotonic() + seconds
        while not met():
            assert self.code() is None, f"it ended before: {self.said()}"
            assert time.monotonic() < end, f"{condition} has not come: {self.said()}"
            time.sleep(0.02)

    def wait(self, seconds: float, *, clean: bool = False) -> int:
        """The exit code; fails if it does not come in time, or if a process or (``clean``) a temporary file is left."""
        end = time.monotonic() + seconds
        while self.code() is None or self.left():
            if time.monotonic() > end:
                left = self.left()
                self.kill()
                raise AssertionError(f"code {self.code()} and {left} after {seconds} s: {self.said()}")
            time.sleep(0.02)
        left = list(self.temporary.iterdir())
        shutil.rmtree(self.temporary)
        assert left == [] or not clean
        return self.code()

    def left(self) -> list[int]:
        """Living processes of the session, loader processes included."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                state, _, _, session = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def children(self, of: int | None = None) -> list[int]:
        """Child processes of the run, or of one of its processes, oldest first."""
        parent = of or self.pid
        return sorted(pid for pid in self.left() if _parent(pid) == parent)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def last_line(self) -> str:
        return self.said().rstrip("\n").rsplit("\n", 1)[-1]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


def serve() -> None:
    """What the server does: one order a line on stdin, the process id of each run on stdout."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without
    import ranks  # noqa: F401

    import dn_detr_d2.doctor
    import dn_detr_d2.engine  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(**order)
        threading.Thread(target=_write_code, args=(pid, order["screen"])).start()
        print(pid, flush=True)


def _write_code(pid: int, screen: str) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    Path(f"{screen}.part").write_text(str(code))
    Path(f"{screen}.part").rename(f"{screen}.code")


def _run(arguments: list[str], screen: str, environment: dict) -> None:
    os.setsid()
    from ranks import fork_directly

    fork_directly()
    file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, file), (2, file)):
        os.dup2(source, target)
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = [str(ROOT / "train_net.py"), *arguments]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, 1) for i, mode in ((0, "r"), (1, "w"), (2, "w")))
    code = 0
    try:  # what the interpreter does with a script, its own way out included
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    serve()
