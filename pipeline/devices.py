"""How much memory there is to plan for: GPUs, else host memory, else what one is told. No torch."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import ConfigError
from pipeline.gpu import Gpu
from pipeline.memory_limits import control_group_rests, resource_rests

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


@dataclass(frozen=True, slots=True)
class Device:
    """Memory that a job can use. Bytes."""

    name: str
    gpus: tuple[Gpu, ...]  # () is the CPU
    free_bytes: int
    offload_bytes: int  # behind it: host memory behind a GPU, the disk behind host memory


def find_device(offload_dir: str | None) -> Device:
    """All GPUs together where nvidia-smi finds any, else this machine's memory."""
    gpus = tuple(Gpu("cuda", name, free_bytes=free) for name, free in _gpus())
    if gpus:
        names = " + ".join(gpu.name for gpu in gpus)
        return Device(names, gpus, sum(gpu.free_bytes or 0 for gpu in gpus), host_free_bytes())
    folder = Path(offload_dir or ".").expanduser()
    disk = shutil.disk_usage(folder if folder.is_dir() else ".").free
    return Device("this machine's CPU", (), host_free_bytes(), disk)


def given_device(memory: str) -> Device:
    """A GPU of so much memory, in front of this machine's host memory.

    Raises:
        ConfigError: not a size.
    """
    size = parse_bytes(memory)
    gpu = Gpu("cuda", f"a GPU of {memory}", total_bytes=size, free_bytes=size)
    return Device(gpu.name, (gpu,), size, host_free_bytes())


def parse_bytes(size: str) -> int:
    """ "24GB" is 24 · 10⁹, "24GiB" and "24G" are 24 · 2³⁰.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", size.strip())
    units = {unit.lower(): value for unit, value in _UNITS.items()}
    if not match or match[2].lower() not in units or float(match[1]) == 0:
        raise ConfigError(f"memory={size}: not a size. Write it as 24GB or 24GiB.")
    return int(float(match[1]) * units[match[2].lower()])


def host_free_bytes() -> int:
    """What the system can give without swapping, or the rest of this process's limits if that is less."""
    free: int = psutil.virtual_memory().available
    return max(0, min([free, *control_group_rests(), *resource_rests()]))


def _gpus() -> list[tuple[str, int]]:
    """Name and free bytes of each GPU that CUDA_VISIBLE_DEVICES leaves."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.free", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(text, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str, visible: str | None) -> list[tuple[str, int]]:
    """nvidia-smi's lines "index, uuid, name, free MiB", those that `visible` names by index or uuid."""
    wanted = None if visible is None else {part.strip() for part in visible.split(",")}
    found: list[tuple[str, int]] = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[3].isdigit() and (wanted is None or wanted & {fields[0], fields[1]}):
            found.append((fields[2], int(fields[3]) * 1024**2))
    return found
