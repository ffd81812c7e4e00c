"""Estimate what a load and a run take at their fullest, from the architecture alone.

Exact are the parts that plan.py knows; activations, logits, scratch and the context are estimates.
"""

import math
from dataclasses import dataclass
from functools import cache

from pipeline.common.gpu import Gpu
from pipeline.common.units import MIB, megabytes
from pipeline.config.quant import BLOCK, ELEMENT_BYTES, Dtype, QuantConfig
from pipeline.memory.architecture import Architecture, Weight
from pipeline.memory.plan import (
    checkpoint_bytes,
    footprint_bytes,
    plain_dtype,
    quant_state_bytes,
    state_bytes,
    weights,
)

Gpus = tuple[Gpu, ...]  # those that the model lies on; () is the CPU

BF16 = Dtype.bfloat16.value

CUDA_CONTEXT_BYTES = 600 * MIB  # an assumption: driver context, kernels and workspaces, for each GPU
# Fitted to SmolLM2 on one CPU: code and buffers that the libraries add from loading to the first passes, and
# the heap that bitsandbytes' 8-bit products leave in pieces.
HOST_RUNTIME_BYTES = 36 * MIB
INT8_HEAP_BYTES = 48 * MIB
# What glibc's heap keeps of a scan's blocks of many sizes, fitted to Granite 4, Falcon-H1 and Mamba-2 on one CPU. To
# return each block at once, as a job in 8 bits does, makes their prefill 1.4 to 1.8 times as long.
HEAP_HOLES = 1.25
LOADING_BYTES = 4 * MIB  # what loading takes beside weights that are not in 4 bits
# float32 copies of a logit while sampling: scaled, probabilities, their sums; on a GPU also what _invert makes.
SAMPLING_BYTES, GPU_SAMPLING_BYTES = 12, 17


def logits_bytes(
    arch: Architecture, quant: QuantConfig, rows: int, *, copies_logits: bool = False, gpus: Gpus = ()
) -> int:
    """Predict one row of logits for each row of the batch; sampling works on float32 copies of them."""
    copies = (GPU_SAMPLING_BYTES if gpus else SAMPLING_BYTES) if copies_logits else 0
    return rows * arch.vocab_size * (ELEMENT_BYTES[plain_dtype(arch, quant)] + copies)


def activation_bytes(
    arch: Architecture,
    quant: QuantConfig,
    tokens: int,
    columns: int,
    gpus: Gpus = (),
    packed: bool = False,
) -> int:
    """Estimate the most that is alive at once in a layer of one forward pass; not the logits.

    On a CPU, either the MLP (its input, residuals and norm; gate, up and product, or fused gate_up, gate's activation
    and product) or attention (the same input; queries, rotated, padded, the result; keys, values, both
    repeated for the query heads; the mask) or a norm's float32 copies. The results of bitsandbytes' int8 products
    go through int32 and float32, 16 bytes each; packed weights have others. Within 5 % of the live tensors of
    SmolLM2's forward pass.

    Args:
        tokens: in the pass.
        columns: the longest prompt so far, whose keys the pass attends to.
    """
    if arch.pass_columns:
        held = _counted_activation_bytes(arch, quant, tokens, columns)
        return len(gpus) * held if gpus else int(held * (1 if quant.bits == 8 else HEAP_HOLES))
    if gpus:
        return len(gpus) * _gpu_activation_bytes(arch, quant, tokens, columns, gpus)
    element = ELEMENT_BYTES[plain_dtype(arch, quant)]
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    mlp = element * tokens * (4 * hidden + (4 if arch.fused else 3) * inner)
    attention = element * tokens * (4 * hidden + 4 * queries + 2 * keys)
    attention += element * max(tokens, columns) * 2 * queries + (1 + element) * tokens * columns
    norm = tokens * (element * hidden + 3 * 4 * hidden)
    int8 = 0
    if quant.bits == 8 and not packed:
        int8 = tokens * (element * (4 * hidden + inner) + 16 * _widest_linear(arch))
    return max(mlp, attention, norm, int8)


