"""`python -m pipeline`: one job, or with -m a sweep of jobs."""

import logging
import os
import sys
from pathlib import Path

from pipeline.errors import PipelineError

FLAGS_OF_HYDRA = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")


def main() -> int:
    """Run the command line. Returns the exit status; see --help for what each means."""
    arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from pipeline.display import say

    try:
        if "--help" in arguments or "-h" in arguments:
            return _help()
        if any(argument.split("=")[0] in FLAGS_OF_HYDRA for argument in arguments):
            return _hydra()
        overrides = [a for a in arguments if a not in ("-m", "--multirun")]
        if len(overrides) == len(arguments):
            return _one_job(overrides)
        if any(o.startswith("hydra/launcher=") for o in overrides):
            return _hydra()
        from pipeline.multirun import run_sweep

        return run_sweep(overrides)
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        logging.getLogger(__name__).error("%s", error)
        return error.exit_status


def _help() -> int:
    from pipeline.help import show_help

    show_help()
    return 0


def _one_job(overrides: list[str]) -> int:
    from pipeline.compose import read_config

    read_config(overrides)  # so that an error comes before anything is written
    return _hydra()


def _hydra() -> int:
    """Hand over to Hydra, which makes the job's folder and calls `run`."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from pipeline.compose import prepare, to_config

    status = 0

    def run(composed: DictConfig) -> int:
        nonlocal status
        from pipeline.runner import Job

        status = Job(to_config(composed), Path(HydraConfig.get().runtime.output_dir)).run()
        return status

    hydra.main(version_base="1.3", config_path=prepare(), config_name="config")(run)()
    return status


if __name__ == "__main__":
    sys.exit(main())
