"""List the GPUs as torch sees them.

Only a GPU that the model lies on is asked for its free memory: that opens it, and a context takes 300 to 600 MB
on a card, used or not.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch

from pipeline.common.gpu import Gpu
from pipeline.common.host import host_free_bytes

KINDS = ("cuda", "xpu")  # torch.cuda, which is ROCm too, and torch.xpu have the same functions


def usable_gpus(device_map: Any) -> tuple[Gpu, ...]:
    """List the GPUs that a model with this device map may lie on."""
    return tuple(map(describe, chosen(device_map, visible_devices())))


def model_gpus(model: Any) -> tuple[Gpu, ...]:
    """List the GPUs that a loaded model lies on, in the order of its layers."""
    devices = dict.fromkeys(parameter.device for parameter in model.parameters())
    return tuple(describe(device) for device in devices if device.type not in ("cpu", "meta"))


def visible_devices() -> list[torch.device]:
    """List every GPU that this process could use."""
    found = [torch.device(kind, i) for kind in KINDS for i in range(getattr(torch, kind).device_count())]
    return found or ([torch.device("mps")] if torch.backends.mps.is_available() else [])


def chosen(device_map: Any, visible: Sequence[torch.device]) -> list[torch.device]:
    """Choose the GPUs that a device map leaves: all for `auto` and its kind, else those that it names."""
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return list(visible)
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    return [device for device in visible if any(_names(name, device) for name in named)]


def _names(name: Any, device: torch.device) -> bool:
    """Say whether a name means this device: `0`, "0", "cuda" and "cuda:0" all name the first GPU."""
    kind, _, index = (f"{device.type}:{name}" if str(name).isdigit() else str(name)).partition(":")
    return (kind, int(index or 0)) == (device.type, device.index or 0)


def describe(device: torch.device) -> Gpu:
    """Describe a GPU as its driver does without opening it."""
    if device.type == "mps":
        return Gpu("mps", "Apple GPU", total_bytes=psutil.virtual_memory().total)
    properties = getattr(torch, device.type).get_device_properties(device)
    if device.type == "xpu" or torch.version.hip:
        backend = "rocm" if torch.version.hip else "xpu"
        return Gpu(backend, properties.name, total_bytes=properties.total_memory)
    return Gpu(
        "cuda",
        properties.name,
        total_bytes=properties.total_memory,
        capability=(properties.major, properties.minor),
        uuid=f"{'MIG' if ' MIG ' in properties.name else 'GPU'}-{properties.uuid}",
    )


def free_bytes(device: torch.device) -> int:
    """Measure what a device can still hold. This opens a GPU: ask only of one that is in use."""
    if device.type not in KINDS:
        return host_free_bytes()
    module = getattr(torch, device.type)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def used_indices(module: Any) -> Iterable[int]:
    """List the GPUs of torch.cuda or torch.xpu on which this process has had tensors since peaks were reset."""
    if module.is_initialized():
        yield from (i for i in range(module.device_count()) if module.max_memory_allocated(i))
