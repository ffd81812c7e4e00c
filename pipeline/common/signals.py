"""Handle signals that ask a job to stop: it finishes its step, writes what is done, and ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, Self

# A terminal that closes sends SIGHUP, schedulers the last two.
ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

LATER_SEC = 0.02  # of the processor: when an import that a signal met is looked at again
RENDER_SEC = 10.0  # for one row through a chat template; real ones take milliseconds


class Stopped(BaseException):
    """A signal came where there was nothing to finish. Not an Exception: hardly a library catches it."""


class Interrupt:
    """`with Interrupt() as interrupt: …`: a signal raises Stopped, but after `hold()` it is only noted.

    Within an import it waits for the end of that: C++ ends the process if Python raises where it was called back, and
    some libraries catch whatever comes and import something else. Whatever one makes of a Stopped that it catches,
    out of the block comes Stopped. A second SIGINT ends the process at once.
    """

    _waiting: ClassVar[signal.Signals | None] = None  # what came to whichever block, and has not ended it

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._held = self._raised = False
        self._forward: Callable[[int], None] | None = None

    def __enter__(self) -> Self:
        for number in ASKS_TO_STOP:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: it is to outlive its terminal
            self._before[number] = signal.signal(number, self._note)
        self._before[signal.SIGVTALRM] = signal.signal(signal.SIGVTALRM, self._stop)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        Interrupt._waiting = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._raised and isinstance(error, Exception):
            raise Stopped from error

    def hold(self, forward: Callable[[int], None] | None = None) -> None:
        """Only note a signal from here on: there is work to finish, which looks at `signal` by itself.

        Args:
            forward: told of every signal, for a child process that has to stop first.

        Raises:
            Stopped: one came just before, within an import or to be caught by a library.
        """
        self._stop(0, None)
        self._held, self._forward = True, forward

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT == self.signal
        self.signal = signal.Signals(number)
        if self._forward is not None:
            self._forward(number)
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one needs no Python to take effect
        if again:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._stop(number, frame)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        asked = self.signal or Interrupt._waiting
        if self._held or asked is None:
            return
        Interrupt._waiting = asked
        if _importing(frame):
            signal.setitimer(signal.ITIMER_VIRTUAL, LATER_SEC)
            return
        self.signal, self._raised = asked, True
        raise Stopped


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


class TookTooLong(Exception):
    """A block under `time_limit` was not done in time."""


@contextmanager
def time_limit(limit_sec: float) -> Iterator[None]:
    """Raise TookTooLong inside the block after so long; only in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, end)
    # Again each second: an exception that is raised while an object is collected is lost.
    left_sec, interval_sec = signal.setitimer(signal.ITIMER_REAL, limit_sec, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_sec, interval_sec)
        signal.signal(signal.SIGALRM, before)
