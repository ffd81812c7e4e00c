"""Say what memory a cell needs at least, and warn before one is queued that cannot fit."""

from pipeline.common.gpu import Gpu
from pipeline.common.units import GIB, parse_bytes
from pipeline.config.schema import Config, SubmitConfig
from pipeline.memory.facts import find_facts
from pipeline.memory.peaks import load_peak
from pipeline.memory.plan import footprint_bytes, kv_bytes_per_token, quant_state_bytes

PYTHON_BYTES = GIB  # resident before any weight: Python, torch and transformers, rounded up


def needed_bytes(config: Config, gpus: int) -> int:
    """Add up the least memory that a cell can run in: its weights as it loads them, and one row.

    It is that of the GPUs together, or without one that of the host.

    Raises:
        ConfigError: the memory plan does not know the model.
    """
    cards = (Gpu("cuda", "a GPU of the cluster"),) * gpus
    arch, quant, _ = find_facts(config.model, config.models_dir).loaded(config.quant, cards)
    row = sum(kv_bytes_per_token(arch, quant).values()) * config.generation.max_new_tokens
    weights = footprint_bytes(arch, quant) + quant_state_bytes(arch, quant)  # may be only mapped by the load
    return max(load_peak(arch, quant, gpus=cards).needed, weights) + row + (0 if gpus else PYTHON_BYTES)


def memory_warning(name: str, need: int, submit: SubmitConfig) -> str | None:
    """Say what is to be said before a cell is queued that cannot fit; None if it can."""
    asked = submit.gpu_memory if submit.gpus else submit.memory
    if asked is None:
        return None
    if need <= parse_size(asked) * (submit.cell_gpus or 1):
        return None
    where = f"{submit.cell_gpus} × submit.gpu_memory={asked}" if submit.gpus else f"submit.memory={asked}"
    return (
        f"{name}: needs at least {need / GIB:.1f} GiB, and {where} is less. "
        "Ask for more, or choose a smaller quantization (quant=nf4) or model."
    )


def parse_size(text: str) -> int:
    """Read a size as Slurm writes it, 32G; a bare number is MiB."""
    return parse_bytes(f"{text}M" if text.isdecimal() else text)
