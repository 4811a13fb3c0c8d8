import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from naming import naming

from tools import install_detectron2 as installer

# As in detectron2: the first form is that of the carrier, the second black's.
MODEL_ZOO = """import os
import pkg_resources


def get_config_file(config_path):
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
    if not os.path.exists(cfg_file):
        raise RuntimeError("{} not available in Model Zoo!".format(config_path))
    return cfg_file
"""
ON_ONE_LINE = MODEL_ZOO.replace('(\n        "det', '("det').replace(")\n    )", "))")


@pytest.fixture
def carrier(tmp_path):
    """A small wheel laid out like the real carrier."""
    path = tmp_path / "labgym-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "secret = 1")
        archive.writestr("LabGym/detectron2/__init__.py", "import LabGym.detectron2.layers\n__version__ = '0.6'\n")
        archive.writestr("LabGym/detectron2/layers/__init__.py", "NAME = 'LabGym.detectron2'\n")
        archive.writestr("LabGym/detectron2/model_zoo/__init__.py", "from .model_zoo import get_config_file\n")
        archive.writestr("LabGym/detectron2/model_zoo/model_zoo.py", MODEL_ZOO)
        archive.writestr("LabGym/detectron2/model_zoo/configs/COCO/a.yaml", "MODEL: {}\n")
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
    with pytest.raises(installer.InstallError, match=naming("LabGym", "detectron2/other.py")):
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
    assert said.startswith("error: ")
    assert "--upstream" in said


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
    monkeypatch.setattr(installer, "repair_installed", lambda package: None)  # a test changes no installation
    assert installer.main([]) == 0
    said = capsys.readouterr().out
    assert metadata.version("detectron2") in said


def model_zoo(site, config):
    """What the model zoo of the packages in ``site`` says to a config, in a Python without setuptools."""
    code = f"from detectron2 import model_zoo; print(model_zoo.get_config_file({config!r}))"
    return subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )


def unpack(wheel, site, source=None):
    """The wheel's files in ``site``; with ``source`` as its model zoo, as an installation before the repair has it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    if source is not None:
        (site / installer.MODEL_ZOO).write_text(source)


def test_the_repacked_model_zoo_finds_its_configs_without_pkg_resources(carrier, tmp_path):
    unpack(installer.repack(carrier, tmp_path), tmp_path / "site")
    wanted = tmp_path / "site/detectron2/model_zoo/configs/COCO/a.yaml"
    assert model_zoo(tmp_path / "site", "COCO/a.yaml").stdout == f"{wanted}\n"
    assert "COCO/b.yaml not available in Model Zoo" in model_zoo(tmp_path / "site", "COCO/b.yaml").stderr


@pytest.mark.parametrize("source", [MODEL_ZOO, ON_ONE_LINE])
def test_an_installed_copy_that_needs_pkg_resources_is_repaired_in_its_place(
    carrier, tmp_path, monkeypatch, capsys, source
):
    site = tmp_path / "site"
    unpack(installer.repack(carrier, tmp_path), site, source)
    assert "pkg_resources" in model_zoo(site, "COCO/a.yaml").stderr
    monkeypatch.setattr(installer, "find_installed", lambda: ("0.6", str(site / "detectron2")))
    monkeypatch.setattr(installer, "pip", lambda *args: pytest.fail("pip must not run"))
    assert installer.main([]) == 0
    assert "Repaired" in capsys.readouterr().out
    assert model_zoo(site, "COCO/a.yaml").stdout.endswith("configs/COCO/a.yaml\n")
    content = (site / installer.MODEL_ZOO).read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (record,) = site.glob("*.dist-info/RECORD")
    assert f"{installer.MODEL_ZOO},sha256={digest},{len(content)}\n" in record.read_text()
    assert installer.main([]) == 0  # a second time there is nothing to repair
    assert "Repaired" not in capsys.readouterr().out
    assert {path.name for path in (site / "detectron2/model_zoo").iterdir()} - {"__pycache__"} == {
        "__init__.py",
        "configs",
        "model_zoo.py",
    }


def test_a_copy_that_cannot_be_repaired_is_one_sentence(carrier, tmp_path, monkeypatch, capsys):
    site = tmp_path / "site"
    unpack(installer.repack(carrier, tmp_path), site, MODEL_ZOO)
    monkeypatch.setattr(installer, "find_installed", lambda: ("0.6", str(site / "detectron2")))

    def refuse(*_):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(installer.os, "replace", refuse)
    assert installer.main([]) == 1
    assert naming("Permission denied").search(capsys.readouterr().err)
    assert (site / installer.MODEL_ZOO).read_text() == MODEL_ZOO

    (site / installer.MODEL_ZOO).write_text("from pkg_resources import resource_stream\n")
    assert installer.main([]) == 1
    assert "setuptools<82" in capsys.readouterr().err
