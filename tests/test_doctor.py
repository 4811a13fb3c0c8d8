import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from dn_detr_d2 import doctor
from dn_detr_d2.layers import kernels

BROKEN_KERNEL = "the compiled library does not load (undefined symbol: _ZN3c10)"


@pytest.fixture
def report(capsys):
    """report(*arguments) -> (exit code, {subject: (state, text)})."""

    def call(*arguments):
        code = doctor.main([str(x) for x in arguments])
        *lines, last = capsys.readouterr().out.splitlines()
        found = {line[8:32].strip(): (line[:6].strip(), line[32:].strip()) for line in lines}
        assert (last == "all well") == (code == 0)
        return code, found

    return call


@pytest.fixture
def quick(monkeypatch):
    """Without the tests that compute, which have their own."""
    monkeypatch.setattr(doctor, "self_tests", lambda: [])


def test_a_working_installation_is_well_in_plain_text():
    command = [sys.executable, "-W", "ignore", "-m", "dn_detr_d2.doctor"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if kernels.missing_kernel("cpu"):
        pytest.skip("no compiled operators here")
    assert ran.returncode == 0, ran.stdout
    assert f"ok      {'torch':<24}  {torch.__version__.split('+')[0]}" in ran.stdout
    assert "ok      training on cpu" in ran.stdout
    assert ran.stdout.isprintable() or set(ran.stdout) - {"\n"} <= set(map(chr, range(32, 127)))


def test_a_backend_that_does_not_load_is_broken_and_says_why(report, quick, monkeypatch):
    monkeypatch.setattr(kernels, "_MISSING", {"cpu": BROKEN_KERNEL, "cuda": BROKEN_KERNEL})
    code, found = report()
    assert code == 1
    assert found["backend cpu"][0] == "BROKEN"
    assert BROKEN_KERNEL in found["backend cpu"][1]
    assert found["backend torch"][0] == "ok"


def test_without_kernels_the_training_step_runs_on_pytorchs_operators(monkeypatch):
    monkeypatch.setattr(kernels, "_MISSING", {"cpu": BROKEN_KERNEL, "cuda": BROKEN_KERNEL})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor.self_tests()
    assert (finding.subject, finding.state) == ("training on cpu", "ok")


def test_a_kernel_that_computes_something_else_is_broken(monkeypatch):
    true = doctor.ms_deform_attn
    wrong = lambda value, *rest: true(value, *rest) * (1.001 if rest[-1] == "cpu" else 1)  # noqa: E731
    monkeypatch.setattr(doctor, "ms_deform_attn", wrong)
    monkeypatch.setattr(doctor, "missing_kernel", lambda device: "")
    monkeypatch.setattr(doctor, "_train_one_step", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_MISSING", {"cpu": kernels.missing_kernel("cpu"), "cuda": "none"})
    if kernels.missing_kernel("cpu"):
        pytest.skip("no compiled operators here")
    operator, _ = doctor.self_tests()
    assert operator.state == "BROKEN"
    assert "off PyTorch's operators" in operator.text


def test_a_model_that_is_not_finite_is_broken(monkeypatch):
    build = doctor.build_model

    def poisoned(cfg):
        model = build(cfg)
        torch.nn.init.constant_(model.decoder.heads.class_heads[0].bias, float("nan"))
        return model

    monkeypatch.setattr(doctor, "build_model", poisoned)
    finding = doctor._attempt("training", lambda: doctor._train_one_step("cpu"))
    assert finding.state == "BROKEN"
    assert "not finite" in finding.text


def test_looking_does_not_move_the_random_stream():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    doctor._train_one_step("cpu")
    assert torch.equal(torch.rand(2), wanted)


def test_folders_that_do_not_exist_or_cannot_be_written(report, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "gone"))
    (tmp_path / "file").write_text("")
    code, found = report("OUTPUT_DIR", tmp_path / "file" / "run")
    assert code == 1
    assert found["data sets"] == ("BROKEN", found["data sets"][1])
    assert str(tmp_path / "gone") in found["data sets"][1]
    assert "cannot be written" in found["output folder"][1]


def test_little_space_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: doctor.shutil._ntuple_diskusage(10, 9, 1))
    findings = [x for x in doctor.places(str(tmp_path)) if x.subject.endswith("folder")]
    assert [x.state for x in findings] == ["BROKEN", "BROKEN"]
    assert "make room" in findings[0].text


def test_a_config_with_its_data_and_weights(report, quick, tmp_path, toy_model):
    torch.save({"model": toy_model("dn_detr").state_dict()}, tmp_path / "model.pth")
    code, found = report("--config-file", ROOT / "configs/quickstart.yaml", "MODEL.WEIGHTS", tmp_path / "model.pth")
    assert found["classes"][1] == "3 (circle, rectangle, triangle)"
    assert "annotations.json" in found["data set shapes_train"][1]
    assert "M numbers" in found["weights"][1]
    assert "this project" in found["weights"][1]
    assert code == (1 if any(state == "BROKEN" for state, _ in found.values()) else 0)


def test_missing_data_and_weights_are_named_together(report, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    listed = json.dumps([["doctor_gone", "gone.json", "."]])
    opts = ["DATASETS.COCO_JSON", listed, "DATASETS.TEST", "('doctor_gone',)", "MODEL.WEIGHTS", "gone.pth"]
    code, found = report("--config-file", ROOT / "configs/quickstart.yaml", *opts)
    assert code == 1
    assert "gone.json" in found["classes"][1]
    assert found["data set shapes_train"][0] == "ok"
    assert found["data set doctor_gone"][0] == "BROKEN"
    assert found["weights"] == ("BROKEN", "checkpoint 'gone.pth' does not exist")


def test_a_config_that_does_not_load_is_one_broken_line(report, quick):
    code, found = report("MODEL.DN_DETR.NUM_QUERYS", "3")
    assert code == 1
    assert "did you mean MODEL.DN_DETR.NUM_QUERIES" in found["config"][1]
    assert "weights" not in found


def test_the_doctor_writes_nothing(report, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report("OUTPUT_DIR", "out")
    assert os.listdir(tmp_path) == []
