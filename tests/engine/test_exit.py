"""How the program ends, looked at from outside: exit code, time, processes that are left, last line.

Situations x who gets a signal x loader processes x processes of the training. Ten seconds are allowed, as for a cluster.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from naming import naming
from PIL import Image
from program import Program
from toy_training import command, differing, load

LIMIT = 10  # seconds from the signal, or from the first sign of the error, to the end of the last process
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def program():
    with Program() as server:
        yield server


def write_set(folder: Path, images: int, entries: int, damaged: int | None = None) -> list[str]:
    """An entry for DATASETS.COCO_JSON: so many pictures, of which several entries may name the same."""
    folder.mkdir()
    for i in range(images):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    if damaged is not None:
        whole = (folder / f"{damaged}.png").read_bytes()
        (folder / f"{damaged}.png").write_bytes(whole[: len(whole) // 2])
    listed = [{"id": i, "file_name": f"{i % images}.png", "height": 64, "width": 64} for i in range(entries)]
    boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [5, 5, 30, 30]} for i in range(entries)]
    content = {"images": listed, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return [folder.name, str(folder / "a.json"), str(folder)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Data sets: "good", "bad" with a damaged picture, and "long", whose evaluation takes half a minute."""
    root = tmp_path_factory.mktemp("sets")
    sizes = {"good": (8, 8, None), "bad": (8, 8, 5), "long": (8, 4000, None)}
    return [write_set(root / name, *size) for name, size in sizes.items()]


