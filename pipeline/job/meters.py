"""Measure a run: its time, the peaks of its memory, its energy, and what others took of the processors."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeline.common.processors import OthersWork
from pipeline.engine.stats import EngineStats
from pipeline.job.energy import EnergyMeter
from pipeline.job.manifest import gpu_uuids
from pipeline.job.ready import Ready
from pipeline.job.vllm_ready import VllmReady
from pipeline.memory.measured import FamilyPeaks, Peaks, PeakSampler


@dataclass(frozen=True, slots=True)
class Taken:
    """Hold what was measured of a run, from the first row to the last."""

    engine: EngineStats
    run_sec: float
    peaks: Peaks
    joules: float | None
    energy_source: str
    others_mean_cores: float


class Meters:
    """Measure while a `with` lasts."""

    def __init__(self, ready: Ready) -> None:
        self._helper = ready.helper
        if isinstance(ready, VllmReady):
            process = ready.process
            self._peaks: PeakSampler | FamilyPeaks = FamilyPeaks(process.pid, lambda: process.gpus)
            self._energy = EnergyMeter([gpu.uuid for gpu in ready.gpus if gpu.uuid])
        else:
            self._peaks, self._energy = PeakSampler(), EnergyMeter(gpu_uuids(ready.model))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._peaks)
            stack.enter_context(self._energy)
            self._stack = stack.pop_all()
        self._others, self._started = OthersWork(self._helper), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run_sec, self._cores = time.perf_counter() - self._started, self._others.busy_cores()
        self._stack.__exit__(kind, error, trace)

    def taken(self, engine: EngineStats) -> Taken:
        """Give all that was measured."""
        energy = self._energy
        return Taken(engine, self._run_sec, self._peaks.peaks(), energy.joules, energy.source, self._cores)
