"""Run a job, or with -m a sweep of jobs."""

from pathlib import Path

from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import job_folder, read_config
from pipeline.config.launch import launch
from pipeline.config.schema import Config

FLAGS_OF_HYDRA = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "--shell-completion", "-sc")


def main(arguments: list[str]) -> ExitStatus:
    """Run the job or the sweep that these overrides describe.

    Raises:
        PipelineError: the configuration is wrong, or the job cannot go on.
    """
    if any(argument.split("=")[0] in FLAGS_OF_HYDRA for argument in arguments):
        return launch(arguments, _run_job)
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if len(overrides) == len(arguments):
        config = read_config(overrides)  # so that an error comes before anything is written
        from pipeline.job.tracker import check_installed
        from pipeline.models.checkpoint import fetch_config

        check_installed(config.tracker)
        fetch_config(config.model, config.models_dir)  # the folder's name says the format that it names
        if config.devices is not None:
            from pipeline.job.devices import run_devices

            return run_devices(config, overrides, job_folder(overrides))
        return launch(arguments, _run_job)
    if any(override.startswith("hydra/launcher=") for override in overrides):
        return launch(arguments, _run_job)
    from pipeline.job.sweep import run_sweep

    return run_sweep(overrides)


def _run_job(config: Config, folder: Path) -> ExitStatus:
    from pipeline.job.runner import run_job
    from pipeline.models.own_settings import settle_generation

    return run_job(settle_generation(config), folder)
