"""Predict the bytes of a model from its architecture alone.

Exact to the byte: the footprint (what `get_memory_footprint()` of the loaded model returns), the
quantization state, and the KV cache of given rectangles. Estimates are in peaks.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from pipeline.config.quant import BLOCK, ELEMENT_BYTES, STATE_BLOCK, Dtype, QuantConfig
from pipeline.engine.limits import CPU, Limits
from pipeline.memory.architecture import Architecture, Weight


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one part of the model in one stored dtype."""

    part: str
    dtype: str
    parameters: int
    bytes: int


@cache
def weights(arch: Architecture) -> tuple[Weight, ...]:
    """List every parameter and buffer that the model registers, in the order of its layers.

    A family's formula is from the modeling files of transformers 5; others were counted. A head that is tied to the
    embedding is not held twice.
    """
    if arch.counted is not None:
        return arch.counted.weights
    hidden = arch.hidden_size
    found = [Weight("embed_tokens", "embedding", (arch.vocab_size, hidden))]
    for layer in range(arch.num_hidden_layers):
        found += _layer(arch, f"layers.{layer}.")
    found.append(Weight("norm", "norm", (hidden,)))
    if not arch.tie_word_embeddings:
        found.append(Weight("lm_head", "head", (arch.vocab_size, hidden)))
    for i in range(arch.rotary_sets):  # the frequencies in use, and the original ones
        found += [
            Weight(f"rotary_emb.{i}.{name}", "buffers", (arch.rotary_dim // 2,), dtype=Dtype.float32.value)
            for name in _ROTARY
        ]
    if arch.embed_scale:
        found.append(Weight("embed_tokens.embed_scale", "buffers", ()))
    return tuple(found)


_ROTARY = ("inv_freq", "original_inv_freq")


def _layer(arch: Architecture, prefix: str) -> list[Weight]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    if arch.fused:
        attention, mlp = {"qkv_proj": queries + 2 * keys}, {"gate_up_proj": 2 * inner}
    else:
        attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        mlp = {"gate_proj": inner, "up_proj": inner}
    found: list[Weight] = []
    for name, outputs in attention.items():
        found += _linear(prefix + name, "attention", outputs, hidden, arch.qkv_bias)
    found += _linear(prefix + "o_proj", "attention", hidden, queries, arch.output_bias)
    for name, outputs in mlp.items():
        found += _linear(prefix + name, "mlp", outputs, hidden, arch.mlp_bias)
    found += _linear(prefix + "down_proj", "mlp", hidden, inner, arch.mlp_bias)
    if arch.qk_norm:
        found += [Weight(f"{prefix}{name}", "norm", (arch.head_dim,)) for name in ("q_norm", "k_norm")]
    found += [Weight(f"{prefix}norm.{i}", "norm", (hidden,)) for i in range(arch.norms)]
    return found


def _linear(name: str, part: str, outputs: int, inputs: int, bias: bool) -> list[Weight]:
    matrix = Weight(f"{name}.weight", part, (outputs, inputs), quantizable=True)
    return [matrix, Weight(f"{name}.bias", part, (outputs,))] if bias else [matrix]


def parameters(arch: Architecture) -> int:
    """Count the weights of the model; buffers are not weights."""
    if arch.counted is not None and arch.counted.parameters is not None:
        return arch.counted.parameters
    return sum(w.count for w in weights(arch) if w.part != "buffers")


def quantized_share(arch: Architecture) -> float:
    """Predict how much of the weights a quantization changes: linear layers and experts, neither embedding nor head."""
    return sum(w.count for w in weights(arch) if w.quantizable) / parameters(arch)


def plain_dtype(arch: Architecture, quant: QuantConfig) -> str:
    """Return the dtype of what is not quantized, of activations and of the KV cache."""
    return arch.dtype if quant.dtype is Dtype.auto else quant.dtype.value


def stored(weight: Weight, arch: Architecture, quant: QuantConfig) -> tuple[str, int]:
    """Return the dtype and the bytes of one tensor."""
    if weight.quantizable and quant.quantized:
        return quant.method.value, max(1, weight.experts) * quant.stored_bytes(weight.matrix)
    if weight.dtype is not None:
        return weight.dtype, weight.element_bytes * weight.count
    dtype = plain_dtype(arch, quant)
    if dtype in weight.wide_in:
        dtype = Dtype.float32.value
    return dtype, ELEMENT_BYTES[dtype] * weight.count


@cache
def parts(arch: Architecture, quant: QuantConfig) -> tuple[Part, ...]:
    """Split the footprint by part and stored dtype, in the order of the model."""
    sums: dict[tuple[str, str], list[int]] = {}
    for weight in weights(arch):
        dtype, size = stored(weight, arch, quant)
        entry = sums.setdefault((weight.part, dtype), [0, 0])
        entry[0] += weight.count
        entry[1] += size
    found = [Part(part, dtype, count, size) for (part, dtype), (count, size) in sums.items()]
    if quant.quantized and arch.adapter_scalars:  # else they are merged; peft computes them in float32
        wide = Dtype.float32.value
        found.append(Part("adapter", wide, arch.adapter_scalars, ELEMENT_BYTES[wide] * arch.adapter_scalars))
    return tuple(found)


def footprint_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict what `get_memory_footprint()` of the loaded model returns: parameters and buffers."""
    return sum(part.bytes for part in parts(arch, quant))


@cache
def quant_state_bytes(arch: Architecture, quant: QuantConfig, *, repacked: bool = False) -> int:
    """Predict what is kept beside the quantized weights, and the footprint leaves out.

    Args:
        repacked: True for 4-bit on a CPU with AVX512-BF16, where the first product lays the weights out anew
            and turns their scales into bfloat16, double quantization or not.
    """
    return sum(state_bytes(w, quant, repacked=repacked) for w in weights(arch) if w.quantizable)


def state_bytes(weight: Weight, quant: QuantConfig, *, repacked: bool = False) -> int:
    """Predict the same of one weight that is quantized; `repacked` as above."""
    if not quant.four_bit:
        return 4 * math.prod(weight.shape[:-1]) if quant.quantized else 0  # a float32 scale for each output
    code = 4 * 16  # the float32 values of the 16 codes; experts share them
    matrices, scales = max(1, weight.experts), math.ceil(weight.matrix / BLOCK)
    if repacked and not weight.experts:
        return code + 2 * scales
    if not quant.double_quant:
        return code + matrices * 4 * scales
    # Scales in 8 bits, with a float32 scale for each block of them, 256 codes and one offset.
    return code + 4 * 256 + matrices * (scales + 4 * math.ceil(scales / STATE_BLOCK) + 4)


def checkpoint_bytes(arch: Architecture) -> int:
    """Predict the tensors of the checkpoint's files."""
    return arch.file_bytes or ELEMENT_BYTES[arch.dtype] * parameters(arch)


def kv_bytes_per_token(arch: Architecture, quant: QuantConfig) -> dict[int | None, int]:
    """Predict the bytes of one token's keys and values, by kind of layer: its sliding window in tokens, None is full.

    2 · H_kv · D · element bytes in each layer of a known family.
    """
    kinds: dict[int | None, int] = {}
    for window, scalars in zip(arch.windows, arch.layer_keys, strict=True):
        kinds[window] = kinds.get(window, 0) + scalars * ELEMENT_BYTES[plain_dtype(arch, quant)]
    return kinds


def row_state_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict what each row takes beside its keys and values, however long it is: the states of recurrent layers."""
    return sum(arch.layer_state_bytes) + sum(arch.layer_states) * ELEMENT_BYTES[plain_dtype(arch, quant)]


def kv_cache_bytes(
    arch: Architecture,
    quant: QuantConfig,
    rectangles: Iterable[tuple[int, int]],
    *,
    limits: Limits = CPU,
    prefilling: bool = False,
) -> int:
    """Predict the buffers of these rectangles, or of rows in pages.

    A rectangle has allocated a chunk of columns beyond its longest row; a sliding layer keeps, of the
    columns before these, only the window - 1 that the next token sees, once its prefill is over. Pages keep
    all; a row's last one is counted as if it were empty.

    Args:
        rectangles: of each its rows, and the tokens of its longest row when it was made.
        prefilling: sliding layers still hold every column.
    """
    kinds, state_bytes = kv_bytes_per_token(arch, quant), row_state_bytes(arch, quant)
    total = 0
    for rows, tokens in rectangles:
        total += rows * state_bytes
        for window, token_bytes in kinds.items():
            whole = window is None or prefilling or not limits.cuts_windows
            kept = tokens if whole or window is None else min(tokens, window - 1)
            total += token_bytes * rows * (kept + limits.chunk)
    return total
