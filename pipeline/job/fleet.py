"""Run a job's shards in several processes, whoever is free taking the next."""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from pipeline.common.children import last_lines, start_child
from pipeline.common.errors import JobError
from pipeline.common.exit_status import ExitStatus, ended
from pipeline.common.signals import Interrupt
from pipeline.common.terminal import say
from pipeline.config.schema import Config, Resume
from pipeline.job.counts import read_counts
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths
from pipeline.job.progress import JobProgress

LOOK_SEC, COUNT_SEC = 0.1, 1.0  # between two looks at the processes, and two counts of their rows
DONE = (ExitStatus.DONE, ExitStatus.SOME_FAILED)


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """Name what one process of a fleet runs on."""

    name: str
    environment: dict[str, str]
    overrides: tuple[str, ...]


@dataclass
class Fleet:
    """Share a job's shards among its devices: whoever is free takes the next; what a dead process leaves, too."""

    config: Config
    results: JobFolder
    overrides: list[str]
    devices: list[FleetDevice]
    totals: tuple[int, ...]  # [shards] completions to make
    interrupt: Interrupt
    waiting: deque[int] = field(default_factory=deque)  # shards
    running: "dict[int, tuple[FleetDevice, subprocess.Popen[bytes]]]" = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)  # of the shards that ended
    started: set[int] = field(default_factory=set)

    def run(self) -> ExitStatus:
        """Run all shards, or stop all of them after a signal.

        Raises:
            JobError: every process died.
        """
        free = deque(self.devices)
        self.waiting.extend(range(len(self.totals)))
        self.interrupt.hold(self._hand_on)
        counted = time.monotonic()
        with self._no_process_left(), JobProgress(sum(self.totals), self._count()) as progress:
            while self.running or (self.waiting and not self.interrupt.signal):
                while self.waiting and free and not self.interrupt.signal:
                    self._start(self.waiting.popleft(), free.popleft())
                time.sleep(LOOK_SEC)
                free.extend(self._collect())
                if time.monotonic() - counted > COUNT_SEC:
                    counted = time.monotonic()
                    progress.update(done := self._count(), done - progress.before, "rows", self._held_bytes())
                if not self.running and not free:
                    break
        return self._end()

    def _start(self, shard: int, device: FleetDevice) -> None:
        paths = self._paths(shard)
        again = ["resume=auto"] if shard in self.started and self.config.resume is Resume.never else []
        self.started.add(shard)
        more = ["devices=null", f"shard={shard}/{len(self.totals)}", *device.overrides, *again]
        command = [sys.executable, "-X", "faulthandler", "-m", "pipeline", *self.overrides, *more]
        process = start_child(command, os.environ | device.environment, paths.said)
        self.running[shard] = device, process
        if self.interrupt.signal:  # it came before there was anyone to hand it to
            process.send_signal(self.interrupt.signal)

    def _collect(self) -> list[FleetDevice]:
        """Take in the processes that ended; return the devices of those that did their shard."""
        free = []
        for shard, (device, process) in list(self.running.items()):
            if (status := process.poll()) is None:
                continue
            del self.running[shard]
            self.statuses[shard] = status
            if status in DONE:
                free.append(device)
            elif not self.interrupt.signal:
                say(
                    f"{device.name}: its process ended ({ended(status)}), and it gets no more rows.", "yellow"
                )
                self.waiting.append(shard)
        return free

    def _end(self) -> ExitStatus:
        if len(self.statuses) == len(self.totals) and all(
            status in DONE for status in self.statuses.values()
        ):
            return ExitStatus(max(self.statuses.values()))
        if self.interrupt.signal:
            return ExitStatus.RUN_AGAIN
        shard, status = next((s, status) for s, status in self.statuses.items() if status not in DONE)
        said = self._paths(shard).said
        raise JobError(
            found=f"{said.parent}: no process is left; this one ended so: {ended(status)}\n{last_lines(said)}",
            fix="What was written stays valid: mend what it says, and the same command goes on.",
        )

    def _paths(self, shard: int) -> JobPaths:
        return JobPaths(self.results.shard(shard, len(self.totals)))

    def _count(self) -> int:
        return sum(read_counts(self._paths(shard).folder).done for shard in range(len(self.totals)))

    def _held_bytes(self) -> int:
        held = 0
        for _, process in self.running.values():
            with contextlib.suppress(psutil.Error):
                own = psutil.Process(process.pid)
                held += sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))
        return held

    def _hand_on(self, number: int) -> None:
        for _, process in list(self.running.values()):
            process.send_signal(number)

    @contextlib.contextmanager
    def _no_process_left(self) -> Iterator[None]:
        """Kill what still runs when this ends in an error."""
        try:
            yield
        finally:
            for _, process in self.running.values():
                process.kill()
                process.wait()
