"""Hand a command line to Hydra, which makes the job's folder and its log and answers --cfg."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import prepare, to_config
from pipeline.config.overrides import in_hydras_words
from pipeline.config.schema import Config


def launch(arguments: list[str], run: Callable[[Config, Path], ExitStatus]) -> ExitStatus:
    """Let Hydra call `run` with the job's config and folder; return what it returned."""
    status = ExitStatus.DONE

    def task(composed: DictConfig) -> int:
        nonlocal status
        folder = HydraConfig.get().runtime.output_dir
        status = run(to_config(composed), Path(min(os.path.relpath(folder), folder, key=len)))
        return status

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, and the door tells them
    sys.argv[1:] = in_hydras_words(arguments)  # where Hydra reads them
    hydra.main(version_base="1.3", config_path=prepare(), config_name="config")(task)()
    return status
