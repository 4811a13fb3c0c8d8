"""Checkpoints on disk: damage is found, the newest whole one is taken up, old ones go, a full disk costs nothing."""

import hashlib
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from naming import naming

from dn_detr_d2 import CheckpointError, setup_cfg
from dn_detr_d2.checkpoint import CheckpointFile, checksums, read_checkpoint, write_checkpoint
from dn_detr_d2.checkpoint.checkpointer import Checkpointer
from dn_detr_d2.checkpoint.checksums import require_space, sum_file, tensor_bytes, write_summed
from dn_detr_d2.checkpoint.resume import find_resumable, point_to, remove_old


def state_of(iteration):
    step = {"iteration": iteration, "optimizer": {"state": {}, "param_groups": []}}
    return {"model": {"x": torch.full((50,), iteration)}, "trainer": {"iteration": iteration, "_trainer": step}}


class Small(torch.nn.Module):
    """The model of these checkpoints."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(50))


def write(folder, name, iteration, change=lambda content: None):
    content = state_of(iteration)
    change(content)
    write_summed(folder / f"{name}.pth", lambda file: torch.save(content, file))
    return folder / f"{name}.pth"


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints; the last is the one to resume from."""
    for iteration in (9, 19, 29):
        write(tmp_path, f"model_{iteration:07d}", iteration)
    point_to(tmp_path, "model_0000029.pth")
    return tmp_path


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_300_of_300_flipped_bits_are_found(tmp_path):
    path, draw = tmp_path / "small.pth", random.Random(0)
    write_checkpoint(path, CheckpointFile({"weight": torch.randn(20, 10), "bias": torch.randn(20)}, ["a"], "x: 1"))
    assert read_checkpoint(path).class_names == ["a"]
    bits, found = path.stat().st_size * 8, 0
    for _ in range(300):
        bit = draw.randrange(bits)
        flip(path, bit)
        with pytest.raises(CheckpointError, match=naming("small.pth", "SHA-256")):
            read_checkpoint(path)
        found += 1
        flip(path, bit)
    assert found == 300
    read_checkpoint(path)


