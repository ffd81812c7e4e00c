"""Bring numbers to a device without waiting for it."""

from typing import Any

import torch
from torch import Tensor


def upload(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Bring a list or array of numbers to the device: to a GPU from pinned memory, so that nobody waits."""
    made = torch.as_tensor(numbers, dtype=dtype)
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return made.pin_memory().to(device, non_blocking=True) if pinned else made.to(device, non_blocking=True)
