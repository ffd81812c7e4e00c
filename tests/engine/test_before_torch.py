"""torch's allocator and its threads' waiting are set where they can be, before torch is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine import before_torch
from pipeline.engine.before_torch import SPINS, allocator_settings, set_environment

GROWING = "expandable_segments:True"


@pytest.mark.parametrize(
    ("environ", "platform", "version", "settings"),
    [
        ({}, "linux", "2.11.0+cu130", {"PYTORCH_ALLOC_CONF": GROWING}),
        ({}, "linux", "2.13.0", {"PYTORCH_ALLOC_CONF": GROWING}),
        ({}, "linux", "2.9.0a0+34c6371d24.nv25.8", {"PYTORCH_ALLOC_CONF": GROWING}),
        ({}, "linux", "2.8.1+cu128", {"PYTORCH_CUDA_ALLOC_CONF": GROWING}),
        ({"PYTORCH_ALLOC_CONF": ""}, "linux", "2.11.0+cu130", {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "linux", "2.11.0+cu130", {}),
        ({}, "win32", "2.11.0+cu130", {}),
        ({}, "darwin", "2.11.0", {}),
        ({}, "linux", "2.9.1+rocm6.4", {}),
        ({}, "linux", "2.9.1+xpu", {}),
        ({}, "linux", "2.13.0+cpu", {}),
    ],
)
def test_segments_grow_where_they_can_unless_the_user_chose(environ, platform, version, settings):
    assert allocator_settings(environ, platform, version) == settings


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_sleep_soon_unless_the_user_chose(monkeypatch, chosen, spins):
    environment = dict(chosen)
    monkeypatch.setattr(before_torch.os, "environ", environment)
    set_environment()
    assert environment.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("arguments", [["score", "nowhere", "baseline=nowhere"], ["--help"]])
def test_it_is_set_before_torch_is_there(arguments):
    code = (
        "import sys, pipeline.engine.before_torch as a; seen = [];"
        "a.set_environment = lambda: seen.append('torch' in sys.modules);"
        f"import pipeline.__main__ as m; m.main({arguments}); sys.exit(seen != [False])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
