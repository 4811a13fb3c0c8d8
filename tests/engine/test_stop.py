"""A training that is asked to stop writes a checkpoint, says so with exit code 75, and goes on as if nothing had been."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from naming import naming
from program import Program
from ranks import fork_what_is_spawned
from toy_training import command, differing, load, make_cfg, train

from dn_detr_d2 import CheckpointError
from dn_detr_d2.data.interruption import Interrupted, agree, interruptible, without_exchange
from dn_detr_d2.engine import REQUEUE, MetricPrinter, StopRequest, Trainer
from dn_detr_d2.engine.launch import launch

LONG = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 16, "SOLVER.STEPS", (15,)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def program():
    with Program() as server:
        yield server


def until(path, process, seconds=200):
    """Waits for a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"it ended before {path}"
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "processes", "workers"), [(signal.SIGTERM, 1, 2), (signal.SIGUSR1, 2, 0)])
def test_a_signal_ends_with_75_and_the_resumed_training_is_the_same(tmp_path, program, number, processes, workers):
    """The signal goes to the whole group, loader processes included, as a cluster sends it.

    The training that is stopped is the command as it is typed; the others are forked.
    """
    options = ["--num-gpus", str(processes), "--dist-url", "auto"]
    whole, stopped, said = tmp_path / "whole", tmp_path / "stopped", tmp_path / "said.txt"

    def arguments(folder, *more):
        return command(folder, *options, *more, overrides=[*LONG, "DATALOADER.NUM_WORKERS", workers])

    run = program.start(arguments(whole)[1:], tmp_path / "whole.txt")
    assert run.wait(300) == 0, run.said()
    with said.open("w") as screen:
        line = [sys.executable, *arguments(stopped)]
        process = subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True, stdout=screen, stderr=screen)
    until(stopped / "model_0000001.pth", process)
    os.killpg(process.pid, number)
    assert process.wait(120) == REQUEUE, said.read_text()
    assert naming(number.name, "iteration").search(said.read_text())
    assert not (stopped / "model_final.pth").exists()
    run = program.start(arguments(stopped, "--resume")[1:], tmp_path / "resumed.txt")
    assert run.wait(300) == 0, run.said()
    assert differing(load(whole), load(stopped)) == []


def test_a_signal_in_the_last_step_lets_the_training_end(tmp_path, monkeypatch):
    real = Trainer.run_step

    def run_step(self):
        real(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    trainer = train(make_cfg(tmp_path / "out", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()))
    assert trainer.iter == 1
    assert (tmp_path / "out" / "model_final.pth").exists()


def work_alone(folder):
    """Rank 0 works for a minute without the others, and is asked to stop; rank 1 waits where they meet."""
    request = StopRequest()
    request.listen()
    try:
        with interruptible(request.anywhere, request.raising):
            if comm.get_rank() == 0:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
                with without_exchange():
                    time.sleep(60)
            agree()
    except Interrupted:
        (folder / str(comm.get_rank())).touch()


@pytest.mark.parametrize("processes", [1, 2])
def test_work_of_one_rank_alone_is_cut_off_for_all(tmp_path, monkeypatch, processes):
    fork_what_is_spawned(monkeypatch)
    start = time.monotonic()
    assert launch(work_alone, processes, 1, 0, "auto", 100, (tmp_path,)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(rank) for rank in range(processes)]
    assert time.monotonic() - start < 45


def test_the_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    request.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.received == "SIGTERM"
    request.release()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_help_tells_of_the_exit_code():
    done = subprocess.run([sys.executable, "train_net.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert naming("SIGTERM", 75).search(done.stdout)


def test_a_stop_after_an_iteration_that_was_printed_anyway_is_no_division_by_zero(caplog):
    """The writers write once more at the end, of the same iteration."""
    with EventStorage(19) as storage:
        storage.put_scalar("total_loss", 1.0)
        printer = MetricPrinter(100)
        with caplog.at_level(logging.INFO):
            printer.write()
            printer.write()
    assert caplog.text.count("total_loss") == 2


def test_writers_that_fail_do_not_hide_why_a_training_ends(tmp_path, monkeypatch, caplog):
    """TensorBoard's writer raises after the checkpoint's error, without a name."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "run_step", lambda self: (_ for _ in ()).throw(CheckpointError("the first cause")))
    monkeypatch.setattr("detectron2.utils.events.TensorboardXWriter.close", fail)
    with pytest.raises(CheckpointError, match="the first cause"), caplog.at_level(logging.WARNING):
        train(make_cfg(tmp_path / "out"))
    assert "[Errno 28]" in caplog.text
