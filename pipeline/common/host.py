"""Measure the host's memory, with the limits on this process: control groups and resource limits."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def control_group_rests(mount: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Return the bytes left in each control group that limits this process: its own, and those around it.

    Pages of files that were not used lately count as free: the kernel takes them back first.
    """
    rests: list[int] = []
    for folder, names in _groups(mount, own):
        limit, used, cached = names
        try:
            rest = int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        rests.append(rest + _statistic(folder / "memory.stat", cached))
    return rests


def resource_rests() -> list[int]:
    """Return the bytes left of the limits that `ulimit -v` and `ulimit -d` set."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    memory = psutil.Process().memory_info()
    rests: list[int] = []
    for name, used in (("RLIMIT_AS", memory.vms), ("RLIMIT_DATA", getattr(memory, "data", None))):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY and used is not None:
            rests.append(soft - used)
    return rests


def _groups(mount: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Find the folders of this process's groups and their parents. A container may see its own group as the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (mount / "memory", V1) if controllers else (mount, V2)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield top / folder, names


def _statistic(file: Path, name: str) -> int:
    """Read one line of memory.stat; 0 where there is none."""
    try:
        fields = dict(line.split() for line in file.read_text().splitlines())
        return int(fields[name])
    except (OSError, ValueError, KeyError):
        return 0


def host_free_bytes() -> int:
    """Return what the system can give without swapping, or the rest of this process's limits if that is less."""
    free: int = psutil.virtual_memory().available
    return max(0, min([free, *control_group_rests(), *resource_rests()]))


def anonymous_bytes() -> int | None:
    """Return what of the resident set is no page of a file, and so has to be free; None where nothing says so."""
    memory = psutil.Process().memory_info()
    shared: int | None = getattr(memory, "shared", None)
    return None if shared is None else int(memory.rss) - shared


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident set now, of this process or of another; 0 of one that has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
