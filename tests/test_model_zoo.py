"""The configs that come with the package are found by name, in a checkout and in a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

import dn_detr_d2.model_zoo
from dn_detr_d2 import ConfigError, setup_cfg
from dn_detr_d2.config import device_is_named
from dn_detr_d2.model_zoo import config_names, get_config, get_config_file


def test_every_file_of_configs_has_a_name():
    assert config_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(os.path.samefile(get_config_file(name), ROOT / "configs" / f"{name}.yaml") for name in config_names())


@pytest.mark.parametrize("name", ["dn_detr_R50_50ep", "dn_detr_R50_50ep.yaml"])
def test_a_name_stands_for_the_file(name):
    expected = setup_cfg(str(ROOT / "configs" / "dn_detr_R50_50ep.yaml"))
    assert get_config(name) == expected
    assert setup_cfg(name) == expected
    assert get_config(name, ["SOLVER.MAX_ITER", 7]).SOLVER.MAX_ITER == 7


@pytest.mark.parametrize("name", ["dn_dert_R50_50ep", "configs/dn_detr_R50_50ep.yaml", "", "dn_detr_R50_50ep.yml"])
def test_an_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ConfigError) as caught:
        get_config(name)
    assert repr(name) in str(caught.value)
    assert "dn_detr_R50_50ep" in str(caught.value) or str(len(config_names())) in str(caught.value)


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not device_is_named("dn_detr_R50_50ep.yaml", [])
    (tmp_path / "dn_detr_R50_50ep.yaml").write_text(
        "MODEL: {DEVICE: cpu, DN_DETR: {NUM_CLASSES: 3}}\nSOLVER: {MAX_ITER: 3}\n"
    )
    assert setup_cfg("dn_detr_R50_50ep.yaml").SOLVER.MAX_ITER == 3
    assert device_is_named("dn_detr_R50_50ep.yaml", [])
    assert get_config("dn_detr_R50_50ep.yaml").SOLVER.MAX_ITER == 369600


def test_a_name_that_is_neither_file_nor_config_is_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'dn_detr_R50.yaml' does not exist.*dn_detr_R50_"):
        setup_cfg("dn_detr_R50.yaml")


READ = """
import sys, dn_detr_d2
from dn_detr_d2.model_zoo import get_config, get_config_file
assert get_config_file("dn_detr_R50_50ep").startswith(sys.argv[1]), get_config_file("dn_detr_R50_50ep")
print(dn_detr_d2.__version__, get_config("dn_detr_R50_50ep").SOLVER.MAX_ITER)
"""


@pytest.mark.long
def test_a_wheel_holds_the_configs_and_reads_them(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("dn_detr_d2", "configs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.txt", "__pycache__")
        )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "DN_DETR_NO_EXT": "1"}
    done = subprocess.run([*build, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    read = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path / "unpacked")]
    done = subprocess.run(read, cwd=tmp_path / "out", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [dn_detr_d2.__version__, "369600"]
