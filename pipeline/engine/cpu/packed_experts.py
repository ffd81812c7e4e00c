"""Have the CPU's kernels multiply by the experts of mixtures: in bf16, in float32, in bitsandbytes' 4 and 8 bits.

Experts are weights of three dimensions. Each one's matrix is packed apart, and a pass meets only those that its
tokens chose.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.cpu.packed_weight import PackedWeight, fills_blocks, multiplies, pack_matrices
from pipeline.engine.experts import send_through

_HELD = "packed_experts"  # a module's own: what is packed of each weight, expert by expert


def pack_experts(module: Any, dtype: torch.dtype) -> bool:
    """Pack a mixture's experts, and free their unpacked weights, if it says how they lie; say whether it did.

    dtype: of what they are given.

    transformers has marked those whose passes are alike, up to their biases, gates and norms. What fills no whole
    blocks stays as it is.
    """
    own = hasattr(module, "is_transposed") and not hasattr(module, _HELD) and not hasattr(module, "_hf_hook")
    if not own or not multiplies():
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if not all(_can_pack(module, name, dtype) for name in (first, "down_proj")):
        return False
    packed = {
        first: _pack(module, first, interleaved=_is_gated_by_silu(module)),
        "down_proj": _pack(module, "down_proj"),
    }
    setattr(module, _HELD, packed)
    module.forward = MethodType(_forward, module)
    return True


def _is_gated_by_silu(module: Any) -> bool:
    """Say whether a kernel computes what lies between its two products: silu of the first half, by the second."""
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return bool(module.has_gate and silu and type(module)._apply_gate.__name__ == "_default_apply_gate")


def _can_pack(module: Any, name: str, dtype: torch.dtype) -> bool:
    """Say whether a weight of all experts fills whole blocks, multiplies in a dtype, and is still as it was loaded."""
    weight = getattr(module, name, None)
    if not isinstance(weight, nn.Parameter) or weight.device.type != "cpu":
        return False
    if module.has_bias and getattr(module, f"{name}_bias").dtype != dtype:
        return False
    if held := _quantized(module, name):
        outputs, inputs = held.shape[1:]
        in_bf16 = held.settings.load_in_8bit or held.settings.bnb_4bit_compute_dtype == torch.bfloat16
        return dtype == torch.bfloat16 and in_bf16 and fills_blocks(outputs, inputs, held.states[0])
    if weight.dtype != dtype or weight.dim() != 3 or "forward" in vars(module):
        return False
    outputs, inputs = _matrix(module, name, 0).shape
    return fills_blocks(outputs, inputs, None)


def _quantized(module: Any, name: str) -> Any:
    """Return how a weight is quantized; None for a plain one."""
    return getattr(module, "quantized_experts", {}).get(name)


def _matrix(module: Any, name: str, expert: int) -> Tensor:
    """Return one expert's matrix [out, in], or its codes."""
    weight: Tensor = getattr(module, name)[expert]
    return weight.mT if module.is_transposed and _quantized(module, name) is None else weight


def _pack(module: Any, name: str, *, interleaved: bool = False) -> list[PackedWeight]:
    """Pack one weight of all experts, and free it."""
    weight, held = getattr(module, name), _quantized(module, name)
    biases = getattr(module, f"{name}_bias") if module.has_bias else [None] * len(weight)
    packed = [
        pack_matrices(
            [_matrix(module, name, expert).detach()],
            [held and held.states[expert]],
            [biases[expert]],
            interleaved=interleaved,
        )
        for expert in range(len(weight))
    ]
    weight.data = weight.new_empty(0)
    if held:
        held.states.clear()
    return packed


def _forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Send tokens through the experts that they chose. hidden [T, D], chosen and weights [T, K] → [T, D]."""
    count = len(getattr(experts, _HELD)["down_proj"])
    return send_through(hidden, chosen, weights, count, partial(_one, experts))


def _one(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """Send rows through one expert. [N, D] → [N, D]."""
    first, last = (weights[expert] for weights in getattr(experts, _HELD).values())
    rows = rows.to(first.weight.dtype)
    if first.interleaved:
        inner = first.gated(rows)
    else:
        product = first.product(rows)
        inner = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
    made: Tensor = last.product(inner)
    return experts.post_expert_norm(made) if getattr(experts, "has_post_expert_norm", False) else made
