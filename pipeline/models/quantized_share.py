"""Say how much of a model is quantized, and what it passed over.

It replaces linear layers, and quantized_experts.py the experts of most mixtures. A layer of a class of its own
(Falcon's), or experts whose pass is a class's own (JetMoE's), stay as they are.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.config.quant import QuantConfig
from pipeline.models.quantized_experts import held_experts

_LAYERS = ("Linear4bit", "Linear8bitLt")
NAMED = 0.05  # of all weights: less than this passed over is a router or a few small matrices


@dataclass(frozen=True, slots=True)
class QuantizedShare:
    """Hold the quantized share of a model's weights, its embedding and head included."""

    share: float
    bits: int | None
    passed_over: tuple[str, ...]  # kinds of modules that stayed plain beside these two, the largest first
    dtype: str  # of those

    @property
    def words(self) -> str:
        """Say it as a sentence: 18 % of the weights are in 4 bits; experts stayed in bfloat16."""
        rest = f"; {', '.join(self.passed_over)} stayed in {self.dtype}" if self.passed_over else ""
        return f"{100 * self.share:.0f} % of the weights are in {self.bits} bits{rest}"


def quantized_share(network: Any, quant: QuantConfig) -> QuantizedShare:
    """Compare a model's layers, loaded or on the meta device."""
    quantized = total = 0
    plain: Counter[str] = Counter()
    kept, seen = (
        {id(m) for m in (network.get_input_embeddings(), network.get_output_embeddings())},
        set[int](),
    )
    for path, module in network.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            shape = packed_shape(name, module)
            count = math.prod(shape or weight.shape)
            total += count
            quantized += count if shape else 0
            if not shape and weight.dim() > 1 and id(module) not in kept:
                plain[_kind(path, module)] += count
    named = plain.most_common() if plain.total() > NAMED * total else []
    dtype = str(getattr(network, "dtype", "")).removeprefix("torch.")
    return QuantizedShare(
        quantized / total, quant.bits, tuple(kind for kind, count in named if count > 0.01 * total), dtype
    )


def packed_shape(name: str, module: Any) -> tuple[int, ...] | None:
    """Return what a module's weight is packed from: [out, in], or that of each expert; None for a plain one."""
    if name == "weight" and type(module).__name__ in _LAYERS:
        return module.out_features, module.in_features
    held = held_experts(module).get(name)
    return None if held is None else held.shape


def _kind(path: str, module: nn.Module) -> str:
    """Name a module by the last part of its path that is no number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), type(module).__name__)
