"""LOGGERS: what trackers get is what metrics.json gets, a resumed training goes on with its run, failures are told."""

import json
import logging
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage
from naming import naming
from ranks import on_ranks
from toy_training import differing, load, make_cfg, stop_at, train

from dn_detr_d2 import ConfigError
from dn_detr_d2.engine import extras
from dn_detr_d2.engine.extras import check_extras
from dn_detr_d2.engine.loggers import build_loggers

SHORT = ["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()]


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    """A client of a store in files; the packages' own environment variables say where it is."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    from mlflow import MlflowClient

    return MlflowClient()


@pytest.fixture
def wandb_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def runs_of(client):
    experiment = client.get_experiment_by_name("dn_detr_d2")
    return client.search_runs([experiment.experiment_id])


def logged(folder):
    """{(key, iteration): value} of metrics.json, the last line of each iteration."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {(key, x["iteration"]): value for x in lines for key, value in x.items() if key != "iteration"}


def test_mlflow_gets_the_values_of_metrics_json_and_a_resumed_training_goes_on_with_its_run(tmp_path, mlflow_store):
    train(make_cfg(tmp_path / "plain"))
    logging_to = ["LOGGERS", ["mlflow"]]
    train(make_cfg(tmp_path / "whole", *logging_to))
    whole = runs_of(mlflow_store)
    assert len(whole) == 1
    run = whole[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["SOLVER.MAX_ITER"] == "6"
    for (key, iteration), value in logged(tmp_path / "whole").items():
        history = {x.step: x.value for x in mlflow_store.get_metric_history(run.info.run_id, key)}
        assert history[iteration] == pytest.approx(value, nan_ok=True), key
    stop_at(tmp_path / "whole", "model_0000002", tmp_path / "stopped")
    train(make_cfg(tmp_path / "stopped", *logging_to), resume=True, seed=99)
    assert [x.info.run_id for x in runs_of(mlflow_store)] == [run.info.run_id]
    assert load(tmp_path / "stopped")["logger_runs"] == {"mlflow": run.info.run_id}
    assert differing(load(tmp_path / "whole"), load(tmp_path / "stopped")) == []
    different = differing(load(tmp_path / "plain"), load(tmp_path / "whole"))
    assert all(x.startswith((".logger_runs", ".config")) for x in different), different


def test_wandb_gets_values_and_goes_on_with_its_run(tmp_path, wandb_offline):
    cfg = make_cfg(tmp_path, "LOGGERS", ["wandb"])
    ids = []
    for start, run_id in ((0, ""), (3, "abc123")):
        with EventStorage(start) as storage:
            (writer,) = build_loggers(cfg)
            writer.start(run_id)
            storage.put_scalars(**{"denoising/accuracy@0.4": 0.5, "bbox/AP": float("nan")}, smoothing_hint=False)
            writer.write()
            writer.close()
        assert not writer.failed
        assert writer.sent == start
        ids.append(writer.run_id)
    assert ids[1] == "abc123"
    files = [path.name for path in (tmp_path / "wandb").rglob("run-*.wandb")]
    assert sorted(files) == sorted(f"run-{x}.wandb" for x in ids)
    log, until = next((tmp_path / "wandb").rglob("run-abc123.wandb")), time.monotonic() + 60
    while b"denoising/accuracy@0.4" not in log.read_bytes():  # another process writes it
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_training_with_wandb_draws_the_same_random_numbers(tmp_path, wandb_offline):
    train(make_cfg(tmp_path / "plain", *SHORT))
    train(make_cfg(tmp_path / "logged", *SHORT, "LOGGERS", ["wandb"]))
    different = differing(load(tmp_path / "plain"), load(tmp_path / "logged"))
    assert all(x.startswith((".logger_runs", ".config")) for x in different), different


def train_with(variables, cfg):
    """A training in a process that may have been made before this test set its environment variables."""
    os.environ.update(variables)
    train(cfg)


def test_only_rank_0_writes(tmp_path, mlflow_store):
    variables = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    on_ranks(train_with, variables, make_cfg(tmp_path / "out", *SHORT, "LOGGERS", ["mlflow"]))
    assert len(runs_of(mlflow_store)) == 1


@contextmanager
def tracking_server(calls):
    """A stand-in of an MLflow server that answers ``calls`` requests, then with an error. Yields its URL."""
    left = [calls]

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            left[0] -= 1
            run = {"info": {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING"}, "data": {}}
            experiment = {"experiment_id": "1", "name": "dn_detr_d2", "lifecycle_stage": "active"}
            body = json.dumps({"run": run, "experiment": experiment}).encode()
            self.send_response(200 if left[0] >= 0 else 500)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_goes_away_is_told_once_and_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cfg = make_cfg(tmp_path, "LOGGERS", ["mlflow"])
    parameters = -(-len(list(extras_flat(cfg))) // 100)
    with tracking_server(2 + parameters + 1) as url:  # experiment, run, config, one write
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        with EventStorage(0) as storage, caplog.at_level(logging.WARNING, "dn_detr_d2"):
            (writer,) = build_loggers(cfg)
            writer.start("")
            for iteration in range(4):
                storage.iter = iteration
                storage.put_scalar("total_loss", 1.0)
                writer.write()
            writer.close()
    assert writer.failed
    assert [naming("mlflow", 0, "metrics.json").search(text) is not None for text in caplog.messages] == [True]


def extras_flat(cfg):
    from dn_detr_d2.config.ranges import flatten

    return flatten(cfg)


def test_a_tracker_that_cannot_start_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=naming("LOGGERS", "mlflow")) as caught:
        train(make_cfg(tmp_path / "out", "LOGGERS", ["mlflow"]))
    assert "\n" not in str(caught.value)
    assert not list(Path(tmp_path / "out").glob("*.pth"))


def test_a_run_that_the_tracker_does_not_know_is_named(tmp_path, mlflow_store):
    (writer,) = build_loggers(make_cfg(tmp_path, "LOGGERS", ["mlflow"]))
    with pytest.raises(ConfigError, match=naming("LOGGERS", "mlflow", "gone77")):
        writer.start("gone77")


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("LOGGERS", "'neptune'", "'mlflow'")):
        make_cfg(tmp_path, "LOGGERS", ["neptune"])


@pytest.mark.parametrize(("key", "value", "missing", "extra"), [
    ("LOGGERS", ["wandb"], "wandb", "[wandb]"), ("LOGGERS", ["wandb", "mlflow"], "mlflow", "[mlflow]"),
    ("REPORT", "always", "supervision", "[report]"),
])  # fmt: skip
def test_a_missing_package_is_named_with_its_extra_before_anything_is_built(
    tmp_path, monkeypatch, key, value, missing, extra
):
    cfg = make_cfg(tmp_path, key, value)
    check_extras(cfg)
    monkeypatch.setattr(extras, "is_installed", lambda name: name != missing)
    with pytest.raises(ConfigError, match=naming(key, missing)) as caught:
        train(cfg)
    assert extra in str(caught.value)
    assert os.listdir(tmp_path) == []
