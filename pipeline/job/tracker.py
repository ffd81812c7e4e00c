"""Tell a tracker how a job goes, through a process of its own (trackers/process.py)."""

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Literal

from pipeline.common import terminal
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ended
from pipeline.common.packages import can_import
from pipeline.config.schema import Tracker
from pipeline.job.paths import JobPaths
from pipeline.job.trackers.tracked import PATIENCE_SEC

EVERY_SEC = 1.0  # between two points


def check_installed(tracker: Tracker | None) -> None:
    """Refuse a tracker that is not there, before anything is done.

    Raises:
        ConfigError: its package is not installed.
    """
    if tracker is not None and not can_import(tracker.value):
        raise ConfigError(
            f"tracker={tracker.value}: is not installed", f"pip install 'llm-job-pipeline[{tracker.value}]'."
        )


class Telling:
    """Write what the tracker's process reads. It never waits for that process before the job's end."""

    def __init__(self, tracker: Tracker | None, job: JobPaths) -> None:
        self._tracker, self._job = tracker, job
        self._told = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        if tracker is not None:
            try:
                self._process = self._start(tracker)
            except OSError as error:  # its folder cannot be written, or there is no room for a process
                self._warn(str(error), "")

    def _start(self, tracker: Tracker) -> "subprocess.Popen[bytes]":
        self._job.tracker.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pipeline.job.trackers.process", tracker.value]
        with self._job.tracker_log.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(self._job.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # a line, where something was not told
                stderr=log,
                process_group=0,  # a terminal's ^C is for the job, which says how it ended
            )
        assert process.stdin
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def point(self, rows_done: int, completion_tokens: int, held_bytes: float) -> None:
        """Tell where the job stands, unless it is too soon."""
        if self._process is None or time.monotonic() - self._told < EVERY_SEC:
            return
        self._told = time.monotonic()
        point = {"rows_done": rows_done, "completion_tokens": completion_tokens, "held_bytes": held_bytes}
        self._write(json.dumps(point))

    def end(self, outcome: Literal["done", "stopped"]) -> None:
        """Tell how the job ended, and let the process finish; say in one line if it could not."""
        if (process := self._process) is None:
            return
        try:
            last = json.dumps(outcome).encode() + b"\n"
            said, _ = process.communicate(last, timeout=PATIENCE_SEC[outcome])
            why = said.decode("utf-8", "replace").strip() or ended(process.returncode)
        except subprocess.TimeoutExpired:
            with process:  # which closes its pipes
                process.kill()
            why = f"no answer in {PATIENCE_SEC[outcome]:.0f} s"
        if process.returncode:
            self._warn(why, f"; {self._job.tracker_log} has more")

    def _warn(self, why: str, more: str) -> None:
        assert self._tracker
        terminal.say(
            f"Warning: tracker={self._tracker.value} was not told all: {why}. Nothing of the job is lost{more}.",
            style="yellow",
        )

    def _write(self, line: str) -> None:
        """Write a line, or let it go: a pipe that is full or broken is the tracker's trouble alone."""
        assert self._process
        assert self._process.stdin
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