def line(folder, sets, *more, train="good", test=(), ranks=1, workers=2, options=()):
    """The arguments of an endless training."""
    overrides = ["DATASETS.COCO_JSON", sets, "DATASETS.TRAIN", (train,), "DATASETS.TEST", test]
    overrides += ["DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", 100000, "SOLVER.STEPS", (99999,)]
    given = ["--num-gpus", str(ranks), "--dist-url", "auto", *options]
    return command(folder, *given, overrides=[*overrides, "SOLVER.CHECKPOINT_PERIOD", 2, *more])[1:]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, program, sets):
    """The checkpoint of a training of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    run = program.start(line(folder / "out", sets, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()), folder / "said.txt")
    assert run.wait(60) == 0, run.said()
    return folder / "out" / "model_final.pth"


def first_checkpoint(folder):
    return (folder / "model_0000001.pth").exists


def to_main(run, number):
    os.kill(run.pid, number)


def to_group(run, number):
    os.killpg(run.pid, number)


def to_rank(run, number):
    os.kill(run.children()[-1], number)


def to_worker(run, number):
    os.kill(run.children()[-1], number)


def to_worker_of_rank(run, number):
    os.kill(run.children(run.children()[-1])[-1], number)


SIGNALS = [
    (to_main, signal.SIGTERM, 1, 0),
    (to_main, signal.SIGTERM, 1, 1),
    (to_main, signal.SIGUSR1, 1, 4),
    (to_group, signal.SIGTERM, 1, 4),
    (to_group, signal.SIGUSR1, 1, 2),
    (to_worker, signal.SIGTERM, 1, 2),
    (to_worker, signal.SIGUSR1, 1, 1),
    (to_main, signal.SIGTERM, 2, 2),
    (to_group, signal.SIGTERM, 2, 2),
    (to_rank, signal.SIGUSR1, 2, 0),
    (to_worker_of_rank, signal.SIGTERM, 2, 1),
]


@pytest.mark.parametrize(("to", "number", "ranks", "workers"), SIGNALS)
def test_exit_75_after_a_signal_in_training(tmp_path, program, sets, to, number, ranks, workers):
    out = tmp_path / "out"
    run = program.start(line(out, sets, ranks=ranks, workers=workers), tmp_path / "said.txt")
    run.until(first_checkpoint(out))
    to(run, number)
    assert run.wait(LIMIT, clean=workers == 1 and ranks == 1) == 75, run.said()
    stopped = int(re.search(r"iteration (\d+)", run.last_line())[1])
    assert (out / "last_checkpoint").read_text() == f"model_{stopped:07d}.pth"


MEASURING = {
    "evaluation": ["TEST.EVAL_PERIOD", 3],
    "hook": ["TEST.INSTABILITY.NUM_IMAGES", 4000, "TEST.INSTABILITY.PERIOD", 3],
}


@pytest.mark.parametrize(("where", "to", "ranks", "workers"), [
    ("evaluation", to_main, 1, 0), ("evaluation", to_group, 1, 2), ("evaluation", to_worker, 1, 2),
    ("evaluation", to_main, 2, 2), ("evaluation", to_rank, 2, 0), ("hook", to_main, 1, 2), ("hook", to_group, 2, 1),
])  # fmt: skip
def test_exit_75_in_the_midst_of_an_evaluation(tmp_path, program, sets, where, to, ranks, workers):
    """The checkpoint is that of the last step; the evaluation is at least ten times as long as what is allowed."""
    out = tmp_path / "out"
    arguments = line(out, sets, *MEASURING[where], test=("long",), ranks=ranks, workers=workers)
    run = program.start(arguments, tmp_path / "said.txt")
    run.until("Start inference" if where == "evaluation" else first_checkpoint(out))
    time.sleep(1.0)  # now it is under way
    to(run, signal.SIGTERM)
    assert run.wait(LIMIT) == 75, run.said()
    assert naming("iteration 2").search(run.last_line())
    assert (out / "last_checkpoint").read_text() == "model_0000002.pth"


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1)])
def test_exit_75_before_the_first_step(tmp_path, program, sets, ranks, workers):
    out = tmp_path / "out"
    run = program.start(line(out, sets, ranks=ranks, workers=workers), tmp_path / "said.txt")
    run.until(out.exists)
    to_main(run, signal.SIGTERM)
    assert run.wait(LIMIT) == 75, run.said()


@pytest.mark.parametrize(("to", "ranks"), [(to_main, 1), (to_group, 1), (to_worker, 1), (to_main, 2)])
def test_exit_75_with_eval_only(tmp_path, program, sets, weights, to, ranks):
    arguments = line(
        tmp_path / "out", sets, "MODEL.WEIGHTS", weights, test=("long",), ranks=ranks, options=["--eval-only"]
    )
    run = program.start(arguments, tmp_path / "said.txt")
    run.until("Start inference")
    time.sleep(1.0)
    to(run, signal.SIGTERM)
    assert run.wait(LIMIT) == 75, run.said()
    assert run.last_line().startswith("SIGTERM")


ERRORS = {
    "training": {"train": "bad"},
    "evaluation": {"test": ("bad",)},
    "hook": {"test": ("bad",)},
    "construction": {},
}


@pytest.mark.parametrize(("where", "ranks", "workers"), [
    ("training", 1, 0), ("training", 1, 1), ("training", 1, 4), ("training", 2, 2),
    ("evaluation", 1, 2), ("evaluation", 2, 2), ("hook", 1, 2), ("hook", 2, 1),
    ("construction", 1, 2), ("construction", 2, 2),
])  # fmt: skip
def test_the_exit_code_after_an_error_and_its_cause_in_the_last_line(tmp_path, program, sets, where, ranks, workers):
    more = {
        "evaluation": ["TEST.EVAL_PERIOD", 2],
        "hook": ["TEST.INSTABILITY.NUM_IMAGES", 8, "TEST.INSTABILITY.PERIOD", 2],
        "construction": ["TEST.INSTABILITY.NUM_IMAGES", 8],  # but no data set to measure on
    }.get(where, [])
    out = tmp_path / "out"
    arguments = line(out, sets, *more, **ERRORS[where], ranks=ranks, workers=workers)
    run = program.start(arguments, tmp_path / "said.txt")
    assert run.wait(60) == (2 if where == "construction" else 1)  # 2: refused before a process starts
    cause = "TEST.INSTABILITY.NUM_IMAGES = 8" if where == "construction" else "5.png"
    assert run.last_line().startswith("error: ")
    assert cause in run.last_line()


@pytest.mark.parametrize(("to", "ranks", "workers"), [
    (to_group, 1, 2), (to_main, 1, 0), (to_group, 2, 2), (to_main, 2, 2),
])  # fmt: skip
def test_exit_1_after_ctrl_c(tmp_path, program, sets, to, ranks, workers):
    """A terminal sends it to the whole group, ``kill -INT`` to one process."""
    out = tmp_path / "out"
    run = program.start(line(out, sets, ranks=ranks, workers=workers), tmp_path / "said.txt")
    run.until(first_checkpoint(out))
    to(run, signal.SIGINT)
    assert run.wait(LIMIT) == 1
    assert run.last_line().startswith("error: ")
    assert "Ctrl-C" in run.last_line()


@pytest.mark.parametrize(("to", "ranks"), [(to_worker, 1), (to_worker_of_rank, 2), (to_rank, 2)])
def test_exit_1_when_a_process_is_killed(tmp_path, program, sets, to, ranks):
    out = tmp_path / "out"
    run = program.start(line(out, sets, ranks=ranks), tmp_path / "said.txt")
    run.until(first_checkpoint(out))
    to(run, signal.SIGKILL)
    assert run.wait(LIMIT) == 1
    assert run.last_line().startswith("error: ")
    assert "kill" in run.last_line()


def test_exit_of_all_when_the_main_process_is_killed(tmp_path, program, sets):
    """Nobody is left to end the ranks and their loader processes."""
    out = tmp_path / "out"
    run = program.start(line(out, sets, ranks=2), tmp_path / "said.txt")
    run.until(first_checkpoint(out))
    to_main(run, signal.SIGKILL)
    assert run.wait(LIMIT) == -signal.SIGKILL


def test_exit_1_when_loader_processes_cannot_send(tmp_path, program, sets):
    """Paths of sockets may have about 100 characters. The parent waited for ever for a batch that was dropped."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    run = program.start(line(tmp_path / "out", sets), tmp_path / "said.txt", {"TMPDIR": str(long)})
    assert run.wait(60) == 1
    assert run.last_line().startswith("error: OSError: AF_UNIX path too long")


