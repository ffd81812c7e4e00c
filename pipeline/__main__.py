"""`python -m pipeline`: one job, or with -m a sweep of jobs."""

import logging
import os
import sys
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.signals import Interrupt, Stopped
from pipeline.common.terminal import say
from pipeline.engine.allocator import set_allocator

log = logging.getLogger(__name__)

FAILED, RESUME_ME = 3, 75  # exit status
FLAGS_OF_HYDRA = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")


def main() -> int:
    """Run the command line. Returns the exit status; see --help for what each means."""
    arguments = sys.argv[1:]
    set_allocator()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, and we report them
    logging.raiseExceptions = False  # a log on a full disk is no reason to stop, or for a traceback
    with Interrupt() as interrupt:
        try:
            return _run(arguments)
        except Stopped:
            say(f"Stopped by {interrupt.signal and interrupt.signal.name}. Nothing was started.", "yellow")
            return RESUME_ME


def _run(arguments: list[str]) -> int:
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
        from pipeline.job.sweep import run_sweep

        return run_sweep(overrides)
    except PipelineError as error:
        say(f"Error: {error}", style="red")
        if log.hasHandlers():  # the job's own log; without it, this would only be said twice
            log.error("%s", error)
        return error.exit_status
    except OSError as error:  # Hydra's own files in the job's folder
        say(f"Error: {error.filename}: {error.strerror}. Make room or mend it, and run again.", style="red")
        return FAILED
    except Exception as error:
        log.exception("Unexpected")
        say(
            f"Error: {type(error).__name__}: {error}. This is a mistake of ours: please report it.",
            style="red",
        )
        return FAILED


def _help() -> int:
    from pipeline.commands.help import show_help

    show_help()
    return 0


def _one_job(overrides: list[str]) -> int:
    from pipeline.config.compose import read_config

    read_config(overrides)  # so that an error comes before anything is written
    return _hydra()


def _hydra() -> int:
    """Hand over to Hydra, which makes the job's folder and calls `run`."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from pipeline.config.compose import prepare, to_config

    status = 0

    def run(composed: DictConfig) -> int:
        nonlocal status
        from pipeline.job.runner import run_job

        folder = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        status = run_job(to_config(composed), folder)
        return status

    hydra.main(version_base="1.3", config_path=prepare(), config_name="config")(run)()
    return status


if __name__ == "__main__":
    sys.exit(main())
