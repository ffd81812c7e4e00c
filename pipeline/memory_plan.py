"""Predicted bytes of a model, from its architecture alone: no weights, no torch.

Exact to the byte: the footprint (what `get_memory_footprint()` of the loaded model returns), the
quantization state, and the KV cache of given rectangles. Estimates, and named so: activations, logits,
the device context, load peak and run peak.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from pipeline.architecture import Architecture

MIB = 1024**2
KV_CHUNK = 32  # columns a rectangle has allocated beyond its rows' tokens
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types
STATE_BLOCK = 256  # scales that share a scale of their own in double quantization
CUDA_CONTEXT_BYTES = 600 * MIB  # an assumption: driver context, kernels and workspaces, for each GPU
HOST_RUNTIME_BYTES = 24 * MIB  # an assumption: what the libraries allocate at a first forward pass on a CPU

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Quant:
    """A quantization, in plain strings: the `quant=` config."""

    name: str
    method: str = "none"  # none, int8, nf4 or fp4
    dtype: str = "auto"  # of what is not quantized; auto is the checkpoint's own
    double_quant: bool = False
    compute_dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the loaded model."""

    name: str
    part: str  # embedding, attention, mlp, norm, head or buffer
    shape: tuple[int, ...]
    quantizable: bool = False  # a linear layer that is not the output head

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of one part of the model in one stored dtype."""

    part: str
    dtype: str
    parameters: int
    bytes: int


@cache
def weights(arch: Architecture) -> tuple[Weight, ...]:
    """Every parameter and buffer that the model registers, in the order of its layers.

    Source: the modeling files of transformers 5. A head that is tied to the embedding is not held twice.
    """
    hidden = arch.hidden_size
    found = [Weight("embed_tokens", "embedding", (arch.vocab_size, hidden))]
    for layer in range(arch.num_hidden_layers):
        found += _layer(arch, f"layers.{layer}.")
    found.append(Weight("norm", "norm", (hidden,)))
    if not arch.tie_word_embeddings:
        found.append(Weight("lm_head", "head", (arch.vocab_size, hidden)))
    for i in range(arch.rotary_sets):  # the frequencies in use, and the original ones
        found += [Weight(f"rotary_emb.{i}.{name}", "buffer", (arch.rotary_dim // 2,)) for name in _ROTARY]
    if arch.embed_scale:
        found.append(Weight("embed_tokens.embed_scale", "buffer", ()))
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
    """How many weights the model has; buffers are not weights."""
    return sum(w.count for w in weights(arch) if w.part != "buffer")


def plain_dtype(arch: Architecture, quant: Quant) -> str:
    """The dtype of what is not quantized, of activations and of the KV cache."""
    return arch.dtype if quant.dtype == "auto" else quant.dtype


def stored(weight: Weight, arch: Architecture, quant: Quant) -> tuple[str, int]:
    """The dtype and the bytes of one tensor. Rotary frequencies stay float32; 4-bit packs two in a byte."""
    if weight.part == "buffer" and weight.shape:
        return "float32", 4 * weight.count
    if weight.quantizable and quant.method == "int8":
        return "int8", weight.count
    if weight.quantizable and quant.method in ("nf4", "fp4"):
        return quant.method, (weight.count + 1) // 2
    dtype = plain_dtype(arch, quant)
    return dtype, ELEMENT_BYTES[dtype] * weight.count


@cache
def parts(arch: Architecture, quant: Quant) -> tuple[Part, ...]:
    """The footprint by part and stored dtype, in the order of the model."""
    sums: dict[tuple[str, str], list[int]] = {}
    for weight in weights(arch):
        dtype, size = stored(weight, arch, quant)
        entry = sums.setdefault((weight.part, dtype), [0, 0])
        entry[0] += weight.count
        entry[1] += size
    return tuple(Part(part, dtype, count, size) for (part, dtype), (count, size) in sums.items())


def footprint_bytes(arch: Architecture, quant: Quant) -> int:
    """What `get_memory_footprint()` of the loaded model returns: parameters and buffers."""
    return sum(part.bytes for part in parts(arch, quant))


@cache
def quant_state_bytes(arch: Architecture, quant: Quant, *, repacked: bool = False) -> int:
    """What bitsandbytes keeps beside the quantized weights, and the footprint leaves out.

    Args:
        repacked: True for 4-bit on a CPU with AVX512-BF16, where the first product lays the weights out anew
            and turns their scales into bfloat16, double quantization or not.
    """
    matrices = [w for w in weights(arch) if w.quantizable]
    if quant.method == "int8":
        return sum(4 * w.shape[0] for w in matrices)  # a float32 scale for each output
    if quant.method in ("nf4", "fp4"):
        return sum(_state_bytes_4bit(w.count, quant.double_quant, repacked) for w in matrices)
    return 0


def _state_bytes_4bit(count: int, double_quant: bool, repacked: bool) -> int:
    code = 4 * 16  # the float32 values of the 16 codes
    scales = math.ceil(count / BLOCK)
    if repacked:
        return code + 2 * scales
    if not double_quant:
        return code + 4 * scales
    # Scales in 8 bits, with a float32 scale for each block of them, 256 codes and one offset.
    return code + scales + 4 * math.ceil(scales / STATE_BLOCK) + 4 * 256 + 4


def checkpoint_bytes(arch: Architecture) -> int:
    """The tensors of the checkpoint's files."""
    return ELEMENT_BYTES[arch.dtype] * parameters(arch)


