"""What numba compiled is used again only with the same sources and on the same kind of CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

ROOT = Path(__file__).resolve().parents[3]
LOOK = (
    "from pipeline.engine.cpu.kernels.compiled import compiling, keep_apart; from numba import config;"
    "keep_apart(); print(config.CACHE_DIR)"
)


def looked_up(root: Path, then: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    """Ask a process of its own where it keeps what it compiles, and have it go on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return subprocess.run(
        [sys.executable, "-c", f"{LOOK}\n{then}"],
        env={**environment, "PYTHONPATH": str(root), **settings},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )


def folder_of(root: Path, **settings: str) -> Path:
    return Path(looked_up(root, **settings).stdout.strip())


def test_sources_and_kinds_of_cpu_have_folders_of_their_own(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    here = folder_of(ROOT, **cache)
    older = folder_of(ROOT, **cache, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma")
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    assert folder_of(tmp_path, **cache) == here
    with (tmp_path / "pipeline/engine/cpu/kernels/vectors.py").open("a") as source:
        source.write("\n")
    changed = folder_of(tmp_path, **cache)
    assert len({here, older, changed}) == 3
    assert {folder.parent for folder in (here, older, changed)} == {tmp_path / "cache" / "llm-job-pipeline"}


def test_a_users_own_cache_is_taken(tmp_path):
    assert folder_of(ROOT, NUMBA_CACHE_DIR=str(tmp_path)).parent == tmp_path


def test_a_first_start_says_that_it_compiles(tmp_path):
    own = {"NUMBA_CACHE_DIR": str(tmp_path)}
    folder_of(ROOT, **own).mkdir()  # as numba does for what it keeps
    bf16, floats = (f"with compiling('{name}'): pass" for name in ("torch.bfloat16", "torch.float32"))
    assert looked_up(ROOT, bf16, **own).stderr == "Compiling for this CPU: some 15 seconds, once\n"
    assert looked_up(ROOT, bf16, **own).stderr == ""
    assert looked_up(ROOT, floats, **own).stderr, "each precision has kernels of its own"


def test_it_is_said_again_where_compiling_did_not_end(tmp_path):
    own = {"NUMBA_CACHE_DIR": str(tmp_path)}
    folder_of(ROOT, **own).mkdir()
    looked_up(ROOT, "with compiling('x'): raise SystemExit", **own)
    assert looked_up(ROOT, "with compiling('x'): pass", **own).stderr.startswith("Compiling")
