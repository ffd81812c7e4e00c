"""Note memory and progress over time, in a few hundred points however long the job."""

import time

from pipeline.memory.measured import held_bytes

MAX_POINTS = 400


class Timeline:
    """Keep points of [seconds since it was made, bytes, completion tokens so far].

    Bytes are what torch has allocated on all GPUs, else the resident set.
    """

    def __init__(self) -> None:
        self.held_bytes = held_bytes  # or what another process holds
        self.points: list[list[float]] = []
        self._started = time.monotonic()
        self._every_sec = 0.1
        self.sample(0)

    def sample(self, completion_tokens: int) -> None:
        """Note where the job stands, unless it is too soon; when the list is full, every second point goes."""
        now = time.monotonic() - self._started
        if self.points and now - self.points[-1][0] < self._every_sec:
            return
        self.points.append([round(now, 2), self.held_bytes(), completion_tokens])
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]
            self._every_sec *= 2
