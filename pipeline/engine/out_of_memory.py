"""Tell a full memory from other errors."""

import torch

# What CUDA, the CPU allocator, C++, the system, oneDNN and cuBLAS say in a plain RuntimeError.
_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "cannot allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, on a device or on the host."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in text for s in _SAYINGS)
