"""Handle signals that ask a job to stop: it finishes its step, writes what is done, and ends."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# A terminal that closes sends SIGHUP, schedulers the last two.
ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal came where there was nothing to finish. Not an Exception: no library may catch it."""


class Interrupt:
    """`with Interrupt() as interrupt: …`: a signal raises Stopped, but after `hold()` it is only noted.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._forward: Callable[[int], None] | None = None

    def __enter__(self) -> Self:
        for number in ASKS_TO_STOP:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: it is to outlive its terminal
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self, forward: Callable[[int], None] | None = None) -> None:
        """Only note a signal from here on: there is work to finish, which looks at `signal` by itself.

        Args:
            forward: told of every signal, for a child process that has to stop first.
        """
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
        if not self._held:
            raise Stopped
