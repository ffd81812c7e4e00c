"""Decoder layers of the Llama kind on a CPU in bf16: a dozen calls a layer instead of seventy.

The products stay the model's own modules; what lies between them goes through cpu_kernels.py. A layer's
`forward` is replaced on the layer itself, so its weights, names and hooks stay where they are.
"""

import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Known line by line: norm, attention with rotary embedding, norm, gated MLP, two residuals, and no more.
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


def load_kernels() -> ModuleType | None:
    """cpu_kernels, or None where numba or the threads it needs are not to be had."""
    try:
        from pipeline.engine import cpu_kernels
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: numba has nowhere to cache
        log.info("Without the CPU's kernels: %s", error)
        return None
    return cpu_kernels


def fuse_layers(model: Any, kernels: ModuleType) -> int:
    """Replace the forward of the layers that are known; returns how many."""
    layers = [m for m in model.modules() if type(m).__name__ in LAYERS and _is_plain(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward, kernels)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """bf16 on the CPU, the usual activation, and no hook that would have to run."""
    on_cpu = all(p.device.type == "cpu" for p in layer.parameters())
    hooked = any(hasattr(m, "_hf_hook") for m in layer.modules())
    silu = type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return on_cpu and silu and not hooked and layer.input_layernorm.weight.dtype == torch.bfloat16


def _forward(
    layer: Any,
    plain: Callable[..., Tensor],
    kernels: ModuleType,
    hidden_states: Tensor,
    *arguments: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    batch: Any = None,
    **options: Any,
) -> Tensor:
    """What the layer computes. hidden_states [1, N, E] → [1, N, E]; without a batch, its own forward."""
    if batch is None or position_embeddings is None:
        return plain(hidden_states, *arguments, position_embeddings=position_embeddings, **options)
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = (t[0] for t in position_embeddings)
    normed = _norm(kernels, layer.input_layernorm, hidden_states)
    query, key, value = (
        project(normed)[0].unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = _norm(kernels, attention.q_norm, query), _norm(kernels, attention.k_norm, key)
    kernels.rotate(query, cos, sin)
    kernels.rotate(key, cos, sin)
    attended = batch.attend(attention.layer_idx, query, key, value, attention.scaling)
    hidden_states = hidden_states + attention.o_proj(attended.flatten(1)[None])
    normed = _norm(kernels, layer.post_attention_layernorm, hidden_states)
    gated = kernels.silu_multiply(mlp.gate_proj(normed)[0], mlp.up_proj(normed)[0])
    output: Tensor = hidden_states + mlp.down_proj(gated[None])
    return output


def _norm(kernels: ModuleType, norm: Any, states: Tensor) -> Tensor:
    normed: Tensor = kernels.rms_norm(states, norm.weight, norm.variance_epsilon)
    return normed
