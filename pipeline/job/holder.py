"""Say which process holds a job's folder."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from pipeline.job.paths import read_json

SAME_START_SEC = 2.0  # process ids do not come round that fast


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that writes a job's folder."""

    pid: int
    started_sec: (
        float  # after the machine; tells it from a later process with the same pid, whatever clocks say
    )
    host: str

    @classmethod
    def me(cls) -> Self:
        """Name this process."""
        return cls(os.getpid(), _started_sec(os.getpid()), os.uname().nodename)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read what `write` wrote; None if there is none, or it is damaged."""
        match read_json(path):
            case {"pid": int(pid), "started_sec": int() | float() as started_sec, "host": str(host)} if (
                0 < pid < 2**31 and -(2**31) < started_sec < 2**31
            ):
                return cls(pid, started_sec, host)
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
            return abs(_started_sec(self.pid) - self.started_sec) < SAME_START_SEC
        except psutil.Error:
            return False

    @property
    def age_sec(self) -> float:
        """Say how long it has run on this machine."""
        return time.time() - psutil.boot_time() - self.started_sec

    def __str__(self) -> str:
        if not self.lives_here:
            return f"process {self.pid} on {self.host}"
        since = time.strftime("%F %T", time.localtime(psutil.boot_time() + self.started_sec))
        return f"process {self.pid} on {self.host} (since {since})"


def _started_sec(pid: int) -> float:
    # When the clock is set, the time of the start moves with it, and so does that of the process.
    booted = psutil.boot_time()
    return psutil.Process(pid).create_time() - booted
