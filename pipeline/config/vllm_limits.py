"""Say what vLLM does not do as this program's own engine does it: such rows and jobs are refused."""

from collections.abc import Mapping
from typing import Any

from pipeline.common.request import GenerationParams

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
ROWS_ON_CPU, ROWS_ON_GPU = 128, 256
# What an argument of vLLM's is called here, where a job says it otherwise.
OTHERWISE = {
    "model": "model.name", "tokenizer": "model.name", "revision": "model.revision", "dtype": "quant",
    "trust_remote_code": "model.trust_remote_code", "load_format": "model.safetensors_only",
    "max_model_len": "engine.max_model_len", "max_num_seqs": "engine.max_rows",
    "max_num_batched_tokens": "engine.prefill_tokens", "enable_prefix_caching": "engine.shared_prefix",
    "tensor_parallel_size": "engine.tensor_parallel", "pipeline_parallel_size": "engine.pipeline_parallel",
    "kv_cache_memory_bytes": "engine.max_tokens_in_flight", "gpu_memory_utilization": "engine.memory_fraction",
    "enable_lora": "model.adapter", "max_lora_rank": "model.adapter", "data_parallel_size": "devices",
    "generation_config": "generation", "max_logprobs": "generation.logprobs", "seed": "generation.seed",
    "structured_outputs_config": "generation.json_schema", "hf_token": "HF_TOKEN",
}  # fmt: skip


def rows_in_flight(asked: int | None, *, on_cpu: bool) -> int:
    """Say how many rows vLLM runs at once: as asked, else as many as make a step faster."""
    return asked or (ROWS_ON_CPU if on_cpu else ROWS_ON_GPU)


def refusal(params: GenerationParams) -> str | None:
    """Say which of a row's settings vLLM would take as another, and what it would take; None if it takes all."""
    if not (params.greedy or LEAST_TEMPERATURE <= params.temperature <= MOST_TEMPERATURE):
        return (
            f"temperature={params.temperature}: vLLM takes 0 (greedy), or {LEAST_TEMPERATURE} to "
            f"{MOST_TEMPERATURE}"
        )
    if params.label_logprobs:
        return "label_logprobs=true: vLLM's process makes texts, and does not compare choices"
    if params.min_p > 0 and params.top_p < 1 and not params.greedy:
        return (
            f"min_p={params.min_p} and top_p={params.top_p}: vLLM applies them in the other order, which keeps "
            "other tokens; use one of them"
        )
    return None


def said_otherwise(extra: Mapping[str, Any]) -> str | None:
    """Say which of the further arguments has a key of its own; None if none has."""
    for name in extra:
        if (key := OTHERWISE.get(str(name))) is not None:
            return f"engine.extra.{name}: is said otherwise here; use {key}=… instead"
    return None
