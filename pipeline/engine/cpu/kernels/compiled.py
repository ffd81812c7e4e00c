"""Keep what numba compiles by the kernels' sources and by the CPU that it is for.

numba sees a change in a kernel's own file, not in the files that it imports. And processes that compile for different
CPUs at once, as on nodes that share a home, give their files the same names: one would run the other's instructions.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from numba import config
from numba.core.registry import cpu_target

from pipeline.common import terminal
from pipeline.common.cache import cache_folder


def keep_apart() -> None:
    """Point numba to the folder of these sources and this CPU, in its own cache's folder where one is set.

    Where that cannot be written, numba finds another as it always does.
    """
    found = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    config.CACHE_DIR = str(Path(config.CACHE_DIR or cache_folder()) / f"kernels-{found.hexdigest()[:16]}")


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Say that kernels compile meanwhile, if it is the first time by this name."""
    done = Path(config.CACHE_DIR) / f"{name}.compiled"
    if not done.exists():
        terminal.say("Compiling for this CPU: some 15 seconds, once", style="dim")
    yield
    with suppress(OSError):
        done.touch()
