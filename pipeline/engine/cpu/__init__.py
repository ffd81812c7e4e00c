"""Make the engine fast on a CPU in bf16 and float32. Without this everything runs, slower; no GPU uses it."""

import functools
import logging
from types import ModuleType

log = logging.getLogger(__name__)


@functools.cache
def load_kernels() -> ModuleType | None:
    """Import the kernels' operators; None where numba or the threads they need are not to be had."""
    try:
        from pipeline.engine.cpu.kernels import operators
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: numba has nowhere to cache
        log.info("Without the CPU's kernels: %s", error)
        return None
    return operators


@functools.cache
def onednn_has_bf16() -> bool:
    """Say whether oneDNN multiplies in bf16 on this CPU, else torch's own loops do: with AVX2, 20 times slower."""
    import torch

    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
