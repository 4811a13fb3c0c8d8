"""Recordings by shape with a stand-in for CUDA graphs; tests/test_gpu.py has the real ones."""

import contextlib
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naming import naming

from dn_detr_d2.utils.cuda_graphs import CudaRecorder, Replayed


class Recording:
    """As a CUDA graph: computes at fixed addresses, and only what was computed when it was recorded."""

    log: list

    def __init__(self, function, inputs):
        self.log.append(("record", inputs[0].shape))
        self.function, self.released = function, False
        self.inputs = tuple(x.clone() for x in inputs)
        self.outputs = function(*self.inputs)

    def __call__(self, *inputs):
        assert not self.released
        self.log.append(("replay", inputs[0].shape))
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x)
        for kept, x in zip(self.outputs, self.function(*self.inputs), strict=True):
            kept.copy_(x)
        return tuple(x.clone() for x in self.outputs)

    def release(self):
        self.log.append(("release", self.inputs[0].shape))
        self.released = True


@pytest.fixture
def recorder():
    return type("Logged", (Recording,), {"log": []})


def double(x, sizes):
    return 2 * x, sizes + 1


def test_a_shape_is_recorded_once_and_outputs_stay(recorder):
    replayed = Replayed(double, 2, recorder)
    sizes = torch.ones(1, 2, dtype=torch.int64)
    first, _ = replayed(torch.ones(1, 3), sizes)
    second, counts = replayed(torch.full((1, 3), 5.0), sizes)
    assert first.tolist() == [[2, 2, 2]]  # the second pass has not changed it
    assert second.tolist() == [[10, 10, 10]]
    assert counts.tolist() == [[2, 2]]
    assert [kind for kind, _ in recorder.log] == ["record", "replay", "replay"]


@given(st.integers(1, 4), st.lists(st.integers(1, 6), max_size=30))
def test_the_one_not_used_for_longest_makes_place(limit, shapes):
    """Against a plain model of a cache."""
    recorder = type("Logged", (Recording,), {"log": []})
    replayed, kept, expected = Replayed(lambda x: (x + 1,), limit, recorder), OrderedDict(), []
    for n in shapes:
        if n not in kept and len(kept) == limit:
            expected.append(("release", (next(iter(kept)),)))
            kept.popitem(last=False)
        expected += [] if n in kept else [("record", (n,))]
        kept[n] = True
        kept.move_to_end(n)
        expected.append(("replay", (n,)))
        (out,) = replayed(torch.full((n,), float(n)))
        assert out.tolist() == [n + 1] * n
        assert len(replayed) == len(kept) <= limit
    assert [(kind, tuple(shape)) for kind, shape in recorder.log] == expected


def test_types_are_told_apart(recorder):
    replayed = Replayed(lambda x: (x.double(),), 2, recorder)
    replayed(torch.ones(2))
    replayed(torch.ones(2, dtype=torch.float16))
    assert len(replayed) == 2


def test_threads_get_their_own_results(recorder):
    replayed = Replayed(lambda x: (x * 3,), 2, recorder)
    inputs = [torch.full((1 + i % 3,), float(i)) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = [x for (x,) in pool.map(replayed, inputs)]
    assert all(torch.equal(ours, 3 * x) for ours, x in zip(found, inputs, strict=True))


def test_a_failed_recording_is_tried_again(recorder):
    fails = [True]

    def record(function, inputs):
        if fails.pop():
            raise RuntimeError("out of memory")
        return recorder(function, inputs)

    replayed = Replayed(double, 1, record)
    sizes = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        replayed(torch.ones(1), sizes)
    fails.append(False)
    assert replayed(torch.ones(1), sizes)[0].tolist() == [2]


def test_two_functions_are_not_recorded_at_the_same_time(recorder):
    """PyTorch allows one recording in a process; a replay of one may run meanwhile."""
    recording, overlaps, entered = threading.Semaphore(1), [], threading.Barrier(2, timeout=30)

    def record(function, inputs):
        overlaps.append(not recording.acquire(blocking=False))
        time.sleep(0.05)
        recording.release()
        return recorder(function, inputs)

    def use(shape):
        replayed = Replayed(double, 1, record)
        entered.wait()
        for size in (shape, shape + 10, shape):
            replayed(torch.ones(size), torch.ones(1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(use, (1, 2)))
    assert overlaps == [False] * 6


def test_recordings_share_what_is_of_their_device(monkeypatch):
    """The stream, the memory and the event of one GPU are of no use to another."""
    current, made = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(current.append(device)))
    recorder = CudaRecorder(lambda: made.append(current[-1]) or f"of {current[-1]}", lambda *arguments: arguments[-1])
    gpus = [SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1, 0, 1)]
    assert [recorder(double, (x,)) for x in gpus] == ["of cuda:0", "of cuda:1"] * 2
    assert len(made) == 2


def test_a_limit_without_a_recording_is_refused():
    with pytest.raises(ValueError, match=naming("limit", 0)):
        Replayed(double, 0)
