"""End a process that makes no progress, so that a scheduler can start it again."""

import faulthandler
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipeline.common import terminal
from pipeline.common.exit_status import ExitStatus

log = logging.getLogger(__name__)

LAST_WORDS_SEC = 20.0  # a dead disk must not keep the process from ending


class Watchdog:
    """Wait for a beat at every step: `with Watchdog(600, folder.sync) as watchdog: watchdog.beat("step 3")`.

    It counts its own ticks and not the clock, so that a process which is suspended for an hour and woken
    again has not stalled.

    Args:
        limit_sec: without a beat for so long, the process ends with status 4. None watches nothing.
        flush: brings what is written to the disk.
    """

    def __init__(self, limit_sec: float | None, flush: Callable[[], None]) -> None:
        self._limit_sec = limit_sec
        self._flush = flush
        self._idle_sec = 0.0
        self._where = "the first step"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit_sec is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def beat(self, where: str) -> None:
        """Note that there was progress; `where` is what a message would say."""
        self._where, self._idle_sec = where, 0.0

    def _watch(self) -> None:
        assert self._limit_sec is not None
        tick_sec = min(1.0, self._limit_sec / 4)
        while not self._done.wait(tick_sec):
            self._idle_sec += tick_sec
            if self._idle_sec > self._limit_sec:
                # Each by itself: the terminal or the disk may be what hangs.
                words = [threading.Thread(target=do, daemon=True) for do in (self._tell, self._note)]
                for one in words:
                    one.start()
                for one in words:
                    one.join(LAST_WORDS_SEC)
                os._exit(ExitStatus.STALLED)

    def _tell(self) -> None:
        terminal.say(self._message(), style="red")
        sys.stderr.flush()

    def _note(self) -> None:
        log.error("%s\n%s", self._message(), _stacks())
        self._flush()

    def _message(self) -> str:
        return (
            f"No progress for {self._limit_sec:g} s after {self._where}. What was written stays valid; the same "
            "command goes on from there. The log has every thread's place; watchdog_sec=… sets the time."
        )


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "replace")
