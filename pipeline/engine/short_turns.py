"""Ask Linux for short turns on a core that other programs want too.

Threads that work on one step wait for each other many times. Where each core has other programs as well, each such
wait lasts until somebody else's turn is over, some 3 ms. A thread whose own turns are short is let in at once when it
wakes, and gets no more of the core than before: see "EEVDF Scheduler" and sched_attr's `sched_runtime` in Linux's
documentation. Since Linux 6.12; older ones accept the request and change nothing.
"""

import ctypes
import os
import sys

TURN_NS = 100_000  # the shortest that Linux gives
SYSTEM_CALLS = {"x86_64": (315, 314), "aarch64": (275, 274)}  # sched_getattr and sched_setattr
SHARED = (0, 3)  # SCHED_OTHER and SCHED_BATCH: the policies under which turns are taken


class SchedAttr(ctypes.Structure):
    """Linux's `struct sched_attr` in its first version, which every kernel takes."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_short_turns() -> bool:
    """Ask for short turns of this thread and of all that it starts; say whether the system took it.

    Its policy and its nice value stay as they are.
    """
    calls = SYSTEM_CALLS.get(os.uname().machine) if sys.platform == "linux" else None
    if calls is None:
        return False
    system_call, attributes = ctypes.CDLL(None).syscall, SchedAttr()
    size = ctypes.sizeof(attributes)
    if system_call(calls[0], 0, ctypes.byref(attributes), size, 0) or attributes.policy not in SHARED:
        return False  # also where a container's rules forbid the question
    attributes.runtime = TURN_NS
    return not system_call(calls[1], 0, ctypes.byref(attributes), 0)
