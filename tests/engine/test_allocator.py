"""torch's allocator is set where it can be, before torch is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.allocator import allocator_settings

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


@pytest.mark.parametrize("arguments", [["score", "nowhere", "baseline=nowhere"], ["--help"]])
def test_it_is_set_before_torch_is_there(arguments):
    code = (
        "import sys, pipeline.engine.allocator as a; seen = [];"
        "a.set_allocator = lambda: seen.append('torch' in sys.modules);"
        f"import pipeline.__main__ as m; m.main({arguments}); sys.exit(seen != [False])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
