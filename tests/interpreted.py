"""Triton's kernels on a CPU, by its interpreter."""

import os
from importlib import import_module
from types import ModuleType

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
