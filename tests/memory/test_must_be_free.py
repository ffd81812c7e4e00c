"""A job loads in what the plan says has to be free, however large the file that it maps is."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_helper import environment, job_folder, write_rows

from pipeline.common.host import CGROUPS


@pytest.fixture
def control_group() -> Iterator[Callable[[int], Path | None]]:
    """Make a group with a limit of memory, where this machine lets us; else None."""
    made: list[Path] = []

    def make(limit_bytes: int) -> Path | None:
        version_1 = (CGROUPS / "memory").is_dir()
        group = (CGROUPS / "memory" if version_1 else CGROUPS) / f"pipeline-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
            made.append(group)
            limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
            limit.write_text(str(limit_bytes))
        except OSError:
            return None
        return group

    yield make
    for group in made:
        group.rmdir()


def job(command: list[str], group: Path | None = None) -> dict[str, Any]:
    """What stats.json says of a job in a process of its own, which enters the group before it does anything."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command, "resume=never"], preexec_fn=enter, capture_output=True,
        text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((job_folder(command) / "stats.json").read_text())["memory"])


def test_a_job_loads_under_a_limit_of_what_has_to_be_free_and_a_tenth(smollm2_dir, control_group, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", [{"prompt": "Hi"}])
    command = [f"model.name={smollm2_dir}", f"prompts={rows}", f"outputs_dir={tmp_path / 'out'}", "quant=nf4"]
    command += ["generation.max_new_tokens=2", "engine.max_rows=1"]
    free = job(command)
    needed, mapped = (free["predicted"][f"{part}_bytes"] for part in ("load_peak", "load_mapped"))
    assert mapped == 269_030_016
    assert needed == pytest.approx(free["measured"]["load_peak_bytes"], rel=0.1)
    assert free["error_percent"]["load_mapped"] is None
    limited = job(command, control_group(free["bare_bytes"] + needed * 11 // 10))
    assert limited["measured"]["load_peak_bytes"] < needed * 1.1


def test_weights_that_are_only_mapped_need_nothing_free_and_have_no_figure_to_be_wrong(smollm2_dir, tmp_path):
    """As on a CPU whose products are not our own: nothing is packed, and nothing is read before the run."""
    rows = write_rows(tmp_path / "one.jsonl", [{"prompt": "Hi"}])
    command = [
        f"model.name={smollm2_dir}",
        f"prompts={rows}",
        f"outputs_dir={tmp_path / 'out'}",
        "quant=none",
    ]
    memory = job([*command, "generation.max_new_tokens=2", "engine.max_rows=1", "engine.pack_weights=false"])
    assert memory["predicted"]["load_peak_bytes"] is None
    assert memory["error_percent"]["load_peak"] is None
    assert memory["predicted"]["load_mapped_bytes"] == 269_030_016
    assert memory["measured"]["load_peak_bytes"] < 40_000_000
    assert memory["predicted"]["run_peak_bytes"] > 269_030_016
