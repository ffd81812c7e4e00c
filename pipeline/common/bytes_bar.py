"""Show how many bytes of something long are done: a bar for people, now and then a line for logs."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.common.terminal import console, say
from pipeline.common.units import gigabytes

LINE_SEC = 30.0  # between two lines where no terminal watches


class BytesBar:
    """Show bytes done and time left.

    Args:
        what: is going on, as "Loading weights".
        total_bytes: 0 where it is not known yet.
    """

    def __init__(self, what: str, total_bytes: int = 0) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total_bytes or None)
        self._what = what
        self._total = total_bytes
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done_bytes: float, total_bytes: float | None = None) -> None:
        """Show where it stands."""
        self._total = int(total_bytes or self._total)
        self._bar.update(self._task, completed=done_bytes, total=self._total or None)
        now = time.monotonic()
        if not console.is_terminal and now - self._said > LINE_SEC:
            self._said = now
            say(f"{self._what}: {gigabytes(done_bytes)} of {gigabytes(self._total)}")
