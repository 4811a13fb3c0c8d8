"""The ranks that other tests run on: new processes each time, whose failures are not lost."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from ranks import on_ranks
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


def write_what_is_seen(folder):
    """What this rank is, what the group's sum is, and whether an earlier call has been here."""
    total = torch.tensor([1.0 + comm.get_rank()])
    torch.distributed.all_reduce(total)
    seen = [comm.get_local_size(), comm.get_world_size(), int(total), "left_behind" in vars(sys)]
    sys.left_behind = True
    (folder / f"{comm.get_rank()}_{os.getpid()}").write_text(str(seen))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_is_a_new_process_of_the_group(tmp_path, ranks):
    for _ in range(2):
        on_ranks(write_what_is_seen, tmp_path, ranks=ranks)
    expected = str([ranks, ranks, ranks * (ranks + 1) // 2, False])
    assert [path.read_text() for path in tmp_path.iterdir()] == [expected] * 2 * ranks
    assert sorted(path.name.split("_")[0] for path in tmp_path.iterdir()) == sorted([*map(str, range(ranks))] * 2)


def fail(how, folder):
    """Rank 1 fails while rank 0 has a long time to go."""
    (folder / str(comm.get_rank())).write_text(str(os.getpid()))
    comm.synchronize()
    if comm.get_rank() == 0:
        time.sleep(300)
    if how == "raises":
        raise KeyError("forgotten")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("how", "kind", "text"), [
    ("raises", ProcessRaisedException, r"(?s)in fail\n.*KeyError: 'forgotten'"),
    ("dies", ProcessExitedException, "process 1 terminated with signal SIGKILL"),
])  # fmt: skip
def test_a_rank_that_fails_is_told_the_other_is_ended_and_the_next_ones_start(tmp_path, how, kind, text):
    with pytest.raises(kind, match=text):
        on_ranks(fail, how, tmp_path)
    assert not any(Path(f"/proc/{(tmp_path / str(rank)).read_text()}").exists() for rank in range(2))
    on_ranks(comm.synchronize)


def count_seconds(folder):
    """Processor time of this rank since it began."""
    (folder / str(comm.get_rank())).write_text(str(os.times().user + os.times().system))


def test_a_rank_does_not_import_the_packages_again(tmp_path):
    """PyTorch alone takes more than half a second on the fastest processors, a rank a few hundredths."""
    on_ranks(count_seconds, tmp_path)
    assert all(float(path.read_text()) < 0.3 for path in tmp_path.iterdir())
