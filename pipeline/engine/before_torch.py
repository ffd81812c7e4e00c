"""Set what torch reads once, when it is imported: its allocator for GPUs, and how its threads wait."""

import os
import sys
from collections.abc import Mapping
from importlib import metadata

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# How often libgomp's threads look for work before they sleep: some 30 microseconds. By default it is milliseconds,
# in which a thread that waits for another keeps that very thread from the core, where programs share cores.
SPINS = "1000"
GROWING = "expandable_segments:True"
OWN = {"GOMP_SPINCOUNT": SPINS, **dict.fromkeys(NAMES, GROWING)}  # all that may be set


def set_environment() -> None:
    """Set this process's environment, where the user has not; call it before torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        os.environ.update(allocator_settings(os.environ, sys.platform, metadata.version("torch")))
    except metadata.PackageNotFoundError:
        return


def allocator_settings(environ: Mapping[str, str], platform: str, torch_version: str) -> dict[str, str]:
    """Choose segments that grow, unless the user has chosen: keys and values of ever new sizes leave no holes.

    Only CUDA on Linux has them. Before 2.9, torch knew them by another name.

    Args:
        platform: as sys.platform has it.
        torch_version: as 2.11.0+cu130.
    """
    version, _, build = torch_version.partition("+")
    if platform != "linux" or build.startswith(("cpu", "rocm", "xpu")) or any(n in environ for n in NAMES):
        return {}
    newer = tuple(int(part) for part in version.split(".")[:2]) >= (2, 9)
    return {NAMES[0] if newer else NAMES[1]: GROWING}