# --- KV cache ---------------------------------------------------------------------------------------


def kv_bytes_per_token(arch: Architecture, quant: Quant) -> dict[int | None, int]:
    """Bytes of keys and values of one token, by kind of layer: its sliding window in tokens, None is full.

    2 · H_kv · D · element bytes, times the layers of that kind.
    """
    layer = _kv_layer_bytes(arch, quant)
    return {window: layer * arch.windows.count(window) for window in dict.fromkeys(arch.windows)}


def kv_cache_bytes(
    arch: Architecture, quant: Quant, rectangles: Iterable[tuple[int, int]], *, prefilling: bool = False
) -> int:
    """The buffers of these rectangles.

    A rectangle has allocated KV_CHUNK columns beyond its longest row; a sliding layer keeps, of the
    columns before these, only the window - 1 that the next token sees, once its prefill is over.

    Args:
        rectangles: of each its rows, and the tokens of its longest row when it was made.
        prefilling: sliding layers still hold every column.
    """
    layer = _kv_layer_bytes(arch, quant)
    kinds = {window: arch.windows.count(window) for window in dict.fromkeys(arch.windows)}
    total = 0
    for rows, tokens in rectangles:
        for window, layers in kinds.items():
            kept = tokens if window is None or prefilling else min(tokens, window - 1)
            total += layer * layers * rows * (kept + KV_CHUNK)
    return total


def _kv_layer_bytes(arch: Architecture, quant: Quant) -> int:
    """One token in one layer."""
    return 2 * arch.num_key_value_heads * arch.head_dim * ELEMENT_BYTES[plain_dtype(arch, quant)]


# --- estimates --------------------------------------------------------------------------------------


def logits_bytes(arch: Architecture, quant: Quant, rows: int, *, sampled: bool = False) -> int:
    """One row of logits a sequence; sampling works on float32 copies: scaled, probabilities, their sums."""
    return rows * arch.vocab_size * (ELEMENT_BYTES[plain_dtype(arch, quant)] + (12 if sampled else 0))