def test_exit_of_the_program_as_it_is_started(tmp_path, sets):
    """Without the server of the other tests: a damaged image with loader processes, and SIGTERM to the main process."""
    whole = [sys.executable, str(ROOT / "train_net.py"), *line(tmp_path / "bad", sets, train="bad")]
    start = time.monotonic()
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "5.png" in done.stderr.rstrip().splitlines()[-1]
    out = tmp_path / "good"
    with (tmp_path / "said.txt").open("w") as screen:
        asked = subprocess.Popen([*whole[:2], *line(out, sets)], env=ENVIRONMENT, stdout=screen, stderr=screen)
    while not first_checkpoint(out)():
        assert asked.poll() is None
        assert time.monotonic() < start + 200
        time.sleep(0.05)
    asked.terminate()
    assert asked.wait(LIMIT) == 75


@pytest.mark.parametrize(
    "what", [pytest.param("error", marks=pytest.mark.long), "signal", pytest.param("killed", marks=pytest.mark.long)]
)
def test_exit_under_torchrun(tmp_path, sets, what):
    """torchrun ends with a code of its own; its processes must be gone, and its report names the cause."""
    out, screen = tmp_path / "out", tmp_path / "said.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = line(out, sets, train="bad" if what == "error" else "good")
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    with screen.open("w") as file:
        run = subprocess.Popen(
            [*torchrun, str(ROOT / "train_net.py"), *arguments], env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 120
    if what != "error":
        while not first_checkpoint(out)():
            assert run.poll() is None, screen.read_text()
            assert time.monotonic() < end, screen.read_text()
            time.sleep(0.05)
        asked = time.monotonic()
        ranks = [int(x) for x in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        os.kill(ranks[-1], signal.SIGTERM if what == "signal" else signal.SIGKILL)
    assert run.wait(120) != 0
    said = screen.read_text()
    if what == "error":
        assert "5.png" in said
    else:
        assert time.monotonic() - asked < LIMIT
        assert ("exitcode  : 75" if what == "signal" else "exitcode  : -9") in said
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


LIBRARY = """
import sys
sys.path[:0] = {paths!r}
from toy_training import make_cfg, train
train(make_cfg({out!r}, "DATASETS.COCO_JSON", {sets!r}, "DATASETS.TRAIN", ("bad",), "DATALOADER.NUM_WORKERS", 2))
"""


def test_exit_of_a_script_that_uses_the_trainer_as_a_library(tmp_path, sets):
    """Without train_net.py around it, Python's own end of a process must not wait for loader processes."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
    script = tmp_path / "script.py"
    script.write_text(LIBRARY.format(paths=paths, out=str(tmp_path / "out"), sets=sets))
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "5.png" in done.stderr.rstrip().splitlines()[-1]


def test_an_evaluation_that_was_cut_off_is_repeated_and_the_training_is_the_same(tmp_path, program, sets):
    """Stopped in the evaluation after iteration 3; resumed, it has every evaluation of a training that was not stopped."""
    more = ["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (5,), "TEST.EVAL_PERIOD", 3, "INPUT.MIN_SIZE_TEST", 32]
    few = write_set(tmp_path / "few", 8, 150)
    given = {"test": ("few",), "workers": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = program.start(line(whole, [*sets, few], *more, **given), tmp_path / "whole.txt")
    assert run.wait(120) == 0, run.said()
    run = program.start(line(stopped, [*sets, few], *more, **given), tmp_path / "stopped.txt")
    run.until("Start inference")
    to_main(run, signal.SIGTERM)
    assert run.wait(LIMIT) == 75, run.said()
    assert json.loads((stopped / "last_evaluation.json").read_text()) == {"iteration": 0}
    resumed = line(stopped, [*sets, few], *more, **given, options=["--resume"])
    run = program.start(resumed, tmp_path / "resumed.txt")
    assert run.wait(120) == 0, run.said()
    assert run.said().count("Start inference") == 2  # the one that was cut off, and the last
    assert differing(load(whole), load(stopped)) == []
    names = ("best_metric.json", "last_evaluation.json")
    assert [(whole / name).read_text() for name in names] == [(stopped / name).read_text() for name in names]
