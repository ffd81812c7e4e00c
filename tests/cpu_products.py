"""Each way in which the CPU's kernels multiply, and older CPUs than the one at hand."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.cpu.kernels import linear_vectors
from pipeline.engine.cpu.kernels.tiles import has_tiles
from pipeline.engine.cpu.packing import pack_weights
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.rectangles.rectangle import regroup
from pipeline.engine.scheduler import Sample

ULP = 2.0**-8  # half the spacing of bf16, as a share: what rounding an output may change
# What one has not: instructions for bf16; AVX-512; and those for sums of products of whole numbers.
OLDER = [("amx", "avx10", "avx512bf16", "avx512fp16"), ("amx", "avx10", "avx512")]
WITHOUT_VNNI = [(*OLDER[0], "avx512vnni", "avxvnni"), (*OLDER[1], "avxvnni")]


def linear_tiles() -> ModuleType:
    """The module of that name, on this CPU's matrix tiles or, where it has none, on software's."""
    if has_tiles():
        return importlib.import_module("pipeline.engine.cpu.kernels.linear_tiles")
    return importlib.import_module("software_tiles").linear_tiles()


PRODUCTS = {"linear_tiles": linear_tiles, "linear_vectors": lambda: linear_vectors}


def older_cpu(newer: tuple[str, ...]) -> dict[str, str]:
    """An environment in which numba compiles for a CPU without the features that begin so."""
    features = {k: has and not k.startswith(newer) for k, has in get_host_cpu_features().items()}
    flags = ",".join(("+" if has else "-") + name for name, has in sorted(features.items()))
    return {**os.environ, "NUMBA_CPU_FEATURES": flags}


def packed(**layers: nn.Module) -> nn.ModuleDict:
    """A model of these layers, packed as a job packs one."""
    block = nn.ModuleDict(layers)
    block.get_input_embeddings = lambda: nn.Embedding(1, 1, dtype=torch.bfloat16)
    pack_weights(block)
    return block


def error(found: Tensor, expected: Tensor) -> Tensor:
    """How far a product is from one in float64, root mean square."""
    return (found.double() - expected).square().mean().sqrt()


def check_ends(product: Callable[[Tensor], Tensor], signs: Tensor) -> None:
    """The largest sums fit, and the smallest count: all weights are ends of their type, and a row has their signs."""
    for size in (1.9921875, 2.0**-60, 2.0**60):
        states = signs[:1] * size
        expected = F.linear(states.double(), signs.double())
        torch.testing.assert_close(product(states).double(), expected, rtol=ULP, atol=size * 2.0**-20)


def check_not_finite(product: Callable[[Tensor], Tensor], states: Tensor, number: float) -> None:
    """A number that is not finite stays so in its own row. states [5, K]."""
    expected = product(states)
    states[3, 70] = number
    found = product(states)
    assert not torch.isfinite(found[3]).any()
    others = [0, 1, 2, 4]
    assert torch.equal(found[others], expected[others])


def sample(length: int) -> Sample:
    return Sample(Request(f"of {length}", (1,) * length, GenerationParams()), 0)


def fed_one_by_one(forward: FlatForward, ids: list[int], given: int) -> Tensor:
    """Prefill the first tokens in chunks of 16 beside a shorter row, then decode the rest: logits [.., V]."""
    row, other = sample(0), sample(4)
    row.token_ids += ids[:given]
    rectangle, logits = forward.prefill([row, other], None, 32)
    found = [logits[0].float()]
    for token in ids[given:]:
        row.token_ids.append(token)
        other.token_ids.append(7)
        if rectangle.full:
            (rectangle,) = regroup([rectangle], [rectangle.rows])
        found.append(forward.decode([rectangle])[0].float().clone())  # which the next step overwrites
        rectangle.head += 1
    return torch.stack(found)