def test_the_sum_is_what_sha256sum_checks(folder):
    command = ["sha256sum", "-c", "model_0000029.pth.sha256"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.stdout == "model_0000029.pth: OK\n"


def test_a_stop_between_the_sum_and_the_file_leaves_the_old_file_valid(folder, monkeypatch):
    path = folder / "model_0000029.pth"
    old = path.read_bytes()
    real = type(path).replace

    def stop(self, target):
        if str(target).endswith(".pth"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(type(path), "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "model_0000029", 77)
    assert path.read_bytes() == old
    assert find_resumable(folder) == path


def damage(path):
    flip(path, 8 * (path.stat().st_size // 2))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [damage, cut, lambda path: path.unlink()], ids=["flipped", "cut", "gone"])
def test_the_newest_whole_checkpoint_replaces_a_damaged_one_and_both_are_named(folder, caplog, harm):
    write(folder, "model_best", 14)
    harm(folder / "model_0000029.pth")
    with caplog.at_level(logging.WARNING):
        assert find_resumable(folder) == folder / "model_0000019.pth"
    assert naming("model_0000029.pth", "model_0000019.pth").search(caplog.text)


def deflate(path):
    """As small as it was, with 200 MB of zeros added."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model_0000029/data/99", bytes(200_000_000))


@pytest.mark.parametrize("summed", [True, False], ids=["with a sum", "without"])
def test_an_archive_that_unpacks_to_much_is_passed_over(folder, caplog, summed):
    path = folder / "model_0000029.pth"
    deflate(path)
    sum_file(path).unlink()
    if summed:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sum_file(path).write_text(f"{digest}  {path.name}\n")
    assert path.stat().st_size < 10**6
    assert find_resumable(folder) == folder / "model_0000019.pth"
    assert re.search(r"model_0000029\.pth\D.*\D200\d{6}\D", caplog.text)


def drop(*place):
    """Takes something out of a checkpoint, or puts something in its place."""
    *outer, last, value = place

    def change(content):
        for key in outer:
            content = content[key]
        content.pop(last)
        if value is not None:
            content[last] = value

    return change


LACKING = {
    ("trainer.iteration", "missing"): drop("trainer", "iteration", None),
    ("trainer.iteration", "int"): drop("trainer", "iteration", "29"),
    ("trainer.iteration", "negative"): drop("trainer", "iteration", -1),
    ("trainer._trainer.iteration", "missing"): drop("trainer", "_trainer", [1]),
    ("trainer._trainer.optimizer", "missing"): drop("trainer", "_trainer", "optimizer", None),
    ("model", "missing"): drop("model", None),
    ("model", "tensors"): drop("model", {"x": 1}),
    ("'x'", 4000000000000): drop("model", "x", torch.ones(1).expand(10**6, 10**6)),
    ("'y'", 4000000000000): drop(
        "trainer", "_trainer", "optimizer", "state", {0: {"y": torch.ones(1).expand(10**6, 10**6)}}
    ),
}


@pytest.mark.parametrize("named", LACKING)
def test_a_checkpoint_without_what_a_resume_needs_is_passed_over_or_refused(folder, caplog, named):
    write(folder, "model_0000029", 29, LACKING[named])
    assert find_resumable(folder) == folder / "model_0000019.pth"
    assert naming("model_0000029.pth", *named).search(caplog.text)
    for path in folder.glob("*.pth"):
        if "29" not in path.name:
            path.unlink()
    with pytest.raises(CheckpointError, match=naming("model_0000029.pth", *named, "--resume")):
        find_resumable(folder)


def test_what_rank_0_has_chosen_is_looked_at_again_by_every_rank_that_reads_it(folder, monkeypatch):
    write(folder, "model_0000029", 29, drop("model", "x", torch.ones(1).expand(10**6, 10**6)))
    checkpointer = Checkpointer(Small(), str(folder), cfg=setup_cfg(splits=()))
    monkeypatch.setattr("dn_detr_d2.checkpoint.checkpointer.find_resumable", lambda _: folder / "model_0000029.pth")
    with pytest.raises(CheckpointError, match=naming("model_0000029.pth", "'x'")):
        checkpointer.resume_or_load("", resume=True)


def test_a_checkpoint_without_a_sum_is_taken_up_with_one_warning(folder, caplog):
    for summed in (True, False):
        if not summed:
            sum_file(folder / "model_0000029.pth").unlink()
        checkpointer = Checkpointer(Small(), str(folder), cfg=setup_cfg(splits=()))
        assert checkpointer.resume_or_load("", resume=True)["trainer"]["iteration"] == 29
        assert caplog.text.count("model_0000029.pth.sha256") == int(not summed)


def test_a_checkpoint_of_another_training_is_refused_in_one_sentence(folder):
    class Picky(torch.nn.Module):
        """As an optimizer with other parameter groups."""

        def load_state_dict(self, state):
            raise KeyError("hooks")

    checkpointer = Checkpointer(Small(), str(folder), cfg=setup_cfg(splits=()), trainer=Picky())
    with pytest.raises(CheckpointError, match=naming("model_0000029.pth", "KeyError", "'hooks'")):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize(("change", "name"), [
    (lambda model: model.pop("bias"), "bias"),
    (lambda model: model.update(bias=torch.zeros(3)), "bias"),
    (lambda model: model.update(other=torch.zeros(1)), "other"),
])  # fmt: skip
def test_a_model_that_fits_in_part_is_not_resumed(tmp_path, change, name):
    """It used to go on with what was missing at random, after a warning."""
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path), cfg=setup_cfg(splits=()))
    checkpointer.save("model_0000009")
    content = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    content["trainer"] = {"iteration": 9, "_trainer": {"iteration": 9, "optimizer": {}}}
    change(content["model"])
    torch.save(content, tmp_path / "model_0000009.pth")
    (tmp_path / "model_0000009.pth.sha256").unlink()
    with pytest.raises(CheckpointError, match=naming("model_0000009.pth", name)):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("harm", [lambda pointer: pointer.unlink(), lambda pointer: pointer.write_text("")])
def test_a_lost_pointer_is_replaced_by_a_look_at_the_folder(folder, caplog, harm):
    harm(folder / "last_checkpoint")
    assert find_resumable(folder) == folder / "model_0000029.pth"
    assert naming("last_checkpoint", "model_0000029.pth").search(caplog.text)


def test_a_folder_of_damaged_checkpoints_is_refused_and_an_empty_one_is_new(folder, tmp_path_factory):
    for path in folder.glob("*.pth"):
        damage(path)
    with pytest.raises(CheckpointError, match=naming("model_0000029.pth")):
        find_resumable(folder)
    assert find_resumable(tmp_path_factory.mktemp("new")) is None


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_old_checkpoints_go_with_their_sums_and_the_best_and_final_stay(folder):
    for name in ("model_best", "model_final"):
        write(folder, name, 1)
    draft, other = folder / ".model_0000039.pth.part", folder / ".model_0000049.pth.part"
    draft.write_bytes(b"half")
    os.utime(draft, (1, 1))  # of a process that was killed
    other.write_bytes(b"half")  # of one that writes now
    remove_old(folder, 0)
    assert len(names(folder)) == 5
    assert (draft.exists(), other.exists()) == (False, True)
    other.unlink()
    remove_old(folder, 1)
    assert names(folder) == ["model_0000029.pth", "model_best.pth", "model_final.pth"]
    assert not list(folder.glob("*0000019*"))
    assert not list(folder.glob(".*.part"))


def test_the_checkpoint_to_resume_from_stays_though_an_earlier_run_left_later_ones(folder):
    point_to(folder, "model_0000009.pth")
    remove_old(folder, 1)
    assert names(folder) == ["model_0000009.pth", "model_0000029.pth"]


def test_nothing_is_deleted_while_the_last_checkpoint_is_damaged(folder, caplog):
    damage(folder / "model_0000029.pth")
    remove_old(folder, 1)
    assert len(names(folder)) == 3
    assert naming("model_0000029.pth").search(caplog.text)


def test_a_checkpoint_that_will_not_fit_is_not_begun(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    content = {"model": {"x": torch.zeros(10**6)}, "states": [torch.zeros(5, dtype=torch.uint8)]}
    assert tensor_bytes(content) == 4 * 10**6 + 5
    with pytest.raises(CheckpointError, match=naming("model_0000039.pth", "5.0 MB", "1.0 MB")):
        require_space(folder / "model_0000039.pth", content)


def test_a_write_that_fails_in_the_midst_leaves_the_old_file_and_no_part(folder):
    path, limits = folder / "model_0000029.pth", resource.getrlimit(resource.RLIMIT_FSIZE)
    old = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=naming("model_0000029.pth")):
            write_summed(path, lambda file: torch.save({"x": torch.zeros(10**5)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert not list(folder.glob(".*.part"))
    assert find_resumable(folder) == path


@pytest.mark.parametrize("fault", ["write", "rename"])
def test_a_record_that_cannot_be_written_is_called_a_record(tmp_path, monkeypatch, fault):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums.os, "fsync", fail) if fault == "write" else monkeypatch.setattr(Path, "replace", fail)
    (tmp_path / "best_metric.json").write_text("before")
    with pytest.raises(CheckpointError, match=naming("record", "best_metric.json")):
        checksums.write_record(tmp_path / "best_metric.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["best_metric.json"]
    assert (tmp_path / "best_metric.json").read_text() == "before"
