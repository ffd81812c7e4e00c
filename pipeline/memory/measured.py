"""Measure memory, in bytes. What cannot be measured is None and never 0."""

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.common.host import anonymous_bytes, resident_bytes
from pipeline.engine.accelerators import used_indices
from pipeline.models.quantized_experts import held_experts

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other", "buffers")
LOADING_SAMPLE_SEC = 0.01
SAMPLE_SEC = 0.05  # a peak shorter than this can be missed, where the kernel keeps none


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Describe one GPU that this process uses, as it sees it."""

    index: int
    name: str
    total_bytes: int
    allocated_bytes: int  # in tensors
    reserved_bytes: int  # held by torch's allocator, the allocated included
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    outside_bytes: int  # in use, but not by the allocator: other processes, and our own CUDA context


@dataclass(frozen=True, slots=True)
class Peaks:
    """Hold the most memory that was taken at once during a phase."""

    host_bytes: int | None  # resident set
    host_exact: bool  # kept by the kernel; else the largest sample
    anonymous_bytes: int | None  # of it, what is no page of a file: the largest sample, where they were taken
    devices: list[DeviceMemory]


def footprint_bytes(model: PreTrainedModel) -> int:
    """Measure every parameter and buffer as stored, without bitsandbytes' quantization state.

    That is `get_memory_footprint()`, but for torchao's weights, which it takes for as large as they were.
    """
    return sum(tensor_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def tensor_bytes(tensor: Tensor) -> int:
    """Measure a tensor, or those that one of a library's own kind is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def weight_bytes(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Split the footprint: kind (one of KINDS) to stored dtype to bytes.

    4-bit weights are stored as uint8, two in a byte. A head that is tied to the embedding counts there.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    seen: set[int] = set()
    for path, module in model.named_modules():
        kind = kind_of(path, module, head)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[kind][_dtype(parameter)] += tensor_bytes(parameter)
    for buffer in model.buffers():
        found["buffers"][_dtype(buffer)] += buffer.nbytes
    return {kind: dict(found[kind]) for kind in KINDS if kind in found}


def quantization_state_bytes(model: PreTrainedModel) -> int:
    """Measure what is kept beside packed weights: scales, nested scales and code tables.

    `get_memory_footprint()` leaves it out. Tensors that layers share count once.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for module in model.modules()
        for tensor in _quantization_tensors(module)
    }
    return sum(storages.values())


def held_bytes() -> int:
    """Measure what this process holds: what torch has allocated on all GPUs, else its resident set."""
    allocated = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
    return allocated or resident_bytes()


def devices() -> list[DeviceMemory]:
    """List every GPU that this process has had tensors on since its peaks were reset; empty without one."""
    return [_device(module, index) for module in (torch.cuda, torch.xpu) for index in used_indices(module)]


def peak_resident_bytes(pid: int | None = None) -> int | None:
    """Return the kernel's own peak of the resident set, since the process began or it was reset; else None.

    Args:
        pid: of another process than this one.
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def reset_peaks() -> bool:
    """Start all peaks anew; say whether the host's could be."""
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():  # before, the peaks are 0, and it would raise
            for index in range(module.device_count()):
                module.reset_peak_memory_stats(index)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return peak_resident_bytes() is not None


