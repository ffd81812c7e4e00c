"""Read which tensors a checkpoint's files hold, and in which dtypes, without the tensors themselves."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import LoadError
from pipeline.config.schema import ModelConfig
from pipeline.models.checkpoint import Checkpoint, weight_paths

_LONGEST_BYTES = 100 << 20  # as safetensors itself has it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Describe a tensor as it lies in a file of safetensors."""

    name: str
    dtype: str  # as safetensors names it: BF16, F8_E4M3, I32
    shape: tuple[int, ...]
    bytes: int


def read_headers(checkpoint: Checkpoint, model: ModelConfig) -> tuple[StoredTensor, ...] | None:
    """Read the headers of its files, on the hub where they are not here; None where they cannot be had.

    Raises:
        LoadError: a file is damaged.
    """
    files = weight_paths(checkpoint)
    if files and all(file.is_file() for file in files):
        return tuple(tensor for file in files for tensor in _read(file, checkpoint.again))
    if checkpoint.revision is None:
        return None
    from pipeline.models import hub

    found = hub.fetch_headers(model.name, checkpoint.revision)
    try:
        return None if found is None else tuple(_tensor(*entry) for entry in found)
    except (ValueError, TypeError) as error:
        raise LoadError(
            f"{model.name}: a file's header on the hub is damaged ({error})", checkpoint.again
        ) from error


def _read(file: Path, again: str) -> list[StoredTensor]:
    """Read one file's header: its length in 8 bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(opened.read(length))
        left = file.stat().st_size - 8 - length
        if left < max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        ):
            raise ValueError(f"{left:,} bytes of tensors, and more are named")
        return [
            _tensor(name, entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise LoadError(f"{file}: corrupt or cut short ({error})", again) from error


def _tensor(name: str, dtype: str, shape: Any, offsets: Any) -> StoredTensor:
    start, end = offsets
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"{name!r} is {shape} of {dtype!r} at {offsets}"[:200])
    if end < start or math.prod(shape) > 8 * (end - start):  # more numbers than bits
        raise ValueError(f"{name!r} has no room for its shape"[:200])
    return StoredTensor(name, dtype, tuple(shape), end - start)
