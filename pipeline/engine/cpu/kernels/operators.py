"""Call the kernels on tensors: operators for a CPU in bf16 or float32, and products on packed weights.

At a few dozen rows a step spends more time in dozens of small operators than in its products. Each of these
does in one call what takes torch five to fifteen, and computes in float32. How kernels work: README.md.

They compile when they are first called, or all at once (`compile_for`), or come from numba's cache. Importing this
module raises ImportError without numba, and OSError where torch is not linked with libgomp.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.cpu.kernels import attention as attention
from pipeline.engine.cpu.kernels import loops as loops
from pipeline.engine.cpu.kernels.attention_operators import attend as attend
from pipeline.engine.cpu.kernels.attention_operators import attend_call as attend_call
from pipeline.engine.cpu.kernels.attention_operators import attends_causally as attends_causally
from pipeline.engine.cpu.kernels.attention_operators import causal_attend as causal_attend
from pipeline.engine.cpu.kernels.attention_operators import causal_softmax as causal_softmax
from pipeline.engine.cpu.kernels.attention_operators import collect as collect
from pipeline.engine.cpu.kernels.attention_operators import copy_prefix as copy_prefix
from pipeline.engine.cpu.kernels.attention_operators import place as place
from pipeline.engine.cpu.kernels.blocks import BLOCK, Blocks, Linear, chunk_rows
from pipeline.engine.cpu.kernels.blocks import pack_blocks as pack_blocks
from pipeline.engine.cpu.kernels.blocks import pack_bytes as pack_bytes
from pipeline.engine.cpu.kernels.blocks import pack_codes as pack_codes
from pipeline.engine.cpu.kernels.precision import compile_for as compile_for
from pipeline.engine.cpu.kernels.slots import NEXT_TASK as NEXT_TASK
from pipeline.engine.cpu.kernels.slots import TASKS as TASKS
from pipeline.engine.cpu.kernels.slots import Call, bits, prepare, row_stride
from pipeline.engine.cpu.kernels.threads import openmp as openmp
from pipeline.engine.cpu.kernels.threads import parallel as parallel
from pipeline.engine.cpu.kernels.threads import run
from pipeline.engine.cpu.kernels.tiles import CONFIGURATION, has_tiles
from pipeline.engine.cpu.kernels.vectors import HAS_AVX2, HAS_AVX512, HAS_BF16

products: Any = None  # what multiplies here in bf16; each is imported only where it can run
floats: Any = None  # and in float32
if has_tiles():
    from pipeline.engine.cpu.kernels import linear_tiles as products
elif HAS_AVX2:
    from pipeline.engine.cpu.kernels import linear_vectors as products
if HAS_AVX2:
    from pipeline.engine.cpu.kernels import linear_floats as floats

_VECTORS = (
    "vectors with bf16 (AVX-512)"
    if HAS_BF16
    else "vectors of AVX-512 without bf16"
    if HAS_AVX512
    else "vectors of AVX2"
)
MULTIPLIES = (
    "bf16, 8 and 4 bits on matrix tiles (AMX), of float32 on vectors (AVX-512)"
    if has_tiles()
    else f"bf16, float32, 8 and 4 bits on {_VECTORS}"
)


def products_of(dtype: torch.dtype) -> Any:
    """Return the module that multiplies in this dtype."""
    return floats if dtype == torch.float32 else products


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm by the root mean square (Zhang and Sennrich 2019), rounded as transformers does. [.., D] → [.., D]."""
    return _rms_norm(input.contiguous(), None, weight, eps)