def activation_bytes(arch: Architecture, quant: Quant, tokens: int, columns: int) -> int:
    """The largest that is alive at once in a layer of one forward pass; not the logits.

    Either the MLP (its input, residuals and norm; gate, up and product, or fused gate_up, gate's activation
    and product) or attention (the same input; queries, rotated, padded, the result; keys, values, both
    repeated for the query heads; the mask) or a norm's float32 copies. An int8 product's results go
    through int32 and float32, 16 bytes each. Within 5 % of the live tensors of SmolLM2's forward pass.

    Args:
        tokens: in the pass.
        columns: the longest prompt so far, whose keys the pass attends to.
    """
    element = ELEMENT_BYTES[plain_dtype(arch, quant)]
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    mlp = element * tokens * (4 * hidden + (4 if arch.fused else 3) * inner)
    attention = element * tokens * (4 * hidden + 4 * queries + 2 * keys)
    attention += element * max(tokens, columns) * 2 * queries + (1 + element) * tokens * columns
    norm = tokens * (element * hidden + 3 * 4 * hidden)
    int8 = 0
    if quant.method == "int8":
        widest = max(w.shape[0] for w in weights(arch) if w.quantizable)
        int8 = tokens * (element * (4 * hidden + inner) + 16 * widest)
    return max(mlp, attention, norm, int8)


@cache
def scratch_bytes(arch: Architecture, quant: Quant, gpus: int) -> int:
    """4-bit: the largest matrix, dequantized for a product of many rows.

    On a CPU it is an upper bound: with AVX512-BF16 it is unpacked once, in int32, to be laid out anew.
    """
    if quant.method not in ("nf4", "fp4"):
        return 0
    compute = plain_dtype(arch, quant) if quant.compute_dtype == "auto" else quant.compute_dtype
    return max(w.count for w in weights(arch) if w.quantizable) * (ELEMENT_BYTES[compute] if gpus else 8)


@dataclass(frozen=True, slots=True)
class RunPeak:
    """What a run holds at its fullest, part by part. Bytes; `total` is their sum."""

    footprint: int
    quant_state: int
    kv_cache: int
    activations: int
    logits: int
    scratch: int
    context: int  # the CUDA context, or what the libraries take on a host

    @property
    def total(self) -> int:
        return (
            self.footprint
            + self.quant_state
            + self.kv_cache
            + self.activations
            + self.logits
            + self.scratch
            + self.context
        )


def run_peak(
    arch: Architecture,
    quant: Quant,
    *,
    kv_cache: int,
    rows: int,
    prefill_tokens: int,
    columns: int,
    sampled: bool,
    gpus: int,
) -> RunPeak:
    """A full batch while one more prefill passes through.

    Args:
        kv_cache: bytes, as from `kv_cache_bytes`.
        rows: of the batch, whose logits are held.
        prefill_tokens: tokens in one pass of the prefill.
        columns: the longest prompt.
        gpus: 0 is a run on the CPU.
    """
    return RunPeak(
        footprint=footprint_bytes(arch, quant),
        quant_state=quant_state_bytes(arch, quant),
        kv_cache=kv_cache,
        activations=activation_bytes(arch, quant, prefill_tokens, columns),
        logits=logits_bytes(arch, quant, rows, sampled=sampled),
        scratch=scratch_bytes(arch, quant, gpus),
        context=gpus * CUDA_CONTEXT_BYTES if gpus else HOST_RUNTIME_BYTES,
    )


@dataclass(frozen=True, slots=True)
class LoadPeak:
    """What loading holds at its fullest. `mapped` are file pages that the system can take back at will."""

    held: int
    mapped: int


def load_peak(arch: Architecture, quant: Quant, *, gpus: int) -> LoadPeak:
    """Weights as they will be stored; on a GPU beside them the largest tensor as the checkpoint has it.

    On a host the checkpoint's file is mapped while it is read. Weights that stay as they are, are those
    very pages: nothing is held twice.
    """
    stored_bytes = footprint_bytes(arch, quant) + quant_state_bytes(arch, quant)
    if gpus:
        largest = max(w.count for w in weights(arch)) * ELEMENT_BYTES[arch.dtype]
        return LoadPeak(held=stored_bytes + largest + gpus * CUDA_CONTEXT_BYTES, mapped=0)
    as_is = quant.method == "none" and plain_dtype(arch, quant) == arch.dtype
    return LoadPeak(stored_bytes + HOST_RUNTIME_BYTES, 0 if as_is else checkpoint_bytes(arch))
