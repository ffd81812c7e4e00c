"""Show how far something long is: a bar for people, now and then a line for logs."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.common.terminal import console, say
from pipeline.common.units import gigabytes

LINE_SEC = 30.0  # between two lines where no terminal watches


class Bar:
    """Draw one bar while a `with` lasts, where a terminal watches; elsewhere a line is due now and then."""

    def __init__(self, *columns: str | ProgressColumn) -> None:
        watched = console.is_terminal
        self._bar = Progress(*columns, console=console, disable=not watched, transient=True)
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _say_if_due(self, line: str) -> None:
        now = time.monotonic()
        if not console.is_terminal and now - self._said > LINE_SEC:
            self._said = now
            say(line)


class BytesBar(Bar):
    """Show bytes done and time left.

    Args:
        what: is going on, as "Loading weights".
        total_bytes: 0 where it is not known yet.
    """

    def __init__(self, what: str, total_bytes: int = 0) -> None:
        left = TimeRemainingColumn(), TextColumn("left")
        super().__init__(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), *left)
        self._task = self._bar.add_task(what, total=total_bytes or None)
        self._what = what
        self._total = total_bytes

    def update(self, done_bytes: float, total_bytes: float | None = None) -> None:
        """Show where it stands."""
        self._total = int(total_bytes or self._total)
        self._bar.update(self._task, completed=done_bytes, total=self._total or None)
        self._say_if_due(f"{self._what}: {gigabytes(done_bytes)} of {gigabytes(self._total)}")