def _counted_activation_bytes(arch: Architecture, quant: QuantConfig, tokens: int, columns: int) -> int:
    """Return what a pass over so many tokens was seen to hold; a row is never cut, and its scan pads it."""
    wide = ELEMENT_BYTES[plain_dtype(arch, quant)] == ELEMENT_BYTES["float32"]
    pieces = math.ceil(max(tokens, columns) / arch.pass_columns)
    return pieces * arch.pass_bytes[wide]


def _gpu_activation_bytes(
    arch: Architecture, quant: QuantConfig, tokens: int, columns: int, gpus: Gpus
) -> int:
    """Estimate the same on a GPU, where attention is one kernel: neither scores nor repeated keys are ever stored.

    Estimated from the code, not fitted. The boolean masks, one for each kind of window, last for the whole
    pass; in a layer, the kernel has its mask as floats. bitsandbytes' int8 product has its input in 8 bits, its
    results in int32, in float16 and in the dtype of the activations.
    """
    dtype = plain_dtype(arch, quant)
    element = ELEMENT_BYTES[dtype]
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    mlp = element * tokens * (4 * hidden + (4 if arch.fused else 3) * inner)
    attention = element * tokens * (4 * hidden + 4 * queries + 2 * keys + columns)
    norm = tokens * (element * hidden + 3 * 4 * hidden)
    int8 = 0
    if quant.bits == 8 and not _reads_8_bits(arch, quant, gpus):
        results = 4 + 2 + (0 if dtype == "float16" else element)
        int8 = tokens * (element * (4 * hidden + inner) + hidden + results * _widest_linear(arch))
    return max(mlp, attention, norm, int8) + len(set(arch.windows)) * tokens * columns


def _widest_linear(arch: Architecture) -> int:
    """Return the most outputs of a quantized linear layer; experts are multiplied as they are dequantized."""
    return max((w.shape[0] for w in weights(arch) if w.quantizable and not w.experts), default=0)


@cache
def scratch_bytes(arch: Architecture, quant: QuantConfig, gpus: Gpus) -> int:
    """Estimate what products work in: the largest matrix, dequantized for many rows; a GPU's workspace.

    On a CPU this is an upper bound: with AVX512-BF16 it is unpacked once, in int32, to be laid out anew.
    """
    if not gpus:
        return 8 * largest_quantizable(arch, experts_only=not quant.four_bit) if quant.quantized else 0
    found = (_dequantized_bytes(w, arch, quant, gpus) for w in weights(arch) if w.quantizable)
    largest = max(found, default=0) if quant.quantized else 0
    streams = 2 if len(gpus) == 1 else 1  # on one GPU steps are recorded on a stream of their own
    return sum(largest + streams * _workspace_bytes(gpu) for gpu in gpus)


def _dequantized_bytes(weight: Weight, arch: Architecture, quant: QuantConfig, gpus: Gpus) -> int:
    """Predict what a product of many rows writes of a matrix in plain numbers; experts in float32 first."""
    if quant.four_bit:
        return ELEMENT_BYTES[quant.product_dtype] * weight.matrix
    plain = ELEMENT_BYTES[plain_dtype(arch, quant)]
    if weight.experts:
        return (4 + plain) * weight.matrix
    return plain * weight.matrix if _reads_8_bits(arch, quant, gpus) else 0


def _reads_8_bits(arch: Architecture, quant: QuantConfig, gpus: Gpus) -> bool:
    """Say whether engine/paged/triton_eight_bits.py stands in for bitsandbytes' 8-bit products."""
    one = len(gpus) == 1 and gpus[0].backend == "cuda" and (gpus[0].capability or (0, 0)) >= (8, 0)
    return one and ELEMENT_BYTES[plain_dtype(arch, quant)] == 2


def _workspace_bytes(gpu: Gpu) -> int:
    """Return what torch allocates for cuBLAS at the first product on a stream, by its own defaults."""
    if gpu.backend != "cuda":
        return 0
    return 32 * MIB if (gpu.capability or (0, 0)) >= (9, 0) else 8 * MIB + 128 * 1024


