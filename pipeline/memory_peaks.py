"""Estimates of what a load and a run take at their fullest, from the architecture alone: no weights, no torch.

Exact are the parts that memory_plan.py knows; activations, logits, scratch and the context are estimates.
"""

from dataclasses import dataclass
from functools import cache

from pipeline.architecture import Architecture
from pipeline.memory_plan import (
    ELEMENT_BYTES,
    Quant,
    checkpoint_bytes,
    footprint_bytes,
    plain_dtype,
    quant_state_bytes,
    weights,
)

MIB = 1024**2
CUDA_CONTEXT_BYTES = 600 * MIB  # an assumption: driver context, kernels and workspaces, for each GPU
# Fitted to SmolLM2 on one CPU: code and buffers that the libraries add from loading to the first passes, and
# the heap that 8-bit products leave in pieces.
HOST_RUNTIME_BYTES = 36 * MIB
INT8_HEAP_BYTES = 48 * MIB


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


def packed_bytes(arch: Architecture, quant: Quant) -> int:
    """What packing the bf16 linear layers on a CPU holds twice: a head that is also the embedding.

    The other layers' unpacked weights are freed as they are packed.
    """
    if plain_dtype(arch, quant) != "bfloat16" or not arch.tie_word_embeddings:
        return 0
    return ELEMENT_BYTES["bfloat16"] * arch.vocab_size * arch.hidden_size


@dataclass(frozen=True, slots=True)
class RunPeak:
    """What a run holds at its fullest, part by part. Bytes; `total` is their sum."""

    footprint: int
    quant_state: int
    packed: int  # a tied head, held a second time in a better order
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
            + self.packed
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
    packed: bool = False,
) -> RunPeak:
    """A full batch while one more prefill passes through.

    Args:
        kv_cache: bytes, as from `kv_cache_bytes`.
        rows: of the batch, whose logits are held.
        prefill_tokens: tokens in one pass of the prefill.
        columns: the longest prompt.
        gpus: 0 is a run on the CPU.
        packed: bf16 linear layers are packed, on a CPU.
    """
    return RunPeak(
        footprint=footprint_bytes(arch, quant),
        quant_state=quant_state_bytes(arch, quant),
        packed=packed_bytes(arch, quant) if packed and not gpus else 0,
        kv_cache=kv_cache,
        activations=activation_bytes(arch, quant, prefill_tokens, columns),
        logits=logits_bytes(arch, quant, rows, sampled=sampled),
        scratch=scratch_bytes(arch, quant, gpus),
        context=gpus * CUDA_CONTEXT_BYTES if gpus else _host_bytes(quant),
    )


def _host_bytes(quant: Quant) -> int:
    return HOST_RUNTIME_BYTES + (INT8_HEAP_BYTES if quant.method == "int8" else 0)


@dataclass(frozen=True, slots=True)
class LoadPeak:
    """What loading holds at its fullest. `mapped` are file pages that the system can take back at will."""

    held: int
    mapped: int


def load_peak(arch: Architecture, quant: Quant, *, gpus: int, packed: bool = False) -> LoadPeak:
    """Weights as they will be stored; on a GPU beside them the largest tensor as the checkpoint has it.

    On a host the checkpoint's file is mapped while it is read. Weights that stay as they are, are those
    very pages: nothing is held twice, unless they are packed.
    """
    stored_bytes = footprint_bytes(arch, quant) + quant_state_bytes(arch, quant)
    if gpus:
        largest = max(w.count for w in weights(arch)) * ELEMENT_BYTES[arch.dtype]
        return LoadPeak(held=stored_bytes + largest + gpus * CUDA_CONTEXT_BYTES, mapped=0)
    as_is = quant.method == "none" and plain_dtype(arch, quant) == arch.dtype
    if packed:
        stored_bytes += packed_bytes(arch, quant)
        as_is = as_is and plain_dtype(arch, quant) != "bfloat16"
    return LoadPeak(stored_bytes + HOST_RUNTIME_BYTES, 0 if as_is else checkpoint_bytes(arch))
