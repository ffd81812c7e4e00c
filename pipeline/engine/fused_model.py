"""Run models of the Llama kind by a dozen calls a layer instead of seventy.

The products stay the model's own modules, those of one input called together where their class can. What lies
between them goes through kernels, those of a CPU or of a GPU: cpu/kernels/operators.py and
paged/triton_kernels.py have the same functions.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Known line by line: embedding, layers, norm, head; and in a layer norm, attention with rotary embedding,
# norm, gated MLP, two residuals, and no more.
MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def can_fuse(model: Any, device_type: str = "cpu") -> bool:
    """Say whether a model is one of MODELS, in a precision of the kernels there, without a hook that has to run."""
    if type(model).__name__ not in MODELS:
        return False
    there = all(p.device.type == device_type for p in model.parameters())
    # On one GPU a hook only brings inputs to it, where they are already.
    hooked = device_type == "cpu" and any(hasattr(m, "_hf_hook") for m in model.modules())
    silu = all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in model.model.layers)
    other = torch.float32 if device_type == "cpu" else torch.float16
    return there and silu and not hooked and model.model.norm.weight.dtype in (torch.bfloat16, other)


class FusedModel:
    """Stand in for a model in passes over a batch, called like the model itself."""

    def __init__(self, model: Any, kernels: ModuleType) -> None:
        self._body = model.model
        self._head = model.lm_head
        self._kernels = kernels

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: list[int] | Tensor | int, batch: Any
    ) -> Tensor:
        """Run all layers. input_ids and position_ids [1, N], K places to keep, 0 is all → logits [K, V]."""
        keep = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = self._body.embed_tokens(input_ids)[0]
        cos, sin = self._body.rotary_emb(states, position_ids)
        rotation = cos[0], sin[0]
        addition: Tensor | None = None
        last = len(self._body.layers) - 1
        for index, layer in enumerate(self._body.layers):
            normed = self._norm(layer.input_layernorm, states, addition)
            attended = self._attention(layer.self_attn, index, normed, rotation, batch)
            if index == last:  # from here on nobody reads the others
                states, attended = states[keep], attended[keep]
            addition = layer.self_attn.o_proj(attended)
            normed = self._norm(layer.post_attention_layernorm, states, addition)
            addition = self._mlp(layer.mlp, normed)
        logits: Tensor = self._head(self._norm(self._body.norm, states, addition))
        return logits

    def _attention(self, attention: Any, layer: int, normed: Tensor, rotation: Any, batch: Any) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (-1, attention.head_dim))  # type: ignore[no-untyped-call]
            for projected in _together((attention.q_proj, attention.k_proj, attention.v_proj), normed)
        )
        if hasattr(attention, "q_norm"):
            query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
        attended: Tensor = batch.attend(layer, query, key, value, attention.scaling, rotation)
        return attended.flatten(1)

    def _mlp(self, mlp: Any, normed: Tensor) -> Tensor:
        packed = getattr(mlp.gate_proj, "packed", None)
        gated = (
            packed.gated(normed)
            if packed is not None and packed.interleaved
            else self._kernels.silu_multiply(*_together((mlp.gate_proj, mlp.up_proj), normed))
        )
        output: Tensor = mlp.down_proj(gated)
        return output

    def _norm(self, norm: Any, states: Tensor, addition: Tensor | None = None) -> Tensor:
        """Add to the states in place, where there is an addition, and norm them."""
        weight, eps = norm.weight, norm.variance_epsilon
        normed: Tensor = (
            self._kernels.rms_norm(states, weight, eps)
            if addition is None
            else self._kernels.add_rms_norm(states, addition, weight, eps)
        )
        return normed


def _together(linears: Sequence[Any], input: Tensor) -> Sequence[Tensor]:
    """Call layers with the same input: by one launch, where they are of one class that can."""
    kind = type(linears[0])
    if hasattr(kind, "joined") and all(type(linear) is kind for linear in linears):
        outputs: Sequence[Tensor] = kind.joined(linears, input)
        return outputs
    return [linear(input) for linear in linears]
