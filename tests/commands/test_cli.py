"""The program dn-detr: its verbs, help, mistakes and signals."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from naming import naming

import dn_detr_d2
import dn_detr_d2_cli as cli

PROGRAM = [sys.executable, "-m", "dn_detr_d2_cli"]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of dn-detr in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as end:  # argparse's
        code = end.code
    return (code, *capsys.readouterr())


def test_help_lists_every_verb_and_needs_no_import(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert re.findall(r"^  (\w+)  ", out, re.MULTILINE) == list(cli.VERBS)
    line = [sys.executable, "-X", "importtime", *PROGRAM[1:], "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "dn_detr_d2_cli" in done.stderr or done.stdout == out
    assert not re.search(r"\| +(torch|detectron2|dn_detr_d2)$", done.stderr, re.MULTILINE)


def test_without_a_verb_the_help_is_an_error_message(capsys):
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: dn-detr")


def test_the_version_is_that_of_the_package(capsys):
    assert call(capsys, "--version") == (0, f"dn-detr {dn_detr_d2.__version__}\n", "")


@pytest.mark.parametrize(("word", "near"), [("trein", "train"), ("evaluate", "eval"), ("xyz", "doctor")])
def test_an_unknown_verb_is_refused_with_the_nearest(capsys, word, near):
    code, out, err = call(capsys, word, "--config-file", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert naming(f"'{word}'", near).search(err)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(capsys, monkeypatch, verb):
    if importlib.util.find_spec(f"dn_detr_d2.commands.{cli.VERBS[verb][0]}") is None:
        pytest.skip("not in this checkout")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dn-detr", verb, "--help"])
    monkeypatch.setattr("dn_detr_d2.commands.train.leave", lambda code: pytest.fail(f"left with {code}"))
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert f"usage: dn-detr {verb} " in out
    assert re.search(rf"^ +dn-detr {verb}\b.*\S", out, re.MULTILINE)
    assert set(re.findall(r"dn-detr (\S+)", out)) <= cli.VERBS.keys()  # Detectron2's own examples have no verb
    assert "LazyConfig" not in out  # configs in Python are refused


@pytest.mark.parametrize("arguments", [
    ["train", "--config-file", "nowhere.yaml"], ["eval", "--config-file", "nowhere.yaml"], ["check", "nowhere.json", "."],
    ["convert", "voc", "nowhere", "nowhere", "out.json"], ["convert", "checkpoint", "nowhere.pth", "out.pth",
    "--config-file", "nowhere.yaml"], ["convert", "yolos", "x"], ["check"],
])  # fmt: skip
def test_bad_input_is_code_2_and_one_error(capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    left = []
    monkeypatch.setattr("dn_detr_d2.commands.train.leave", left.append)
    code, _, err = call(capsys, *arguments)
    assert [*left, code][0] == 2
    assert err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_detectron2_is_one_sentence(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("install it with tools/install_detectron2.py", name="detectron2")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert call(capsys, "doctor") == (2, "", "error: install it with tools/install_detectron2.py\n")


def test_the_installed_program_handles_signals_before_its_imports(tmp_path):
    """As pip writes it; the signal comes while the packages are imported."""
    script = tmp_path / "dn-detr"
    script.write_text("import sys\nfrom dn_detr_d2_cli import main\nprint(1, flush=True)\nsys.exit(main())\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(script), "train", "--config-file", "nowhere.yaml"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        run.stdout.readline()
        time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 75
    assert naming("SIGTERM").search(err)