class PeakSampler:
    """Measure the peaks of a phase: `with PeakSampler() as sampler: …; sampler.peaks()`.

    The kernel's own peak is exact; where it cannot be reset, a thread samples the resident set. So it does with
    `apart`, to tell pages of files, which the system can take back, from what has to be free.
    Phases may follow each other but not overlap: a new one resets the peaks of all.
    """

    def __init__(self, sample_sec: float = SAMPLE_SEC, *, apart: bool = False) -> None:
        self.sample_sec = sample_sec
        self._apart = apart
        self._anonymous: int | None = None
        self._exact = False
        self._largest = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._final: Peaks | None = None

    def __enter__(self) -> Self:
        self._exact = reset_peaks()
        if not self._exact or self._apart:
            self._look()
            self._thread = threading.Thread(target=self._sample, name="peak-sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._final = self.peaks()

    def peaks(self) -> Peaks:
        """Return the peaks so far, or those of the whole phase once it has ended."""
        if self._final is not None:
            return self._final
        self._look()
        host = peak_resident_bytes() if self._exact else self._largest
        return Peaks(host, self._exact, self._anonymous, devices())

    def _sample(self) -> None:
        while not self._done.wait(self.sample_sec):
            self._look()

    def _look(self) -> None:
        self._largest = max(self._largest, resident_bytes())
        if self._apart and (now := anonymous_bytes()) is not None:
            self._anonymous = max(self._anonymous or 0, now)


class FamilyPeaks:
    """Measure the peak of a process and those that it started, as PeakSampler does that of this one.

    The kernel's own peaks are added, which need not have come at the same time: with several it is a bound.

    Args:
        gpus: gives what that process says of its GPUs.
    """

    def __init__(self, pid: int, gpus: Callable[[], list[dict[str, Any]]]) -> None:
        self._pid, self._gpus = pid, gpus
        self._final: Peaks | None = None

    def __enter__(self) -> Self:
        for pid in self._family():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._final = self.peaks()

    def peaks(self) -> Peaks:
        """Return the peaks so far, or those of the whole phase once it has ended."""
        if self._final is not None:
            return self._final
        found = [peak for pid in self._family() if (peak := peak_resident_bytes(pid)) is not None]
        told = [DeviceMemory(**gpu) for gpu in self._gpus()]
        return Peaks(sum(found) or None, len(found) == 1, None, told)

    def resident_bytes(self) -> int:
        """Return their resident sets now."""
        return sum(map(resident_bytes, self._family()))

    def _family(self) -> list[int]:
        try:
            return [self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))]
        except psutil.Error:
            return []


def kind_of(path: str, module: nn.Module, head: nn.Module | None) -> str:
    """Name what a module's weights are for: one of KINDS, but for buffers."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module is head:
        return "head"
    if "norm" in type(module).__name__.lower():
        return "norm"
    for part in reversed(path.lower().split(".")):
        if "attn" in part or "attention" in part:
            return "attention"
        if any(word in part for word in ("mlp", "ffn", "feed_forward", "expert")):
            return "mlp"
    return "other"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _quantization_tensors(module: nn.Module) -> Iterator[Tensor]:
    weight = getattr(module, "weight", None)
    yield from _tensors_of(getattr(weight, "quant_state", None))
    # The scales of 8-bit weights move from the weight to the layer's state at the first forward pass.
    for holder in (weight, getattr(module, "state", None)):
        if isinstance(scales := getattr(holder, "SCB", None), Tensor):
            yield scales
    for held in held_experts(module).values():
        for state in held.states:
            yield from _tensors_of(state)


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """Find the tensors of a 4-bit quantization state, and of the nested state of its scales; of 8 bits, the scales."""
    if state is None:
        return
    if isinstance(state, Tensor):
        yield state
    for name in ("absmax", "code", "offset"):
        if isinstance(tensor := getattr(state, name, None), Tensor):
            yield tensor
    yield from _tensors_of(getattr(state, "state2", None))


def _device(module: Any, index: int) -> DeviceMemory:
    """Read a GPU of torch.cuda or torch.xpu. Asking for the free memory opens the GPU, which is in use already."""
    free, total = module.mem_get_info(index)
    reserved = module.memory_reserved(index)
    return DeviceMemory(
        index=index,
        name=module.get_device_name(index),
        total_bytes=total,
        allocated_bytes=module.memory_allocated(index),
        reserved_bytes=reserved,
        peak_allocated_bytes=module.max_memory_allocated(index),
        peak_reserved_bytes=module.max_memory_reserved(index),
        outside_bytes=max(0, total - free - reserved),
    )
