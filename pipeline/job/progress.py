"""Show a job's progress on standard error: a bar for people, now and then a line for logs."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from pipeline.common.bars import Bar
from pipeline.common.host import resident_bytes
from pipeline.common.terminal import console, how_many, visible
from pipeline.common.units import duration, megabytes


class JobProgress(Bar):
    """Show rows done, tokens per second, time left, memory.

    Args:
        total: rows of the job.
        done: rows done before.
    """

    def __init__(self, total: int, done: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows  {task.fields[speed]}"),
            TextColumn("{task.fields[left]} left  {task.fields[memory]}"),
        )
        self._task = self._bar.add_task(
            "Generating", total=total, completed=done, speed="", left="-", memory=""
        )
        self._total, self.before = total, done
        self._started = self._drawn = time.monotonic()
        self._streaming, self._streamed = "", 0

    def update(self, done: int, made: int, unit: str = "tokens", held_bytes: int | None = None) -> None:
        """Show where the job stands.

        Args:
            done: rows.
            made: by this run, of the unit; what it is fast in.
            held_bytes: by all of its processes; None is this one alone.
        """
        now = time.monotonic()
        if now - self._drawn < 0.2:
            return
        self._drawn = now
        speed = f"{made / (now - self._started):,.{0 if unit == 'tokens' else 1}f} {unit}/s"
        memory = megabytes(resident_bytes() if held_bytes is None else held_bytes)
        rows = done - self.before  # of this run: only these say how long it takes
        left = duration((self._total - done) * (now - self._started) / rows if rows else None)
        self._bar.update(self._task, completed=done, speed=speed, left=left, memory=memory)
        self._say_if_due(f"{done:,} of {how_many(self._total, 'row')}, {speed}, {left} left, {memory}")

    def stream(self, request_id: str, text: str) -> None:
        """Show what is new of one row's text; the row that is shown is the first one seen."""
        self._streaming = self._streaming or request_id
        ready = text.rstrip("\ufffd")  # a character whose tokens are not all there yet
        if request_id == self._streaming and len(ready) > self._streamed:
            console.print(visible(ready[self._streamed :]), end="", markup=False, soft_wrap=True)
            self._streamed = len(ready)
