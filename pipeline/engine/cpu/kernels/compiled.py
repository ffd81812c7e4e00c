"""Keep what numba compiles by the kernels' sources and by the CPU that it is for.

numba sees a change in a kernel's own file, not in the files that it imports. And processes that compile for different
CPUs at once, as on nodes that share a home, give their files the same names: one would run the other's instructions.
"""

import hashlib
from pathlib import Path

from numba import config
from numba.core.registry import cpu_target

from pipeline.common import terminal
from pipeline.common.cache import cache_folder


def keep_apart() -> None:
    """Point numba to the folder of these sources and this CPU, in its own cache's folder where one is set.

    Where it is not there yet, all of them will be compiled, which is said.

    Where that cannot be written, numba finds another as it always does.
    """
    found = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    folder = Path(config.CACHE_DIR or cache_folder()) / f"kernels-{found.hexdigest()[:16]}"
    if not folder.exists():
        terminal.say("Compiling for this CPU: some 15 seconds, once", style="dim")
    config.CACHE_DIR = str(folder)
