"""Write the arguments of vLLM's engine from a job's config."""

import os
from typing import Any

from pipeline.common.host import host_free_bytes
from pipeline.config.quant import Dtype
from pipeline.config.schema import Config, EngineConfig
from pipeline.memory.architecture import in_context
from pipeline.memory.capacity import kv_architecture
from pipeline.memory.facts import job_architecture
from pipeline.memory.reserve import reserve_bytes, row_tokens
from pipeline.models.adapter_files import AdapterFiles
from pipeline.models.dtypes import own_dtype
from pipeline.models.elsewhere import Elsewhere
from pipeline.prompts.reader import open_prompts

MOST_LOGPROBS = 100
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of a LoRA, that vLLM has room for
FIT = -1  # vLLM's word for the longest row that the memory holds


def arguments(
    config: Config,
    files: Elsewhere,
    *,
    rows: int,
    kv_cache_bytes: int | None,
) -> dict[str, Any]:
    """Write them, all those by which a job's text or memory is decided.

    Args:
        rows: in flight.
        kv_cache_bytes: what to reserve; None lets vLLM measure what is free.
    """
    model, settings = config.model, config.engine
    auto = config.quant.dtype is Dtype.auto
    return {
        "model": str(files.checkpoint.folder),
        "tokenizer": str(files.tokenizer_files.folder),
        "dtype": own_dtype(files.checkpoint) or "auto" if auto else config.quant.dtype.value,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "safetensors" if model.safetensors_only else "auto",
        "max_model_len": settings.max_model_len or model.context or FIT,
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(settings.prefill_tokens, rows),
        "enable_prefix_caching": settings.shared_prefix,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        **({"distributed_executor_backend": "ray"} if over_ray(settings) else {}),
        "generation_config": "vllm",  # not the model's: a job says all of it
        "max_logprobs": MOST_LOGPROBS,
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        "seed": 0,
        **_memory(settings.memory_fraction, kv_cache_bytes),
        **_adapter(files.adapter),
        **settings.extra,
    }


def over_ray(settings: EngineConfig) -> bool:
    """Say whether the ranks are Ray's processes: a batch script of several nodes has started it, or a user has."""
    return settings.ranks > 1 and "RAY_ADDRESS" in os.environ


def _memory(fraction: float, kv_cache_bytes: int | None) -> dict[str, Any]:
    if kv_cache_bytes is None:
        return {"gpu_memory_utilization": fraction}
    return {"kv_cache_memory_bytes": kv_cache_bytes}


def _adapter(adapter: AdapterFiles | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    asked = adapter.settings.get("r") or 1
    return {"enable_lora": True, "max_lora_rank": next((rank for rank in RANKS if rank >= asked), asked)}


def cpu_reserve(config: Config, files: Elsewhere, prompts: str, rows: int) -> int | None:
    """Plan what keys and values get of the host's memory; None for a model whose keys nothing here knows."""
    own = in_context(files.checkpoint.read_config(), config.model.context)
    arch = job_architecture(config.model, config.models_dir, config.quant, ()) or kv_architecture(own)
    if arch is None:
        return None
    context = min(filter(None, (arch.max_position_embeddings, config.engine.max_model_len)), default=None)
    tokens = row_tokens(open_prompts(config, prompts), config.system, context, rows)
    return reserve_bytes(arch, files.loaded.quant, tokens, rows, config.engine, host_free_bytes())
