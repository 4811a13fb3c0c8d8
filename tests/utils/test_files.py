"""A file is replaced whole or not at all, and its SHA-256 is that of ``sha256sum``."""

import hashlib
import os

import pytest

from dn_detr_d2.utils.files import atomic_write, draft_of, sha256_of


def test_the_file_appears_with_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert draft_of(path).read_text() == "new"
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("not this"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_draft(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write():
        with atomic_write(path, "w") as file:
            file.write("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, fault):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(*((os, "fsync", fail) if fault == "fsync" else (type(path), "replace", fail)))
    with pytest.raises(OSError, match="Input/output error"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_write(tmp_path / "nowhere" / "a.json"):
        pass


def test_writers_with_drafts_of_their_own_do_not_mix(tmp_path):
    path, drafts = tmp_path / "a.txt", [tmp_path / f"a.{i}.part" for i in range(2)]
    with atomic_write(path, "w", draft=drafts[0]) as first, atomic_write(path, "w", draft=drafts[1]) as second:
        first.write("1" * 10)
        second.write("2")
    assert path.read_text() == "1" * 10  # the block that ends last
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_files_around_the_size_of_a_chunk(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    assert sha256_of(path) == sha256_of(str(path)) == hashlib.sha256(bytes(size)).hexdigest()
