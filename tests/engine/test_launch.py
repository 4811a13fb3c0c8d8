"""Several processes: whatever ends one ends all, and the last line on the screen is the first cause."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from naming import naming
from ranks import fork_directly, fork_server, fork_what_is_spawned
from toy_training import command, differing, load

from dn_detr_d2 import ConfigError, DatasetError
from dn_detr_d2.engine import REQUEUE, ProcessError, TrainStep, rank_info_from_env
from dn_detr_d2.engine.launch import OWN_STORE, RankInfo, _free_port, launch

SOON = (
    30  # seconds: half of what ranks wait for each other; tests/engine/test_exit.py measures the ten that are promised
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Scalar(torch.nn.Module):
    """A model with one weight, which is its loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * 1.0}


def train_on(batches):
    """Trains until the loader has no more batches."""
    model = Scalar()
    step = TrainStep(model, [[{}]] * batches, torch.optim.SGD(model.parameters(), 0.1), None, "")
    with EventStorage():
        while True:
            step.run_step()


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
    if how == "data":
        train_on(1 if comm.get_rank() == 1 else 100)
    if how == "stop":
        raise SystemExit(REQUEUE)
    if how in ("hang", "stuck") and comm.get_rank() == 0:
        time.sleep(300)
    if how == "hang":
        raise DatasetError("image y.png cannot be read")
    comm.synchronize()


def alive(folder):
    pids = [int((folder / str(rank)).read_text()) for rank in range(2)]
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(("how", "cause"), [
    ("refusal", ["x.png"]),
    ("mistake", ["rank 1", "KeyError", "'forgotten'"]),
    ("kill", ["process", "SIGKILL"]),
    ("hang", ["y.png"]),
    ("data", ["rank 1", "StopIteration", "run_step"]),
])  # fmt: skip
def test_one_that_fails_ends_all_and_is_the_one_that_is_told(tmp_path, monkeypatch, how, cause):
    fork_what_is_spawned(monkeypatch)
    with pytest.raises(ProcessError) as caught:
        launch(leave_as, 2, 1, 0, "auto", 60, (how, tmp_path))
    cause = [*cause, f"process {(tmp_path / '1').read_text()}"] if how == "kill" else cause
    assert naming(*cause).search(str(caught.value))
    assert time.time() - (tmp_path / "met").stat().st_mtime < SOON
    assert alive(tmp_path) == []


def test_a_process_that_hangs_is_waited_for_until_the_timeout_and_shows_its_stack(tmp_path, capfd):
    """With processes that are started as the program starts them."""
    with pytest.raises(ProcessError, match=r"rank 1.*[Tt]imed out"):
        launch(leave_as, 2, 1, 0, "auto", 8, ("stuck", tmp_path))
    assert time.time() - (tmp_path / "met").stat().st_mtime < 8 + SOON
    assert alive(tmp_path) == []
    said = capfd.readouterr().err
    stack = said[said.index("most recent call first") :]
    assert "in leave_as" in stack
    assert "in _run" in stack


def machine(rank, port, how, folder):
    """What the launcher of one of two machines does; its exit code and its last words are the program's."""
    os.dup2(os.open(folder / f"machine_{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    fork_directly()
    try:
        sys.exit(launch(leave_as, 1, 2, rank, f"tcp://127.0.0.1:{port}", 60, (how, folder)))
    except ProcessError as error:
        sys.exit(f"error: {error}")


@pytest.mark.parametrize(("how", "codes"), [("nothing", (0, 0)), ("stop", (REQUEUE, REQUEUE)), ("kill", (1, 1))])
def test_launchers_of_two_machines_start_and_end_together(tmp_path, how, codes):
    """Both on this machine, one process each."""
    port = _free_port()
    machines = [fork_server().Process(target=machine, args=(rank, port, how, tmp_path)) for rank in range(2)]
    for each in machines:
        each.start()
    said = [tmp_path / f"machine_{rank}.txt" for rank in range(2)]
    while not (tmp_path / "met").exists():
        assert any(each.is_alive() for each in machines), [path.read_text() for path in said]
        time.sleep(0.1)
    while alive(tmp_path) and time.time() - (tmp_path / "met").stat().st_mtime < 60:
        time.sleep(0.1)
    gone = time.time() - (tmp_path / "met").stat().st_mtime
    for each in machines:
        each.join(200)
    last = [path.read_text().splitlines()[-1:] for path in said]
    assert tuple(each.exitcode for each in machines) == codes, last
    if how == "kill":
        assert gone < SOON
        assert "SIGKILL" in last[1][0]
        assert last[0][0].startswith("error: rank 0")


DIES_ONCE = """
import os, signal
from pathlib import Path
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from dn_detr_d2.engine import init_distributed, rank_info_from_env
place = rank_info_from_env(os.environ)
init_distributed(place, 60)
if place.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
comm.synchronize()
Path(f"life_{os.environ['TORCHELASTIC_RESTART_COUNT']}_{place.rank}").touch()
"""


def test_torchrun_starts_again_over_gloo_with_the_variable(tmp_path):
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    environment = ENVIRONMENT | {OWN_STORE: "1"}
    done = subprocess.run([*line, "dies_once.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("life*")) == ["life_1_0", "life_1_1"]


def test_restarts_over_gloo_without_the_variable_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ConfigError, match=naming("--max-restarts", f"{OWN_STORE}=1")):
        rank_info_from_env(environment)
    assert rank_info_from_env(environment | {OWN_STORE: "1"}) == RankInfo(0, 2, 0, 2)
    assert rank_info_from_env(environment | {"TORCHELASTIC_MAX_RESTARTS": "0"}) == RankInfo(0, 2, 0, 2)


def test_processes_that_stop_on_request_are_no_failure(tmp_path, monkeypatch):
    fork_what_is_spawned(monkeypatch)
    assert launch(leave_as, 2, 1, 0, "auto", 60, ("stop", tmp_path)) == REQUEUE


@pytest.mark.parametrize(("environment", "named"), [
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, ["LOCAL_RANK", "x"]),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK", 2]),
    ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE", 3, 2]),
])  # fmt: skip
def test_places_that_cannot_be_are_refused(environment, named):
    with pytest.raises(ConfigError, match=naming(*named)):
        rank_info_from_env(environment)


def test_a_place_is_read_from_the_environment():
    assert rank_info_from_env({"RANK": "0"}) is None
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert rank_info_from_env(environment) == RankInfo(3, 4, 1, 2)


def torchrun(line, screen, *options):
    """Starts it; what it prints goes to a file, because a full pipe would stop it."""
    whole = [sys.executable, "-m", "torch.distributed.run", *options, *line]
    with screen.open("w") as file:
        return subprocess.Popen(whole, env=ENVIRONMENT, stdout=file, stderr=file)


@pytest.mark.long
def test_torchrun_and_two_torchruns_of_two_nodes_train_what_our_launcher_trains(tmp_path):
    own = [sys.executable, *command(tmp_path / "own", "--num-gpus", "2", "--dist-url", "auto")]
    done = subprocess.run(own, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [tmp_path / f"{i}.txt" for i in range(2)]
    one = torchrun(command(tmp_path / "one"), said[0], "--standalone", "--nproc-per-node", "2")
    assert one.wait(300) == 0, said[0].read_text()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}", "--rdzv-id", "test"]
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
    assert re.search(r"error: .*SOLVER\.BASE_LR.*-1\.0", (tmp_path / "said.txt").read_text())
