"""Measure joules, by the counters of the cards or of the processor packages; None where none can be read."""

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

POWERCAP = Path("/sys/class/powercap")  # RAPL as Linux shows it, AMD's too
SAMPLE_SEC = 10.0
MOST_WATTS = 2_000  # of a package: the smallest range, 65 kJ, then lasts for three samples


class Reading(NamedTuple):
    """Hold a counter in microjoules, and where it starts again from 0."""

    energy_uj: int
    range_uj: int


class EnergyMeter:
    """Measure the joules of a phase: `with EnergyMeter(gpu_uuids) as meter: …; meter.joules`.

    Args:
        gpu_uuids: the cards to read; without any the processor packages are read.
    """

    def __init__(
        self, gpu_uuids: Sequence[str], powercap: Path = POWERCAP, sample_sec: float = SAMPLE_SEC
    ) -> None:
        self.source = "nvml" if gpu_uuids else "rapl"
        self.sample_sec = sample_sec
        self._read = partial(read_cards, gpu_uuids) if gpu_uuids else partial(read_packages, powercap)
        self._spent: float | None = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy-meter", daemon=True)

    @property
    def joules(self) -> float | None:
        """Say how many there were until the last sample; none in so short a time that no counter moved."""
        return self._spent or None

    def __enter__(self) -> Self:
        self._last, self._last_sec = self._read(), time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        # A package's counter goes round in minutes; the cards' never do.
        while self.source == "rapl" and self._last and not self._done.wait(self.sample_sec):
            self._sample()

    def _sample(self) -> None:
        before, before_sec = self._last, self._last_sec
        self._last, self._last_sec = self._read(), time.monotonic()
        joules = joules_between(before, self._last, self._last_sec - before_sec)
        self._spent = None if self._spent is None or joules is None else self._spent + joules


def joules_between(
    before: Sequence[Reading] | None, after: Sequence[Reading] | None, elapsed_sec: float
) -> float | None:
    """Add up what the counters moved; None where one may have gone round unseen, as while a job was suspended."""
    most_uj = MOST_WATTS * elapsed_sec * 1e6
    if not before or not after or len(before) != len(after):
        return None
    if any(counter.range_uj <= most_uj for counter in before):
        return None
    moved = ((b.energy_uj - a.energy_uj) % a.range_uj for a, b in zip(before, after, strict=True))
    return sum(moved) / 1e6


def read_packages(powercap: Path) -> list[Reading] | None:
    """Read every processor package; None if one cannot be read, as by anyone but root.

    The other domains are parts of a package (core, uncore), or hold one (psys): they would count twice.
    """
    try:
        return [
            Reading(*(int((domain / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")))
            for domain in sorted(powercap.glob("intel-rapl:*"))
            if (domain / "name").read_text().startswith("package")
        ]
    except (OSError, ValueError):
        return None


def read_cards(uuids: Sequence[str]) -> list[Reading] | None:
    """Read these cards; None if one has no counter of its own, or without NVIDIA's driver or nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            if any(_is_split(handle, pynvml) for handle in handles):
                return None
            # 64 bits of millijoules: they never go round.
            return [
                Reading(1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1000 << 64)
                for handle in handles
            ]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _is_split(card: Any, pynvml: Any) -> bool:
    """Say whether a card is in MIG mode: its counter is of all its slices."""
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(card)[0])
    except pynvml.NVMLError_NotSupported:
        return False


def energy_stats(joules: float | None, source: str, completion_tokens: int) -> dict[str, Any]:
    """Give plain data for stats.json; null is unknown."""
    return {
        "joules": joules,
        "joules_per_1000_tokens": 1000 * joules / completion_tokens if joules and completion_tokens else None,
        "source": source if joules else None,
    }


def merge_energy(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the energy of all shards, from their stats.json: unknown if it is unknown of one."""
    parts = [shard.get("energy") or {} for shard in shards]
    known = [part["joules"] for part in parts if part.get("joules") is not None]
    tokens = sum(shard.get("completion_tokens") or 0 for shard in shards)
    sources = sorted({str(part.get("source")) for part in parts})
    return energy_stats(sum(known) if len(known) == len(parts) else None, " + ".join(sources), tokens)
