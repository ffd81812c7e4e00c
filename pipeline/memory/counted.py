"""Count the model of a config.json that has no formula here, without its weights and without torch in this process.

A process of its own builds the model on torch's meta device (counting.py), which takes a few seconds; what it found
is kept in the user's cache folder, by the config and the versions that made it.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.cache import cache_folder
from pipeline.common.errors import ConfigError
from pipeline.common.packages import is_installed
from pipeline.config.quant import ELEMENT_BYTES
from pipeline.memory.architecture import MEASURE, Architecture, Counted, Weight, has_formula

FORMAT = 4  # of what is kept: one more whenever its meaning changes
LIMIT_SEC = 120  # a hundred times the time of the largest model, and a slow disk's time to import torch
COMMAND = ("-m", "pipeline.memory.counting")
_VERSIONS = ("transformers", "torch", "bitsandbytes")
_ROOT = Path(__file__).resolve().parents[2]
# No GPU is opened, no file fetched, and threads take no memory of their own.
_QUIET = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Read a config by the formula of its family, or count what its model holds.

    Raises:
        ConfigError: it is wrong, or transformers can make no model of it.
    """
    return Architecture.read(config) if has_formula(config) else count_architecture(config)


def count_architecture(config: Mapping[str, Any]) -> Architecture:
    """Count what this config's model holds.

    Raises:
        ConfigError: transformers can make no model of it, or not in bounded time and memory.
    """
    return _counted(json.dumps(config, sort_keys=True))


@cache
def _counted(config: str) -> Architecture:
    kept = cache_folder() / "architectures" / f"{_digest(config)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none is kept, or it is damaged
        return read_answer(json.loads(kept.read_text(encoding="utf-8")))
    answer = _ask(config)
    try:
        found = read_answer(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the model of this config cannot be counted ({error})", MEASURE) from error
    _keep(kept, answer)
    return found


def _digest(config: str) -> str:
    """Name a config, and all that decides what is counted in it."""
    versions = [metadata.version(name) if is_installed(name) else "" for name in _VERSIONS]
    return hashlib.sha256(json.dumps([FORMAT, versions, config]).encode()).hexdigest()[:32]


def _keep(path: Path, answer: dict[str, Any]) -> None:
    """Keep an answer in one move, where the folder can be written."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(answer), encoding="utf-8")
        fresh.replace(path)


def _ask(config: str) -> dict[str, Any]:
    """Ask a process that may import torch.

    Raises:
        ConfigError: it found why it cannot be, took too long or too much, or broke down.
    """
    terminal.say(
        "Counting the weights of this architecture from its config: a few seconds, once", style="dim"
    )
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, *COMMAND],
            input=config,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SEC,
            env={**os.environ, **_QUIET, "PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired as error:
        found = f"the model of this config was not made within {LIMIT_SEC} s, even without its weights"
        raise ConfigError(found, "Correct its sizes, or copy it again") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise ConfigError(
            f"the model of this config cannot be made on the meta device: {last}", MEASURE
        ) from error
    if "error" in answer:
        raise ConfigError(*answer["error"])
    return dict(answer)


def read_answer(answer: Mapping[str, Any]) -> Architecture:
    """Read what counting.py wrote."""
    sizes = dict(answer)
    if sizes["dtype"] not in ELEMENT_BYTES:
        known = ", ".join(ELEMENT_BYTES)
        raise ConfigError(f"dtype={sizes['dtype']}: the memory plan knows {known}", MEASURE)
    weights = tuple(
        Weight(**{**weight, "shape": tuple(weight["shape"]), "wide_in": tuple(weight["wide_in"])})
        for weight in sizes.pop("weights")
    )
    for key in ("windows", "layer_keys", "layer_states", "layer_state_bytes", "pass_bytes"):
        sizes[key] = tuple(sizes[key])
    counted = Counted(weights, sizes.pop("note"), sizes.pop("refused"))
    return Architecture(
        **sizes,
        num_hidden_layers=len(sizes["windows"]),
        counted=counted,
    )
