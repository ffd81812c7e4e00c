"""Write the card of a dataset that a job's answers make: what made them, how, and what it took."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.common.units import megabytes
from pipeline.job.paths import JobPaths
from pipeline.job.shards import combine
from pipeline.job.stored import CONFIG, read_manifest, read_stats, read_yaml


def dataset_card(folder: Path, lines: int) -> str:
    """Write README.md, its first part as the hub reads it.

    Args:
        lines: of the dataset.
    """
    parts = [
        JobPaths(part) for part in ([folder] if JobPaths(folder).stats.exists() else JobPaths(folder).shards)
    ]
    manifest = read_manifest(parts[0]) if parts else {}
    config = read_yaml(parts[0].config, CONFIG) if parts else {}
    stats = combine([found for part in parts if (found := read_stats(part))])
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]
    }
    facts = {
        "model": manifest.get("model"),
        "revision": manifest.get("revision"),
        "quantization": manifest.get("quantization"),
        "engine": _engine(manifest.get("engine") or {}),
        "prompts": manifest.get("prompts"),
        "lines": lines,
        **_figures(stats),
    }
    settings = {f"generation.{name}": value for name, value in (config.get("generation") or {}).items()}
    settings |= {name: config[name] for name in ("system", "prompt_template", "columns") if config.get(name)}
    settings |= {name: config[name] for name in ("examples", "shots") if config.get("examples")}
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Answers of {manifest.get('model') or folder.name}\n\n"
        f"Made by a job of llm-job-pipeline. Each line is one completion, or the error of a row.\n\n"
        f"{_table(facts)}\n## Settings\n\n{_table(settings)}"
    )


def _engine(engine: dict[str, Any]) -> str | None:
    """Name another engine than our own, with its version."""
    name = engine.get("name")
    return (
        None
        if name in (None, "default")
        else f"{name} {(engine.get('versions') or {}).get(name, '')}".strip()
    )


def _figures(stats: dict[str, Any]) -> dict[str, Any]:
    rows, memory = stats.get("rows") or {}, stats.get("memory") or {}
    peak = memory.get("run_peak") or {}
    return {
        "errors": rows.get("errors"),
        "completion tokens a second": stats.get("tokens_per_sec"),
        "weights": (size := memory.get("footprint_bytes")) and megabytes(size),
        "peak of the host's memory": (size := peak.get("host_bytes")) and megabytes(size),
    }


def _table(facts: dict[str, Any]) -> str:
    """Write a table of what is known."""
    lines = [f"| {_cell(name)} | {_cell(value)} |\n" for name, value in facts.items() if value is not None]
    return "".join(["| | |\n|---|---|\n", *lines])


def _cell(value: Any) -> str:
    text = f"{value:.1f}" if isinstance(value, float) and value >= 10 else str(value)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
