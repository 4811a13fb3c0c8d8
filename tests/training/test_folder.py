"""Checkpoints on disk: damage is found, the newest whole one is taken up, old ones go, a full disk costs nothing."""

import logging
import random
import resource
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch

from dn_detr_d2 import CheckpointError
from dn_detr_d2.checkpoint import CheckpointFile, read_checkpoint, write_checkpoint
from dn_detr_d2.checkpoint.durable import require_space, tensor_bytes, write_summed
from dn_detr_d2.training.folder import find_resumable, point_to, remove_old


def write(folder, name, iteration):
    content = {"model": {"x": torch.full((50,), iteration)}, "trainer": {"iteration": iteration}}
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
        with pytest.raises(CheckpointError, match=r"small\.pth' is damaged: its SHA-256"):
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
    assert "model_0000029.pth cannot be resumed from" in caplog.text
    assert "model_0000019.pth, the newest checkpoint that is whole" in caplog.text


@pytest.mark.parametrize("harm", [lambda pointer: pointer.unlink(), lambda pointer: pointer.write_text("")])
def test_a_lost_pointer_is_replaced_by_a_look_at_the_folder(folder, caplog, harm):
    harm(folder / "last_checkpoint")
    assert find_resumable(folder) == folder / "model_0000029.pth"
    assert "last_checkpoint is missing" in caplog.text or "last_checkpoint names '', which is not a file" in caplog.text
    assert "model_0000029.pth, the newest checkpoint that is whole" in caplog.text


def test_a_folder_of_damaged_checkpoints_is_refused_and_an_empty_one_is_new(folder, tmp_path_factory):
    for path in folder.glob("*.pth"):
        damage(path)
    with pytest.raises(CheckpointError, match=r"model_0000029\.pth, is damaged .* has no other that is whole"):
        find_resumable(folder)
    assert find_resumable(tmp_path_factory.mktemp("new")) is None


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_old_checkpoints_go_with_their_sums_and_the_best_and_final_stay(folder):
    for name in ("model_best", "model_final"):
        write(folder, name, 1)
    (folder / ".model_0000039.pth.part").write_bytes(b"half")
    remove_old(folder, 0)
    assert len(names(folder)) == 5
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
    assert "no checkpoint is deleted" in caplog.text


def test_a_checkpoint_that_will_not_fit_is_not_begun(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    content = {"model": {"x": torch.zeros(10**6)}, "states": [torch.zeros(5, dtype=torch.uint8)]}
    assert tensor_bytes(content) == 4 * 10**6 + 5
    with pytest.raises(CheckpointError, match=r"model_0000039\.pth' needs 5\.0 MB, but only 1\.0 MB are free"):
        require_space(folder / "model_0000039.pth", content)


def test_a_write_that_fails_in_the_midst_leaves_the_old_file_and_no_part(folder):
    path, limits = folder / "model_0000029.pth", resource.getrlimit(resource.RLIMIT_FSIZE)
    old = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"model_0000029\.pth' cannot be written: .*earlier checkpoints are as"
        ):
            write_summed(path, lambda file: torch.save({"x": torch.zeros(10**5)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert not list(folder.glob(".*.part"))
    assert find_resumable(folder) == path
