"""Tell a tracker of one job, apart from the job: it costs that neither memory nor time, nor its success.

    python -m pipeline.job.trackers.process mlflow FOLDER

Standard input has a line of JSON for each point of the job's progress, and a last one that says how it ended;
where that is missing, the job died. On standard output stands why something was not told, in one line.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from pipeline.common.hidden import hide_passwords
from pipeline.job.paths import JobPaths, read_json
from pipeline.job.stored import read_stats
from pipeline.job.trackers.tracked import PATIENCE_SEC, Run, TrackedJob, numbers

ENVIRONMENT = {  # unless whoever starts the job says otherwise: give up early, and tell nobody else
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def main(tracker: str, folder: Path, lines: Iterable[str]) -> None:
    """Go on with the job's run or start one, and hand on what the job says until it ends."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.nice(10)  # the job comes first
    paths = JobPaths(folder)
    with FileLock(paths.tracker / "run.lock"):  # that of a job which was killed may not be done yet
        job = TrackedJob.read(paths)
        known, lost = known_runs(paths.tracker_run, tracker)
        run = _start(tracker, job, known)
        outcome, missed = _follow(run, lines)
        signal.alarm(int(PATIENCE_SEC["done"]))  # where nobody is left who waits
        run.log(numbers(read_stats(paths)))
        with tempfile.TemporaryDirectory() as made:
            if outcome == "done" and job.config.get("report"):
                _report(folder, Path(made) / "report")
            run.keep([paths.stats, paths.manifest, Path(made) / "report"])
        run.end(outcome)
    if error := missed or lost:
        raise error


def known_runs(noted: Path, tracker: str) -> tuple[dict[str, str], Exception | None]:
    """Read the ids of a job's runs. What holds none is moved aside, once, and comes with why a run is new."""
    known = read_json(noted)
    if not noted.exists() or (known is not None and isinstance(known.get(tracker, ""), str)):
        return known or {}, None
    aside = noted.with_name(f"{noted.name}.damaged-{time.time_ns()}")
    noted.rename(aside)
    return {}, ValueError(f"{noted} held no run's id: it is {aside.name} now, and a new run was started")


def _start(tracker: str, job: TrackedJob, known: dict[str, str]) -> Run:
    """Start a run, or go on with the one that the job's folder knows; note its id."""
    module = import_module(f"pipeline.job.trackers.{'mlflow' if tracker == 'mlflow' else 'wandb'}")
    run: Run = module.start(tracker, job, known.get(tracker))
    job.paths.tracker_run.write_text(json.dumps({**known, tracker: run.id}) + "\n", encoding="utf-8")
    return run


def _follow(run: Run, lines: Iterable[str]) -> tuple[str, Exception | None]:
    """Hand points on until the job ends; after the first that the tracker does not take, only read them."""
    outcome, missed = "died", None
    for line in lines:
        match json.loads(line):
            case str(word):
                outcome = word
            case point if missed is None:
                try:
                    run.log(point)
                except Exception as error:  # noqa: BLE001  # whatever a tracker raises: it may be back at the end
                    missed = error
    return outcome, missed


def _report(folder: Path, out: Path) -> None:
    """Write the job's report, with its plots."""
    command = [sys.executable, "-m", "pipeline", "report", str(folder), f"out={out}"]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # a tracker's own words go to the log
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.stdin)
    except Exception as error:  # noqa: BLE001  # whatever a tracker raises, it is told
        sys.stderr.write(hide_passwords(traceback.format_exc()))
        why = str(error).strip().partition("\n")[0]
        answer.write(hide_passwords(f"{type(error).__name__}: {why}"))
        sys.exit(1)
