"""Triton's kernels on a CPU, by its interpreter."""

import os
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def interpreted(name: str) -> ModuleType:
    """Import a module of kernels; the test is left out where they would be compiled for a GPU."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the GPU of this machine: benchmarks/gpu_check.py tries them")
    return import_module(f"pipeline.engine.paged.{name}")


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def off(made: Tensor, wanted: Tensor) -> float:
    """How far a product is from what is wanted, as a share of that."""
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


def runs_on(ptx: str) -> bool:
    """Whether a product of Hopper's can still read its weights' registers when the next block's are written."""
    assert "wgmma.mma_async" not in ptx or "wgmma.wait_group.sync.aligned 0" in ptx
    return bool(re.search(r"wgmma\.wait_group\.sync\.aligned [1-9]", ptx))


def products_source(kernel: Any, kinds: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """What Triton compiles of a kernel of products, for addresses as torch aligns them."""
    from triton.compiler import ASTSource

    common = {"sizes": ("i32",) * 3, "results": "*bf16", "parts": "*fp32", "counters": "*i32"}
    kinds = {**kinds, **common, **dict.fromkeys(fixed, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {}
    for i, kind in enumerate(signature.values()):
        paths = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
        if isinstance(kind, tuple) or kind.startswith("*") or kernel.arg_names[i] == "inputs":
            aligned |= {path: [["tt.divisibility", 16]] for path in paths}
    return ASTSource(kernel, signature, fixed, aligned)
