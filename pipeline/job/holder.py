"""Say which process holds a job's folder."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from pipeline.job.paths import read_json

SAME_START_SEC = 2.0  # the system's clock is set now and then; process ids do not come round that fast


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that writes a job's folder."""

    pid: int
    started: float  # tells it from a later process with the same pid
    host: str

    @classmethod
    def me(cls) -> Self:
        """Name this process."""
        return cls(os.getpid(), psutil.Process().create_time(), os.uname().nodename)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read what `write` wrote; None if there is none, or it is damaged."""
        match read_json(path):
            case {"pid": int(pid), "started": int() | float() as started, "host": str(host)}:
                return cls(pid, started, host)
        return None

    def write(self, path: Path) -> None:
        """Leave word of it."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @property
    def lives_here(self) -> bool:
        """Say whether it runs on this machine, still; of another machine's nothing can be said."""
        if self.host != os.uname().nodename:
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < SAME_START_SEC
        except psutil.Error:
            return False

    def __str__(self) -> str:
        since = time.strftime("%F %T", time.localtime(self.started))
        return f"process {self.pid} on {self.host} (since {since})"
