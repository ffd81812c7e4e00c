"""A real Slurm: two virtual nodes on this machine, with accounting and preemption (tests/slurm/)."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd")
PATIENCE_SEC = 240  # for one condition; far more than it takes
SMALL = ("submit=cpu", "submit.cpus=1", "submit.memory=2G", "submit.time_min=10")


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a fresh cluster."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    missing = [name for name in PROGRAMS if shutil.which(name, path=environment["PATH"]) is None]
    if missing:
        _cannot(f"not installed: {', '.join(missing)} (the Debian packages are in tests/slurm/slurm_up.sh)")
    if os.getuid():
        _cannot("its daemons need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # unix sockets need a short path
    up = subprocess.run(
        [ROOT / "tests/slurm/slurm_up.sh", folder],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if up.returncode == 3:
        _cannot(up.stderr.strip())
    assert up.returncode == 0, up.stderr
    yield {**environment, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    subprocess.run([ROOT / "tests/slurm/slurm_down.sh", folder], check=True, env=environment)
    shutil.rmtree(folder)


def _cannot(why: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"no Slurm: {why}", pytrace=False)
    pytest.skip(f"no Slurm: {why}")


class Place:
    """A folder to submit from, with a tiny model in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def run(self, *command: str | Path) -> str:
        done = self.try_run(*command)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def try_run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        environment = {**self.environment, "COLUMNS": "200"}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def python(self, module: str, *arguments: str) -> str:
        return self.run(sys.executable, "-m", module, *arguments)

    def submit(self, *arguments: str) -> str:
        """Returns the job's id, or nothing if there was nothing to submit."""
        return self.python("pipeline", "submit", *arguments).strip()

    def status(self) -> str:
        """The table: a line a cell, and a second one where there is more to say of it."""
        return self.try_run(sys.executable, "-m", "pipeline", "status").stderr

    def state(self, folder: Path) -> str:
        """What the table says of one cell."""
        lines = self.status().splitlines()
        heading = lines.index(str(folder.parent.relative_to(self.folder / "outputs")))
        at = next(i for i in range(heading + 1, len(lines)) if lines[i].split()[-1] == folder.name)
        more = lines[at + 1]
        return more.strip() if more.startswith("    ") else lines[at].split()[-2]

    def wait_until_idle(self) -> None:
        until(lambda: not self.run("squeue", "--noheader").strip(), "the queue to be empty")

    def folders(self, prompts: str) -> list[Path]:
        """By the order of submission: that of cells.txt."""
        text = max(self.folder.glob("outputs/.slurm/*/cells.txt")).read_text()  # the latest
        return [Path(line.split()[0]) for line in text.splitlines() if f"/{prompts}/" in line]


@pytest.fixture
def place(slurm: dict[str, str], tiny_dir: Path, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, slurm)
    yield place
    place.try_run("scontrol", "update", "nodename=n[1-2]", "state=resume")
    place.try_run("scancel", "--user=root")
    place.wait_until_idle()


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_SEC} s for {what}"
        time.sleep(0.25)


def write_prompts(path: Path, count: int) -> None:
    rows = [json.dumps({"id": f"r{i}", "prompt": f"Say the number {i} in Korean."}) for i in range(count)]
    path.write_text("\n".join(rows) + "\n")
