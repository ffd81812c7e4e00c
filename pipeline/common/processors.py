"""Measure what others do with the processors that this process may use."""

import os
import time

import psutil

from pipeline.common.terminal import how_many, say

NOTICED_CORES = 0.3  # less is what any system does by itself


class OthersWork:
    """Count, from when it is made, the cores that other processes keep busy.

    Args:
        helper: the pid of a process that works for this one, and does not count as another; it may start later.
    """

    def __init__(self, helper: int | None = None) -> None:
        self.helper = helper
        self._cores = usable_cores()
        self._started = self._look()

    def busy_cores(self) -> float:
        """Return how many there were on average until now."""
        elapsed, others = (now - before for now, before in zip(self._look(), self._started, strict=True))
        return min(max(0.0, others / elapsed), float(len(self._cores))) if elapsed > 0 else 0.0

    def _look(self) -> tuple[float, float]:
        """Read the clock, and the seconds that all these cores were busy without those of this process."""
        own = os.times()
        spent = own.user + own.system + own.children_user + own.children_system + self._helpers_sec()
        every = psutil.cpu_times(percpu=True)
        busy = sum(_busy_sec(every[core]) for core in self._cores if core < len(every))
        return time.monotonic(), busy - spent

    def _helpers_sec(self) -> float:
        """Sum the seconds of the helper and of what it started."""
        if self.helper is None:
            return 0.0
        try:
            helper = psutil.Process(self.helper)
            spent = [process.cpu_times() for process in (helper, *helper.children(recursive=True))]
        except psutil.Error:
            return 0.0
        return sum(times.user + times.system for times in spent)


def usable_cores() -> list[int]:
    """List the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # systems that bind no process to cores


def crowded(busy_cores: float, threads: int) -> str | None:
    """Say that others leave fewer cores than so many threads want; None where they leave enough."""
    cores = len(usable_cores())
    if busy_cores + min(threads, cores) < cores + NOTICED_CORES:
        return None
    has, all_cores = how_many(threads, "thread"), how_many(cores, "core")
    return f"other programs keep {busy_cores:.1f} of {all_cores} busy, and a job has {has}"


def say_if_crowded(others: OthersWork, threads: int) -> None:
    """Tell whoever starts a job that others have the cores which it wants."""
    if words := crowded(others.busy_cores(), threads):
        say(f"This machine is busy: {words}. It will be slower than on a quiet one.", style="yellow")


def _busy_sec(times: object) -> float:
    """Sum what a core did; time as a guest is in its user's time already."""
    fields = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
    return sum(getattr(times, name, 0.0) for name in fields)
