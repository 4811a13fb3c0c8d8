"""tools/measure_instability.py: the checkpoints of a training give what its own probes have logged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from naming import naming
from toy_training import make_cfg, train

from dn_detr_d2.engine import Trainer
from tools import measure_instability

PROBES = ["TEST.INSTABILITY.NUM_IMAGES", 5, "TEST.INSTABILITY.PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
LEARNING = ["SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", ("shapes_val",)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of six iterations with a probe and a checkpoint at every second."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {}))
        cfg = make_cfg(folder, *PROBES, *LEARNING)
        train(cfg)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def run(trained, capsys):
    """run(*checkpoints, more=...) -> (exit code, stdout, stderr)."""

    def call(*checkpoints, more=()):
        options = ["--config-file", str(trained / "config.yaml"), "--dataset", "shapes_val", "--num-images", "5"]
        code = measure_instability.main([*options, *map(str, more), "--checkpoints", *map(str, checkpoints)])
        return code, *capsys.readouterr()

    return call


def test_checkpoints_give_what_the_training_has_logged(trained, run, tmp_path):
    code, out, err = run(trained, more=["--output", tmp_path / "found.json"])
    assert (code, err) == (0, "")
    logged = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    logged = [line for line in logged if "anchors/distance" in line]
    rows = [json.loads(line) for line in (tmp_path / "found.json").read_text().splitlines()]
    assert [row["iterations"] for row in rows] == [2, 4, 6]
    assert [Path(row["checkpoint"]).name for row in rows] == [f"model_{i:07}.pth" for i in (1, 3, 5)]
    probed = ("instability/", "anchors/")
    for row, line in zip(rows, logged, strict=True):
        expected = {name: x for name, x in line.items() if name.startswith(probed)}
        assert {name: x for name, x in row.items() if name.startswith(probed)} == pytest.approx(expected, rel=1e-6)
    means = [row["instability/layer_1"] for row in rows[1:]]
    assert "instability/layer_1" not in rows[0]
    assert sum(means) > 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["2", "4", "6"]
    assert naming(f"{sum(means) / 2:.2f}", "2 iterations apart", "3 checkpoints").search(out.splitlines()[-2])


def test_files_come_in_the_order_that_is_given_and_unequal_steps_are_named(trained, run):
    first, second, third = (trained / f"model_{i:07}.pth" for i in (1, 3, 5))
    code, out, _ = run(first, second, third, first)
    assert code == 0
    assert naming("-4", 2, "unequal").search(out.splitlines()[-1])
    _, out, _ = run(third, third)
    assert naming("0.00").search(out.splitlines()[-1])  # nothing has changed


def test_a_file_without_a_number_has_no_iterations(trained, run):
    code, out, _ = run(trained / "model_0000001.pth", trained / "model_final.pth")
    assert code == 0
    assert "model_final.pth" in out
    assert "apart" not in out


def test_what_cannot_be_compared_is_refused(trained, run, tmp_path):
    (tmp_path / "empty").mkdir()
    final = trained / "model_final.pth"
    for checkpoints, named in [
        ([final], ["model_final.pth"]),
        ([trained, tmp_path / "none.pth"], ["none.pth"]),
        ([tmp_path / "empty", final], [str(tmp_path / "empty")]),
    ]:
        code, _, err = run(*checkpoints)
        assert code == 2
        assert naming("--checkpoints", *named).search(err)
    code, _, err = run(trained, more=["--output", tmp_path / "no" / "x.json"])
    assert (code, "x.json" in err) == (2, True)
    code, _, err = run(trained, more=["--num-images", -1])
    assert (code, bool(naming("--num-images", -1).search(err))) == (2, True)


def test_a_checkpoint_of_another_model_is_refused(trained, run, tmp_path):
    other = tmp_path / "model_0000007.pth"
    shutil.copyfile(trained / "model_0000005.pth", other)
    state = torch.load(other, weights_only=True)
    state["model"] = {name: x for name, x in state["model"].items() if "decoder" not in name}
    torch.save(state, other)
    code, _, err = run(trained, other)
    assert code == 2
    assert "model_0000007.pth" in err
