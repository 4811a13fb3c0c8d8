"""Scalars of a training for Weights & Biases and MLflow, as writers of Detectron2; see docs/report.md.

Their packages are imported when a run starts. Where it goes, and under which project, is said by each package's own
environment variables: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, and so on.
"""

import logging
import math
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import yaml
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..config.ranges import flatten
from ..data.interruption import Interrupted
from ..errors import ConfigError
from .hooks.early_stopping import EarlyEnd

logger = logging.getLogger(__name__)
PROJECT = "dn_detr_d2"  # unless the environment names another
WINDOW = 20  # values that a median is taken of, as in metrics.json


class RunLogger(EventWriter):
    """Sends what metrics.json gets to a run of a tracker, with the same iterations.

    A tracker that fails does not end the training: the first failure is a warning that names it, after which nothing more
    is sent by this process. metrics.json and TensorBoard have everything.

    Args:
        cfg: of the training; it becomes the run's configuration.

    Attributes:
        name: in LOGGERS.
        run_id: of the run, "" before it starts.
        sent: the last iteration whose values were sent, -1 before the first.
        failed: whether sending has failed.
    """

    name = ""

    def __init__(self, cfg):
        self.cfg, self.run_id, self.sent, self.failed = cfg, "", -1, False

    def start(self, run_id: str) -> None:
        """Starts a run, or goes on with that of a checkpoint.

        Args:
            run_id: kept in the checkpoint, "" for a new run.

        Raises:
            ConfigError: the run cannot be started; nothing has been trained yet.
        """
        try:
            self.run_id = self._start(run_id)
        except Exception as error:
            raise ConfigError(
                f"LOGGERS: {self.name} cannot {f'go on with run {run_id}' if run_id else 'start a run'}: {_said(error)}; "
                f"set its environment variables, or take {self.name!r} out"
            ) from None
        logger.info("%s: run %s", self.name, self.run_id)

    def write(self) -> None:
        """Sends what is new since the last time."""
        if self.failed or not self.run_id:
            return
        new = defaultdict(dict)
        for key, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self.sent:
                new[iteration][key] = value
        try:
            for iteration in sorted(new):
                self._send(iteration, new[iteration])
                self.sent = iteration
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Ends the run as finished, stopped or failed, by what ends the training."""
        if self.failed or not self.run_id:
            return
        kind = sys.exc_info()[0]
        if kind is None or issubclass(kind, EarlyEnd):
            outcome = "finished"
        else:
            outcome = "stopped" if issubclass(kind, Interrupted) else "failed"
        try:
            self._finish(outcome)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        logger.warning(
            "%s: values after iteration %d are not sent, the training goes on without it: %s; metrics.json has all of them",
            *(self.name, self.sent, _said(error)),
        )

    def _start(self, run_id: str) -> str:
        raise NotImplementedError

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _finish(self, outcome: str) -> None:
        raise NotImplementedError


class WandbLogger(RunLogger):
    """Weights & Biases. Values are drawn over ``iteration``, so that those a resumed training repeats are not dropped."""

    name = "wandb"

    def _start(self, run_id: str) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=Path(self.cfg.OUTPUT_DIR).resolve().name,
            dir=self.cfg.OUTPUT_DIR,
            config=yaml.safe_load(self.cfg.dump()),
            id=run_id or None,
            resume="allow",
            settings=wandb.Settings(console="off", quiet=True),
        )
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({**values, "iteration": iteration})

    def _finish(self, outcome: str) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class MlflowLogger(RunLogger):
    """MLflow. Its names allow no @, which becomes _; values that are not finite are left out."""

    name = "mlflow"
    STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    PARAMS, METRICS, LENGTH = 100, 1000, 6000  # its limits of one call, and of a value

    def _start(self, run_id: str) -> str:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self._client.create_experiment(experiment)
        run_id = self._client.create_run(place, run_name=Path(self.cfg.OUTPUT_DIR).resolve().name).info.run_id
        self._send_config(run_id)
        return run_id

    def _send_config(self, run_id: str) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[: self.LENGTH]) for key, value in flatten(self.cfg)]
        for i in range(0, len(params), self.PARAMS):
            self._client.log_batch(run_id, params=params[i : i + self.PARAMS])

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", key), value, now, iteration)
            for key, value in values.items()
            if math.isfinite(value)
        ]
        for i in range(0, len(metrics), self.METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[i : i + self.METRICS])

    def _finish(self, outcome: str) -> None:
        self._client.set_terminated(self.run_id, status=self.STATUS[outcome])


CLASSES = {kind.name: kind for kind in (WandbLogger, MlflowLogger)}


def build_loggers(cfg) -> list[RunLogger]:
    """The writers that LOGGERS names, on rank 0; none on the others."""
    return [CLASSES[name](cfg) for name in cfg.LOGGERS] if comm.is_main_process() else []


def run_ids(loggers: list[RunLogger]) -> dict[str, str]:
    """{name: run id}, for checkpoints."""
    return {x.name: x.run_id for x in loggers}


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
