"""Put jobs together that differ in their seed alone: it says how much of a figure is chance."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.units import GIB
from pipeline.report.summary import BEST, Record, cells

ALIKE = ("model", "quant", "prompts", "system", "prompt_template", "columns", "examples", "shots", "limit")
OF_THE_MACHINE = {"tokens_per_sec", "load_sec", "joules_per_1000_tokens", "peak_bytes"}


@dataclass(frozen=True, slots=True)
class Repeated:
    """Hold jobs that are alike but for their seeds, and of each figure that all have, mean and deviation."""

    label: str
    records: list[Record]
    figures: dict[str, tuple[float, float]]  # the standard deviation over the seeds

    def plain(self) -> dict[str, Any]:
        """Give plain data for report.json."""
        figures = {name: {"mean": mean, "deviation": spread} for name, (mean, spread) in self.figures.items()}
        return {
            "label": self.label,
            "jobs": [record["label"] for record in self.records],
            "figures": figures,
        }


def repeated(records: Sequence[Record]) -> list[Repeated]:
    """Find the jobs that are done and were repeated with another seed."""
    groups: dict[str, dict[int, Record]] = {}  # a job that lies in two folders counts once
    for record in records:
        seed = seed_of(record["setup"]["config"])
        if record["state"] == "done" and seed is not None:
            groups.setdefault(_all_but_seed(record), {}).setdefault(seed, record)
    return [_repeated([*group.values()]) for group in groups.values() if len(group) > 1]


def seed_of(config: dict[str, Any]) -> int | None:
    """Read a job's seed; None where its config does not say."""
    seed: int | None = (config.get("generation") or {}).get("seed")
    return seed


def _all_but_seed(record: Record) -> str:
    config = record["setup"]["config"]
    generation = {key: value for key, value in config["generation"].items() if key != "seed"}
    named = [record[name] for name in ("model", "quant", "generation", "engine", "prompt_set")]
    return json.dumps(
        [named, generation, record["rows"]["total"], [config.get(key) for key in ALIKE]],
        sort_keys=True,
        default=str,
    )


def _repeated(group: list[Record]) -> Repeated:
    table, figures = [cells(record) for record in group], {}
    left_out = set() if _measured_alike(group) else OF_THE_MACHINE
    for name in (name for name in BEST if name not in left_out):
        values = [value for row in table if (value := row[name]) is not None]
        if len(values) == len(group):
            figures[name] = statistics.fmean(values), statistics.stdev(values)
    label = group[0]["label"]
    return Repeated(f"{label.rpartition(' · ')[0] or label} · {len(group)} seeds", group, figures)


def _measured_alike(group: list[Record]) -> bool:
    """Say whether jobs ran on machines of one kind, each all of its rows in one go: else no deviation is chance."""
    machines = [record["setup"]["manifest"].get("device") or {} for record in group]
    kinds = [
        {**machine, "memory_bytes": round((machine.get("memory_bytes") or 0) / GIB)} for machine in machines
    ]
    return kinds.count(kinds[0]) == len(kinds) and not any(record["rows"]["done_before"] for record in group)
