"""Start vLLM's process, and talk to it in lines of JSON."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipeline.common.children import last_lines, start_child
from pipeline.common.errors import JobError
from pipeline.common.exit_status import ended
from pipeline.engine.before_torch import OWN
from pipeline.engine.vllm.python import find_python

WORKER = Path(__file__).with_name("worker.py")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker steps the engine itself
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a folder
}
PATIENCE_SEC = 5.0


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Make the process's environment from our own: vLLM's threads wait as it wants, and are bound to no core
    where OMP_NUM_THREADS says how many there may be.
    """
    found = {name: value for name, value in own.items() if OWN.get(name) != value} | SETTINGS
    if "OMP_NUM_THREADS" in found:
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return found


class VllmProcess:
    """Hold the process that runs worker.py in the Python where vLLM is.

    Args:
        python: that Python; None is that of make vllm, or this one.
        log: gets all that it says.

    Raises:
        ConfigError: there is none.
        JobError: it cannot be started.
    """

    def __init__(self, python: str | None, log: Path) -> None:
        self.python = python = find_python(python)
        command = [python, "-I", str(WORKER)]  # -I: no PYTHONPATH, which is for another Python
        self.log = log
        self.gpus: list[dict[str, Any]] = []  # as it last told of them
        try:
            self._process = start_child(
                command, environment(os.environ), log, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except OSError as error:
            raise JobError(
                found=f"engine.python={python}: cannot be started: {error.strerror}",
                fix="Name the Python of an environment that has vLLM, or run make vllm",
            ) from error

        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """Name the process."""
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            JobError: the process has died.
        """
        try:
            self._input.write(json.dumps(message).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            self._raise_dead()

    def receive(self) -> dict[str, Any]:
        """Wait for a line.

        Raises:
            JobError: the process has died, or cannot go on.
        """
        try:
            message: dict[str, Any] = json.loads(self._output.readline())
        except ValueError:
            self._raise_dead()
        if failed := message.get("failed"):
            self.close()
            raise JobError(
                found=f"vLLM cannot go on: {' '.join(str(failed).split())[:1000]}",
                fix=f"Mend what it says, or use engine=default. {self.log} has all that it said",
            )
        for told in (message.get("ready"), message.get("progress")):
            if told is not None:
                self.gpus = told["gpus"]
        return message

    def expect(self, name: str) -> dict[str, Any]:
        """Wait for one kind of message, and return what it holds.

        Raises:
            JobError: as `receive`, or another comes: this is not worker.py.
        """
        found = self.receive().get(name)
        if not isinstance(found, dict):
            self._raise_dead()
        return found

    def close(self) -> None:
        """End the process, and those that it started."""
        if self._output.closed:
            return
        with contextlib.suppress(OSError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_SEC)
        with contextlib.suppress(OSError):  # there is none left
            os.killpg(self._process.pid, signal.SIGKILL)  # its group: a GPU's part that outlived it, too
        self._process.wait()
        self._output.close()

    def _raise_dead(self) -> NoReturn:
        self.close()
        status = self._process.returncode
        how = ended(status) if status < 0 else f"exit status {status}"
        raise JobError(
            found=f"vLLM's process has ended ({how}); it said last:\n{last_lines(self.log)}",
            fix=f"What was written stays valid, and the same command goes on. {self.log} has all that it said",
        )
