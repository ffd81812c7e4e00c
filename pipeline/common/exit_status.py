"""Say how a command ends, in numbers that schedulers and scripts understand."""

import signal
from enum import IntEnum
from typing import Self

KILLED: dict[int, str] = {
    signal.SIGKILL: "killed (SIGKILL): out of memory?",
    signal.SIGSEGV: "crashed (SIGSEGV)",
}


class ExitStatus(IntEnum):
    """How a command ends, and what that means."""

    meaning: str

    DONE = 0, "done"
    SOME_FAILED = 1, "done, but some failed"
    WRONG_CONFIG = 2, "wrong configuration: nothing was started"
    FAILED = 3, "failed; what is written stays"
    STALLED = 4, "no progress (watchdog_sec)"
    RUN_AGAIN = 75, "stopped: run it again"  # EX_TEMPFAIL of sysexits.h

    def __new__(cls, value: int, meaning: str = "") -> Self:
        """Make a number that knows its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    @classmethod
    def meaning_of(cls, status: int) -> str | None:
        """Say what a process's exit status means; None where it is none of these."""
        return next((known.meaning for known in cls if known == status), None)


def ended(status: int) -> str:
    """Say how a process ended; a negative status is the signal that killed it."""
    if status < 0:
        return KILLED.get(-status, f"killed by signal {-status}")
    return ExitStatus.meaning_of(status) or f"exit status {status}"
