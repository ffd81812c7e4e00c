"""Speak MLflow: to the server that MLFLOW_TRACKING_URI names, or into MLflow's own local files."""

import os
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import mlflow
from mlflow.entities import Param
from mlflow.tracking import MlflowClient

from pipeline.job.trackers.tracked import TrackedJob

STATUSES = {"done": "FINISHED", "stopped": "KILLED", "died": "FAILED"}
MAX_PARAMS = 100  # that MLflow takes at once


def start(tracker: str, job: TrackedJob, run_id: str | None) -> "MlflowRun":
    """Start a run in the prompt set's experiment, or go on with the one of this id."""
    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys() and run_id is None:
        mlflow.set_experiment(job.experiment)
    run = mlflow.start_run(run_id=run_id, run_name=job.name)
    if run_id is None:  # a param is written once: what decides the text is the same ever after
        left = iter(job.config.items())
        while some := [Param(key, str(value)) for key, value in islice(left, MAX_PARAMS)]:
            MlflowClient().log_batch(run.info.run_id, params=some)
    return MlflowRun(run.info.run_id, run.info.start_time / 1000)


class MlflowRun:
    """Hold a run of MLflow's."""

    def __init__(self, run_id: str, started: float) -> None:
        self.id, self._started = run_id, started

    def log(self, values: dict[str, float]) -> None:
        """Add numbers at a step that is the second since the run began, however often the job was resumed."""
        mlflow.log_metrics(values, step=int(time.time() - self._started))

    def keep(self, paths: Iterable[Path]) -> None:
        """Keep files and folders as artifacts."""
        for path in paths:
            if path.is_dir():
                mlflow.log_artifacts(str(path), path.name)
            elif path.exists():
                mlflow.log_artifact(str(path))

    def end(self, outcome: str) -> None:
        """End it."""
        mlflow.end_run(STATUSES[outcome])