@cache
def largest_quantizable(arch: Architecture, *, experts_only: bool = False) -> int:
    """Count the weights of the largest matrix: an expert's, or a linear layer that is not the output head."""
    found = (w.matrix for w in weights(arch) if w.quantizable and (w.experts or not experts_only))
    return max(found, default=0)


def packed_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict what packing linear layers and experts on a CPU adds: a head that is also the embedding is held twice.

    The others' unpacked weights are freed as they are packed; scales that were quantized too are float32 then.
    """
    if not _can_pack(arch, quant):
        return 0
    head = (
        ELEMENT_BYTES[plain_dtype(arch, quant)] * arch.vocab_size * arch.hidden_size
        if arch.tie_word_embeddings
        else 0
    )
    if not quant.four_bit:
        return head
    layers = [w for w in weights(arch) if w.quantizable]
    scales = sum(4 * math.ceil(w.count / BLOCK) for w in layers)
    return head + max(0, scales - sum(state_bytes(w, quant) for w in layers))


def _can_pack(arch: Architecture, quant: QuantConfig) -> bool:
    """Say whether a CPU's kernels multiply in this precision."""
    dtype = plain_dtype(arch, quant)
    return dtype == BF16 or (dtype == Dtype.float32.value and not quant.quantized)


@dataclass(frozen=True, slots=True)
class RunPeak:
    """Hold what a run takes at its fullest, part by part. Bytes; `total` is their sum."""

    footprint: int
    quant_state: int
    packed: int  # what packed weights take more: a tied head a second time, scales in float32
    kv_cache: int
    activations: int
    logits: int
    scratch: int
    context: int  # the CUDA context, or what the libraries take on a host

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
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
    quant: QuantConfig,
    *,
    kv_cache: int,
    rows: int,
    prefill_tokens: int,
    columns: int,
    copies_logits: bool,
    gpus: Gpus,
    packed: bool = False,
) -> RunPeak:
    """Estimate a full batch while one more prefill passes through.

    Args:
        kv_cache: bytes, as from `kv_cache_bytes`.
        rows: of the batch, whose logits are held.
        prefill_tokens: tokens in one pass of the prefill.
        columns: the longest prompt.
        gpus: those that the model lies on, () for a run on the CPU. Each of them has a pass in turn.
        packed: linear layers are packed, on a CPU.
    """
    packed = packed and not gpus and _can_pack(arch, quant)
    return RunPeak(
        footprint=footprint_bytes(arch, quant),
        quant_state=quant_state_bytes(arch, quant),
        packed=packed_bytes(arch, quant) if packed else 0,
        kv_cache=kv_cache,
        activations=activation_bytes(arch, quant, prefill_tokens, columns, gpus, packed),
        logits=logits_bytes(arch, quant, rows, copies_logits=copies_logits, gpus=gpus),
        scratch=scratch_bytes(arch, quant, gpus),
        context=len(gpus) * CUDA_CONTEXT_BYTES if gpus else _host_bytes(quant, packed),
    )


def _host_bytes(quant: QuantConfig, packed: bool) -> int:
    """Return what the libraries take on a host."""
    return HOST_RUNTIME_BYTES + (INT8_HEAP_BYTES if quant.bits == 8 and not packed else 0)


