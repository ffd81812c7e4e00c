"""Set torch's allocator for GPUs, before torch is imported."""

import os
import sys
from collections.abc import Mapping
from importlib import metadata

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_allocator() -> None:
    """Set this process's environment; call it before torch is imported."""
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
    return {NAMES[0] if newer else NAMES[1]: "expandable_segments:True"}
