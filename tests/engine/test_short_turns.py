"""A job's threads take short turns on a core that others want too."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.short_turns import SYSTEM_CALLS, TURN_NS, SchedAttr, take_short_turns

ROOT = Path(__file__).resolve().parents[2]
ON_LINUX = sys.platform == "linux" and os.uname().machine in SYSTEM_CALLS


def in_a_process(code: str, *before: str) -> str:
    """Run code in a Python of its own, whose turns are the system's until it asks."""
    command = [*before, sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def turn_of_this_thread() -> tuple[int, int]:
    """Ask Linux for the length of this thread's turns and its nice value."""
    attributes = SchedAttr()
    call = SYSTEM_CALLS[os.uname().machine][0]
    assert ctypes.CDLL(None).syscall(call, 0, ctypes.byref(attributes), ctypes.sizeof(attributes), 0) == 0
    return attributes.runtime, attributes.nice


ASK = "from tests.engine.test_short_turns import *; print(take_short_turns(), *turn_of_this_thread())"


@pytest.mark.skipif(not ON_LINUX, reason="only Linux gives turns on request")
def test_turns_become_short_and_the_nice_value_stays():
    taken, turn_ns, nice = in_a_process(ASK, "nice", "-n", "5").split()
    assert (taken, int(nice)) == ("True", os.nice(0) + 5)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert int(turn_ns) == TURN_NS or release < (6, 12)


@pytest.mark.skipif(not ON_LINUX, reason="only Linux gives turns on request")
def test_a_process_without_turns_keeps_its_policy():
    code = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); " + ASK
    assert in_a_process(code + "; print(os.sched_getscheduler(0) == os.SCHED_IDLE)").split()[::3] == [
        "False",
        "True",
    ]


def test_where_it_is_not_known_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not take_short_turns()
