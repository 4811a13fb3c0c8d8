"""The live bar: on a terminal alone, with whole log lines above it, and not where it is turned off."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from conftest import ROOT

PROGRAM = """
import logging, sys, time
from types import SimpleNamespace
from fvcore.common.history_buffer import HistoryBuffer
from detectron2.utils.logger import setup_logger
from dn_detr_d2.engine.hooks.progress import ProgressBar
setup_logger(name="detectron2", color=False)
history = HistoryBuffer()
bar = ProgressBar({wanted})
bar.trainer = SimpleNamespace(storage=SimpleNamespace(histories=lambda: {{"total_loss": history}}))
with bar.shown(2, 6):
    for i in range(2, 6):
        history.update(i / 2)
        time.sleep(0.15)
        bar.after_step()
        logging.getLogger("detectron2").info("line %d of the log", i)
logging.getLogger("detectron2").info("after it")
assert not any(type(x).__name__ == "_TqdmLoggingHandler" for x in logging.getLogger("detectron2").handlers)
"""


def on_terminal(program):
    """(stdout, stderr) of a program whose stderr is a terminal and whose stdout is a pipe."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns; none has no bar
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seen = []

    def read():
        with contextlib.suppress(OSError):  # its other end is closed
            while data := os.read(parent, 1 << 16):
                seen.append(data)

    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=child, text=True, env=environment
    )
    os.close(child)
    reader = threading.Thread(target=read)
    reader.start()
    out = process.communicate(timeout=300)[0]
    reader.join()
    os.close(parent)
    assert process.returncode == 0, b"".join(seen).decode()
    return out, b"".join(seen).decode()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_terminal_shows_iterations_and_loss_and_log_lines_stay_whole(wanted):
    out, seen = on_terminal(PROGRAM.format(wanted=wanted))
    lines = [line for line in out.splitlines() if "of the log" in line]
    assert [re.search(r"line \d of the log$", line) is not None for line in lines] == [True] * 4
    assert out.count("after it") == 1
    assert ("6/6" in seen and "loss 2.5" in seen and "training" in seen) is wanted
    assert re.search(r"\d+:\d\d<\d+:\d\d", seen) is not None or not wanted  # elapsed and remaining


def test_without_a_terminal_there_is_no_bar():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", PROGRAM.format(wanted=True)]
    ran = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "6/6" not in ran.stderr
