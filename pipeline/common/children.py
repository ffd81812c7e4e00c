"""Start a process that does not outlive this one."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAIL_BYTES = 4096
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def start_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path, **pipes: Any
) -> "subprocess.Popen[bytes]":
    """Start a process in a group of its own: a terminal's ^C reaches this process alone, which hands it on.

    On Linux the system kills it when this process ends, however that ends.

    Args:
        log: gets what it says, after what was said there before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Loaded here: between fork and exec a process does as little as it can.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)

    with log.open("ab") as said:
        return subprocess.Popen(
            command,
            env=environment,
            process_group=0,
            preexec_fn=die_with_parent,
            stderr=said,
            **{"stdin": subprocess.DEVNULL, "stdout": said, **pipes},
        )


def last_lines(log: Path, count: int = 5) -> str:
    """Read the last lines that a process said."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