def held_weight_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict the weights as they are held, with their quantization state."""
    return footprint_bytes(arch, quant) + quant_state_bytes(arch, quant)


@dataclass(frozen=True, slots=True)
class LoadPeak:
    """Hold what loading takes at its fullest. Bytes."""

    held: int  # has to be free: tensors; on a host, with what the libraries take
    mapped: int  # pages of the checkpoint's file, which the system can take back at any time
    context: int  # of the GPUs, which torch's counters leave out

    @property
    def needed(self) -> int:
        """Return what has to be free."""
        return self.held + self.context

    @property
    def words(self) -> str:
        """Say what has to be free, and what is only mapped."""
        mapped = (
            f" (beside {megabytes(self.mapped)} of its file, which are only mapped)" if self.mapped else ""
        )
        return megabytes(self.needed) + mapped


def load_peak(arch: Architecture, quant: QuantConfig, *, gpus: Gpus, packed: bool = False) -> LoadPeak:
    """Estimate the weights as they will be stored; on a GPU beside them what quantizing the largest one takes.

    On a host the checkpoint's file is mapped while it is read. Weights that stay as they are, are those very pages,
    and nothing of size has to be free for them, unless they are packed, or copied out of the file at the end
    (engine/host_memory.py): then only a smaller part of it is still in use.
    """
    stored_bytes = held_weight_bytes(arch, quant)
    if gpus:
        held = stored_bytes + len(gpus) * quantizing_bytes(arch, quant)
        return LoadPeak(held, mapped=0, context=len(gpus) * CUDA_CONTEXT_BYTES)
    file_bytes, view_bytes = checkpoint_bytes(arch), _view_bytes(arch, quant, packed)
    if view_bytes == file_bytes:
        return LoadPeak(0, file_bytes, context=0)
    beside = HOST_RUNTIME_BYTES if quant.four_bit else LOADING_BYTES
    beside += max(assembling_bytes(arch, quant), repacking_bytes(arch, quant) if packed else 0)
    held = stored_bytes + beside + (packed_bytes(arch, quant) if packed else 0)
    return LoadPeak(held - (view_bytes if 2 * view_bytes > file_bytes else 0), file_bytes, context=0)


def _view_bytes(arch: Architecture, quant: QuantConfig, packed: bool) -> int:
    """Predict how much of the loaded model is still pages of the checkpoint's file, on a host.

    Neither what is quantized, converted or packed, nor experts, which are put together from many tensors.
    """
    dtype = plain_dtype(arch, quant)
    if dtype != arch.dtype:
        return 0
    moved = packed and _can_pack(arch, quant)
    return ELEMENT_BYTES[dtype] * sum(
        w.count
        for w in weights(arch)
        if w.part != "buffers"
        and len(w.shape) < 3
        and not (w.quantizable and (quant.quantized or moved or arch.file_bytes is not None))
        and not (w.part == "head" and moved)
    )


def assembling_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict what the largest weight of experts takes before it is quantized: its halves, and then the whole."""
    largest = max((w.count for w in weights(arch) if w.quantizable and w.experts), default=0)
    return 2 * ELEMENT_BYTES[plain_dtype(arch, quant)] * largest if quant.quantized else 0


def repacking_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Predict what the largest weight of plain experts takes a second time while a CPU's kernels have it packed."""
    if quant.quantized or not _can_pack(arch, quant):
        return 0
    return ELEMENT_BYTES[plain_dtype(arch, quant)] * max(
        (w.count for w in weights(arch) if w.quantizable and w.experts), default=0
    )


def quantizing_bytes(arch: Architecture, quant: QuantConfig) -> int:
    """Estimate what a GPU holds beside the stored weights while the largest linear layer or experts are quantized.

    transformers 5 (core_model_loading.py) converts dtypes on the host, and what is not quantized arrives as it
    stays: the embedding and the head are never held twice. Its warm-up allocates the footprint beforehand, and
    frees it. What is quantized arrives one matrix at a time, unquantized. 8 bits: beside a copy in float16.
    4 bits: beside its scales in float32, and once more less their mean where they are quantized, too.
    """
    if not quant.quantized:
        return 0
    largest = largest_quantizable(arch)
    arrived = ELEMENT_BYTES[plain_dtype(arch, quant)] * largest
    if quant.bits == 8:
        beside = ELEMENT_BYTES[Dtype.float16.value] * largest
    else:
        beside = 2 * 4 * largest // BLOCK if quant.double_quant else 0
    return max(arrived + beside, assembling_bytes(arch, quant))


def work_bytes(
    arch: Architecture,
    quant: QuantConfig,
    gpus: tuple[Gpu, ...],
    prefill_tokens: int,
    rows: int,
    copies_logits: bool,
) -> int:
    """Predict what a device needs beside keys and values, wherever in the model its layers are."""
    return (
        activation_bytes(arch, quant, prefill_tokens, prefill_tokens, gpus)
        + scratch_bytes(arch, quant, gpus)
        + logits_bytes(arch, quant, rows, copies_logits=copies_logits, gpus=gpus)
    )
