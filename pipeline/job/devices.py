"""Share one job among the devices of this machine, a process each, and merge what they wrote."""

import os
from pathlib import Path

from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.processors import usable_cores
from pipeline.common.signals import Interrupt
from pipeline.common.streams import is_stream
from pipeline.common.terminal import how_many, say
from pipeline.config.schema import Config, Resume
from pipeline.job.fleet import Fleet, FleetDevice
from pipeline.job.folder import JobFolder
from pipeline.job.merge import check_whole, merge
from pipeline.memory.devices import visible_gpus
from pipeline.prompts.count import count_job


def run_devices(config: Config, overrides: list[str], folder: Path) -> ExitStatus:
    """Run the job's shards side by side; then its folder is as after `merge`.

    Raises:
        PipelineError: there are not so many devices, or the job as a whole cannot go on.
    """
    devices = find_devices(config)
    # The folder is held meanwhile, and let go for the merge, which takes it by itself.
    with Interrupt() as interrupt, JobFolder(folder) as results:
        if config.resume is Resume.never:
            results.set_aside()
        check_whole(results)
        totals = count_job(config, results.split or len(devices)).totals
        status = Fleet(config, results, overrides, devices, totals, interrupt).run()
    if status is ExitStatus.RUN_AGAIN:
        assert interrupt.signal
        say(f"Stopped by {interrupt.signal.name}. The same command goes on from here.", style="yellow")
    else:
        say(f"{how_many(merge(folder), 'line')} in {results.rows}", style="green")
    return status


def find_devices(config: Config) -> list[FleetDevice]:
    """Find the GPUs that `devices` asks for, or part the CPU's cores and memory.

    Raises:
        ConfigError: there are not so many, or the job cannot be parted.
    """
    asked, where = config.devices, config.model.device_map
    assert asked is not None
    if where not in ("auto", "cpu"):
        raise ConfigError(
            f"devices={asked} model.device_map={where}: a device each, and one map for all",
            "Leave model.device_map out.",
        )
    if is_stream(config.prompts):
        raise ConfigError(
            f"devices={asked} prompts={config.prompts}: can be read once only", "Write it to a file."
        )
    return _cores(config, asked) if where == "cpu" else _gpus(asked)


def _gpus(asked: str) -> list[FleetDevice]:
    found = sum(gpu.backend == "cuda" for gpu in visible_gpus())  # others' drivers have other variables
    if found == 0:
        raise ConfigError(
            f"devices={asked}: no NVIDIA GPU is here", "devices=2 model.device_map=cpu parts the cores."
        )
    if asked != "all" and int(asked) > found:
        raise ConfigError(f"devices={asked}: {found} GPUs are here", "Ask for no more, or devices=all.")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(number) for number in range(found)]
    count = found if asked == "all" else int(asked)
    return [
        FleetDevice(f"GPU {name.strip()}", {"CUDA_VISIBLE_DEVICES": name.strip()}, ())
        for name in names[:count]
    ]


def _cores(config: Config, asked: str) -> list[FleetDevice]:
    if asked == "all":
        raise ConfigError(
            "devices=all model.device_map=cpu: there is one CPU", "Give a number, as devices=2."
        )
    count = int(asked)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(usable_cores()) // count))
    # Each measures what is free for itself, and all of them have to fit.
    memory = f"engine.memory_fraction={config.engine.memory_fraction / count:.4g}"
    return [
        FleetDevice(f"part {i} of the CPU", {"OMP_NUM_THREADS": threads}, (memory,)) for i in range(count)
    ]
