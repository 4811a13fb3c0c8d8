"""Several processes: whatever ends one ends all, and the last line on the screen is the first cause."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from detectron2.utils import comm
from toy_training import command, differing, load

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.training import REQUEUE, ProcessError, assigned_place, launch
from dn_detr_d2.training.processes import Place

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def leave_as(how, folder):
    """Rank 1 leaves in some way while rank 0 waits for it."""
    (folder / str(comm.get_rank())).write_text(str(os.getpid()))
    comm.synchronize()
    (folder / "met").touch()
    if comm.get_rank() == 1 and how == "refusal":
        raise DatasetError("image x.png cannot be read")
    if comm.get_rank() == 1 and how == "mistake":
        raise KeyError("forgotten")
    if comm.get_rank() == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        raise SystemExit(REQUEUE)
    if how == "hang" and comm.get_rank() == 0:
        time.sleep(300)
    if how == "hang":
        raise DatasetError("image y.png cannot be read")
    comm.synchronize()


def alive(folder):
    pids = [int((folder / str(rank)).read_text()) for rank in range(2)]
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(("how", "cause"), [
    ("refusal", "image x.png cannot be read"),
    ("mistake", "rank 1 of 2: KeyError: 'forgotten' (its traceback stands above)"),
    ("kill", "was killed (SIGKILL)"),
    ("hang", "image y.png cannot be read"),
])  # fmt: skip
def test_one_that_fails_ends_all_within_ten_seconds_and_is_the_one_that_is_told(tmp_path, how, cause):
    with pytest.raises(ProcessError) as caught:
        launch(leave_as, 2, 1, 0, "auto", 60, (how, tmp_path))
    assert cause in str(caught.value)
    assert time.time() - (tmp_path / "met").stat().st_mtime < 10
    assert alive(tmp_path) == []


def test_processes_that_stop_on_request_are_no_failure(tmp_path):
    assert launch(leave_as, 2, 1, 0, "auto", 60, ("stop", tmp_path)) == REQUEUE


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "must be numbers"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "do not fit together"),
    ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "do not fit together"),
])  # fmt: skip
def test_places_that_cannot_be_are_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        assigned_place(environment)


def test_a_place_is_read_from_the_environment():
    assert assigned_place({"RANK": "0"}) is None
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert assigned_place(environment) == Place(3, 4, 1, 2)


def torchrun(line, screen, *options):
    """Starts it; what it prints goes to a file, because a full pipe would stop it."""
    whole = [sys.executable, "-m", "torch.distributed.run", *options, *line]
    with screen.open("w") as file:
        return subprocess.Popen(whole, env=ENVIRONMENT, stdout=file, stderr=file)


@pytest.mark.slow
def test_torchrun_and_two_torchruns_of_two_nodes_train_what_our_launcher_trains(tmp_path):
    own = [sys.executable, *command(tmp_path / "own", "--num-gpus", "2", "--dist-url", "auto")]
    done = subprocess.run(own, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [tmp_path / f"{i}.txt" for i in range(2)]
    one = torchrun(command(tmp_path / "one"), said[0], "--standalone", "--nproc-per-node", "2")
    assert one.wait(300) == 0, said[0].read_text()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29571", "--rdzv-id", "test"]
    two = ["--nnodes", "2", "--nproc-per-node", "1", *meeting]
    nodes = [torchrun(command(tmp_path / "two"), screen, *two) for screen in said]
    for node, screen in zip(nodes, said, strict=True):
        assert node.wait(300) == 0, screen.read_text()
    assert differing(load(tmp_path / "own"), load(tmp_path / "one")) == []
    assert differing(load(tmp_path / "own"), load(tmp_path / "two")) == []


def test_torchrun_tells_the_first_cause(tmp_path):
    line = command(tmp_path / "out", overrides=["SOLVER.BASE_LR", -1.0])
    process = torchrun(line, tmp_path / "said.txt", "--standalone", "--nproc-per-node", "2")
    assert process.wait(200) == 1
    assert "error: SOLVER.BASE_LR must be positive, got -1.0" in (tmp_path / "said.txt").read_text()
