"""Keep this process's resident set to what is in use: give back what loading leaves behind.

A checkpoint's file stays mapped as long as one parameter is still a view of it, and glibc keeps freed
blocks for later. Both would count as the model's memory. Linux and glibc; elsewhere nothing is done.
"""

import ctypes
import gc
import logging
from pathlib import Path
from typing import Any

from torch import nn

log = logging.getLogger(__name__)

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
LARGE_BYTES = 1 << 20  # blocks from here on go back to the system when they are freed
EIGHT_BIT_BYTES = 1 << 18  # the same for weights that become 8 bits: a small model's are of this size
GLIBC_BYTES = 1 << 25  # glibc's own bound, which it comes to by itself once a program frees large blocks
WEIGHTS = (".safetensors", ".bin")


def return_large_blocks(size_bytes: int = LARGE_BYTES) -> bool:
    """Have glibc return each block of this size or more when it is freed; say whether it could be told.

    Without this, it takes blocks of up to 32 MiB from its heap, whose holes the system never gets back. But
    each block then costs page faults anew: worth it while loading, and for bitsandbytes' 8-bit products. Of its
    heap's end it keeps twice that size, in glibc's own proportion; without, a prefill faults its pages in again
    and again.
    """
    try:
        libc = _libc()
        return bool(libc.mallopt(MMAP_THRESHOLD, size_bytes) and libc.mallopt(TRIM_THRESHOLD, 2 * size_bytes))
    except (OSError, AttributeError):
        return False


def trim() -> None:
    """Collect garbage, and return glibc's free heap to the system."""
    gc.collect()
    return_heap()


def return_heap() -> None:
    """Return the pages of glibc's free heap to the system, those of its holes too."""
    try:
        _libc().malloc_trim(0)
    except (OSError, AttributeError):
        return


def release_files(model: nn.Module) -> int:
    """Copy what still lies in the checkpoint's mapped files, where that is the smaller part, and unmap them.

    Weights that stay as they are in the file are those very pages: then nothing is copied.

    Returns:
        Bytes copied.
    """
    files = mapped_files()
    mapped = sum(last - first for first, last in files)
    views = [p for p in model.parameters() if any(first <= p.data_ptr() < last for first, last in files)]
    held = sum(p.nbytes for p in views)
    if held * 2 > mapped:
        return 0
    for parameter in views:
        parameter.data = parameter.data.clone()
    trim()
    log.info("%.1f MB copied out of %.1f MB of mapped files", held / 1e6, mapped / 1e6)
    return held


def mapped_files() -> list[tuple[int, int]]:
    """List the addresses [first, last) of this process's mapped weight files."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [_addresses(line) for line in lines if line.endswith(WEIGHTS)]


def _addresses(line: str) -> tuple[int, int]:
    first, _, last = line.split()[0].partition("-")
    return int(first, 16), int(last, 16)


def _libc() -> Any:
    return ctypes.CDLL(None)
