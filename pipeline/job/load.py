"""Load a job's model, and measure what that takes."""

import logging
from typing import Any

from torch import get_num_threads

from pipeline.common import terminal
from pipeline.common.processors import OthersWork, say_if_crowded
from pipeline.config.schema import Config, EngineName
from pipeline.engine.cpu.packing import multiplies_as_bitsandbytes_in_8_bits, pack_weights
from pipeline.engine.host_memory import (
    EIGHT_BIT_BYTES,
    GLIBC_BYTES,
    LARGE_BYTES,
    release_files,
    return_large_blocks,
    trim,
)
from pipeline.engine.paged.replaced import replace_products
from pipeline.job.paths import JobPaths
from pipeline.job.ready import Ready
from pipeline.job.vllm import load_vllm
from pipeline.memory.measured import (
    LOADING_SAMPLE_SEC,
    PeakSampler,
    footprint_bytes,
    quantization_state_bytes,
    weight_bytes,
)
from pipeline.models.loading import Loaded, load_model
from pipeline.models.quantized_experts import count_parameters

log = logging.getLogger(__name__)


def load(config: Config, prompts: str, results: JobPaths) -> Ready:
    """Load the model, here or in vLLM's process, and say where other programs have the cores meanwhile.

    Args:
        prompts: the prompt file.

    Raises:
        PipelineError: it cannot be loaded.
    """
    others = OthersWork()
    by_vllm = config.engine.name is EngineName.vllm
    ready = load_vllm(config, prompts, results.engine_log) if by_vllm else _load_here(config)
    others.helper = ready.helper
    if not ready.gpus:
        say_if_crowded(others, get_num_threads())
    return ready


def _load_here(config: Config) -> Ready:
    """Load the model, pack its weights, and give back what loading leaves."""
    terminal.say(f"Loading {config.model.name}")
    return_large_blocks(EIGHT_BIT_BYTES if config.quant.bits == 8 else LARGE_BYTES)
    with PeakSampler(LOADING_SAMPLE_SEC, apart=True) as sampler:
        loaded = load_model(config.model, config.quant, config.models_dir)
        weights = _measure(loaded)
        packed = pack_weights(loaded.model) if config.engine.pack_weights else 0
        replaced = replace_products(loaded.model) if config.engine.pack_weights else 0
        log.info("%d layers replaced by those of the kernels", packed + replaced)
        release_files(loaded.model)  # type: ignore[arg-type]
        trim()
        if not multiplies_as_bitsandbytes_in_8_bits(loaded.model):  # type: ignore[arg-type]
            return_large_blocks(GLIBC_BYTES)
    if left_out := loaded.own_settings.left_out(config.generation):
        terminal.say(left_out)
    return Ready(loaded, packed > 0, weights, sampler.peaks())


def _measure(loaded: Loaded) -> dict[str, Any]:
    model: Any = loaded.model
    return {
        "footprint_bytes": footprint_bytes(model),
        "weight_bytes": weight_bytes(model),
        "quantization_state_bytes": quantization_state_bytes(model),
        "parameters": count_parameters(model),
        "quantized_share": loaded.quantized_share,
    }
