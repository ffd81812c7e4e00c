"""Find how much memory there is to plan for: GPUs, else host memory, else what one is told."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from pipeline.common.errors import ConfigError
from pipeline.common.gpu import Gpu
from pipeline.common.host import host_free_bytes
from pipeline.common.units import parse_bytes
from pipeline.memory.gpu_tools import backends, find_gpus


@dataclass(frozen=True, slots=True)
class Device:
    """Hold the memory that a job can use. Bytes."""

    name: str
    gpus: tuple[Gpu, ...]  # () is the CPU
    free_bytes: int
    offload_bytes: int  # behind it: host memory behind a GPU, the disk behind host memory


def find_device(offload_dir: str | None) -> Device:
    """Find all GPUs together that a job would get, else this machine's memory.

    Raises:
        ConfigError: there is a GPU, and its memory cannot be read.
    """
    if gpus := visible_gpus():
        return gpu_device(gpus, host_free_bytes())
    folder = Path(offload_dir or ".").expanduser()
    disk = shutil.disk_usage(folder if folder.is_dir() else ".").free
    return Device("this machine's CPU", (), host_free_bytes(), disk)


def gpu_device(gpus: tuple[Gpu, ...], behind_bytes: int) -> Device:
    """Take these GPUs together. One whose free memory cannot be read counts with all that it has.

    Raises:
        ConfigError: neither can be read.
    """
    free_bytes, names = 0, []
    for gpu in gpus:
        size = gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes
        if size is None:
            raise ConfigError(
                f"The memory of {gpu.name} cannot be read here", "Say how much it has: memory=24GB"
            )
        free_bytes += size
        names.append(gpu.name if gpu.free_bytes is not None else f"{gpu.name}, as if all of it were free,")
    return Device(" + ".join(names), gpus, free_bytes, behind_bytes)


def visible_gpus() -> tuple[Gpu, ...]:
    """Find the GPUs that a job started here would get, described without torch and without opening one."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = ""
    kinds = backends(version, sys.platform, platform.machine())
    if kinds == ("mps",):  # its memory is the host's
        return (Gpu("mps", "Apple GPU", psutil.virtual_memory().total, host_free_bytes()),)
    return find_gpus(kinds, os.environ)


def given_device(memory: str) -> Device:
    """Assume a GPU of so much memory, in front of this machine's host memory.

    Raises:
        ConfigError: not a size.
    """
    try:
        size = parse_bytes(memory)
    except ValueError as error:
        raise ConfigError(f"memory={memory}: not a size", "Write it as 24GB or 24GiB") from error
    gpu = Gpu("cuda", f"a GPU of {memory}", total_bytes=size, free_bytes=size)
    return Device(gpu.name, (gpu,), size, host_free_bytes())
