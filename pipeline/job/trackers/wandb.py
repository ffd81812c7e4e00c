"""Speak Weights & Biases' language, which Trackio speaks too."""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.job.trackers.tracked import TrackedJob


def start(tracker: str, job: TrackedJob, run_id: str | None) -> "WandbRun":
    """Start a run in the prompt set's project, or go on with the one of this id."""
    module = import_module(tracker)
    own: dict[str, Any] = {}
    if tracker == "wandb":  # Trackio tells runs by their names
        folder = os.environ.get("WANDB_DIR", str(job.paths.tracker))
        own = {"id": run_id, "dir": folder, "settings": module.Settings(console="off", init_timeout=30)}
    run = module.init(
        project=os.environ.get(f"{tracker.upper()}_PROJECT", job.experiment),
        name=job.name,
        config=job.config,
        resume="allow" if run_id else "never",
        **own,
    )
    return WandbRun(module, run, getattr(run, "id", None) or job.name)


class WandbRun:
    """Hold a run of one of the two."""

    def __init__(self, module: Any, run: Any, run_id: str) -> None:
        self._module, self._run, self.id = module, run, run_id

    def log(self, values: dict[str, float]) -> None:
        """Add numbers at the next step."""
        self._run.log(values)

    def keep(self, paths: Iterable[Path]) -> None:
        """Keep files and folders as an artifact that is called after the run."""
        artifact = self._module.Artifact(self.id, type="pipeline-job")
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name)
            elif path.exists():
                artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def end(self, outcome: str) -> None:
        """End it; what did not end by itself has failed there."""
        own = {"exit_code": int(outcome == "died")} if self._module.__name__ == "wandb" else {}
        self._run.finish(**own)
