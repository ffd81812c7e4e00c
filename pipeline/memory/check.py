"""Refuse a job on the CPU that this machine's memory cannot hold, before a weight is read."""

import logging
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import ConfigError, LoadError
from pipeline.common.host import host_free_bytes
from pipeline.common.units import megabytes
from pipeline.config.quant import SUGGESTED
from pipeline.config.schema import Config, MemoryCheck
from pipeline.memory.devices import Device, visible_gpus
from pipeline.memory.facts import Facts, find_facts
from pipeline.memory.fit import Settings, Workload, best_choice, need
from pipeline.memory.peaks import load_peak
from pipeline.prompts.lengths import PromptLengths

log = logging.getLogger(__name__)

ONE_TOKEN = PromptLengths("a row of one token", 1, 0, 0, ((1, 1),), copies_logits=False)


def check_memory(config: Config) -> None:
    """Compare the least that this job takes with what is free.

    Raises:
        LoadError: it is more, and memory_check=refuse.
    """
    model = config.model
    # A GPU counts even if nothing of it can be read: its memory is not the host's.
    if model.max_memory or (visible_gpus() and not _only_cpu(model.device_map)):
        return
    try:
        facts = find_facts(model, config.models_dir)
    except ConfigError as error:
        log.info("The job's memory is not predicted: %s", error)
        return
    refusal = _refusal(config, facts, host_free_bytes())
    if refusal is None:
        return
    found, fix = refusal
    if config.memory_check is MemoryCheck.refuse:
        raise LoadError(found, f"{fix} Pass memory_check=warn to try all the same")
    terminal.say(f"Warning: {found}. {fix}", style="yellow")


def _only_cpu(device_map: Any) -> bool:
    return set(device_map.values() if isinstance(device_map, dict) else [device_map]) == {"cpu"}


def _refusal(config: Config, facts: Facts, free_bytes: int) -> tuple[str, str] | None:
    """Say why the model with one row of one token does not fit, and what would; None if it does."""
    settings = Settings(1.0, config.engine.prefill_tokens, 1, None, config.engine.pack_weights)
    workload = Workload(facts.name, facts, ONE_TOKEN, Device("the CPU", (), free_bytes, 0), settings)
    loaded, quant, _ = workload.loaded(config.quant)
    loading = load_peak(loaded.facts.architecture, quant, gpus=(), packed=settings.pack_weights)
    runs = need(loaded, quant, 1).total_bytes
    if max(loading.needed, runs) <= free_bytes:
        return None
    best = best_choice(workload, SUGGESTED, lambda: [])
    instead = (
        f"quant={best.quant} would fit" if best else "No quantization of it would fit: take a smaller model"
    )
    return (
        f"{facts.name}: loading it takes {loading.words} and running one row at least {megabytes(runs)}, "
        f"and {megabytes(free_bytes)} of this machine's memory are free",
        f"{instead}; `python -m pipeline plan` with the same arguments shows what takes how much.",
    )