def add_rms_norm(states: Tensor, addition: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the states in place, and norm the sum. Contiguous [.., D] → [.., D]."""
    return _rms_norm(states, addition, weight, eps)


def _rms_norm(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    output = torch.empty_like(states)
    run(norm_call(states.view(-1, len(weight)), addition, weight, eps, output))
    return output


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, each rounded as torch does. Two of [N, M], each row contiguous → [N, M]."""
    output = gate.new_empty(gate.shape)
    rows, width = gate.shape
    numbers = {"rows": rows, "width": width, "gate_stride": row_stride(gate), "up_stride": row_stride(up)}
    tasks = -(-rows // loops.ROWS)
    kernel = loops.silu_multiply.of(gate.dtype)
    run(prepare(kernel, loops.Silu, tasks, gates=gate, ups=up, outputs=output, **numbers))
    return output


def linear(input: Tensor, weight: Blocks, bias: Tensor | None, gated: bool = False) -> Tensor:
    """Multiply by a packed weight. [.., K] → [.., M], or where gated [.., M/2].

    Args:
        weight: [M, K], from `pack_blocks`, `pack_codes` or `pack_bytes`. Gated, 16 gates and 16 ups take turns,
            and the output is silu(gate) · up.
        bias: [M].

    Raises:
        TypeError: the input is not in the weight's dtype.
    """
    if input.dtype != weight.dtype:
        raise TypeError(f"an input in {input.dtype}")
    states = input.reshape(-1, weight.inputs)
    states = states if states.stride(1) == 1 else states.contiguous()
    count = len(states)
    fewest = products_of(input.dtype).FEWEST_ROWS
    if count < fewest:
        states = F.pad(states, (0, 0, 0, fewest - count))
    width = weight.outputs // 2 if gated else weight.outputs
    output = states.new_empty(len(states), width)
    run(linear_call(states, weight, bias, output, gated))
    return output[:count].view(*input.shape[:-1], width)


def argmax(scores: Tensor) -> Tensor:
    """Find the first of the largest. Contiguous [B, V] → [B] int64."""
    rows, width = scores.shape
    places = torch.empty(rows, dtype=torch.int64)
    kernel = loops.argmax.of(scores.dtype)
    run(prepare(kernel, loops.Argmax, rows, scores=scores, places=places, rows=rows, width=width))
    return places


def forbid(scores: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Put −inf in place where no bit is set. Contiguous [B, V]; rows [K] int64, allowed [K, words] int64."""
    height, width = scores.shape
    sizes = {"height": height, "width": width, "words": allowed.shape[1]}
    kernel = loops.forbid.of(scores.dtype)
    run(prepare(kernel, loops.Forbid, len(rows), scores=scores, which=rows, allowed=allowed, **sizes))


def norm_call(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float, output: Tensor) -> Call:
    """Prepare `add_rms_norm` into an output. Both [N, D], or [N, H, D], each token's heads contiguous."""
    width = len(weight)
    rows, heads = len(states), states[0].numel() // width
    return prepare(
        loops.rms_norm.of(states.dtype),
        loops.Norm,
        -(-rows * heads // loops.ROWS),
        inputs=states,
        additions=0 if addition is None else addition,
        weight=weight,
        outputs=output,
        rows=rows,
        width=width,
        heads=heads,
        stride=row_stride(states),
        eps=bits(eps),
    )


def linear_call(
    states: Tensor, weight: Blocks, bias: Tensor | None, output: Tensor, gated: bool = False
) -> Call:
    """Prepare `linear` into an output. states: [N, K], N ≥ its products' FEWEST_ROWS."""
    inputs, outputs = weight.inputs, weight.outputs
    multiplies = products_of(weight.dtype)
    chunk = chunk_rows(inputs * states.element_size(), multiplies.ROWS)
    # For each chunk of rows, as many tasks as a row of the output has cache lines.
    tasks = -(-len(states) // chunk) * -(-outputs // BLOCK // (1 + gated))
    return prepare(
        multiplies.linear.of(weight.dtype),
        Linear,
        tasks,
        inputs=states,
        weights=weight.numbers,
        values=0 if weight.values is None else weight.values,
        scales=0 if weight.scales is None else weight.scales,
        bias=0 if bias is None else bias,
        outputs=output,
        configuration=CONFIGURATION.ctypes.data,
        rows=len(states),
        width_in=inputs,
        width_out=outputs,
        stride=states.stride(0),
        gated=int(gated),
        threads=torch.get_num_threads(),
        chunk=chunk,
    )


if not hasattr(loops.run, "address"):
    raise ImportError("numba does not compile here (NUMBA_DISABLE_JIT)")
