"""The wheel, installed in an environment of its own, runs from an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Outside the checkout: nothing on the path leads back to it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL,
        env={**env, "PWD": str(cwd), "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel('{folder}'))"
    done = subprocess.run(
        [sys.executable, "-c", build], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment: the wheel, and our own environment's libraries."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    made = folder / "bin" / "python"
    site = Path(
        run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def test_the_wheel_holds_the_package_its_configs_and_its_jobs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "jobs"):
        files = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()]
        assert files
        assert {f"pipeline/shipped/{file}" for file in files} <= set(names)
    for module in (ROOT / "pipeline").rglob("*.py"):
        assert str(module.relative_to(ROOT)) in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pipeline", "llm_job_pipeline"}


def test_the_installed_package_is_the_wheels(python, tmp_path):
    done = run(python, "-c", "import pipeline.config.schema as c; print(c.__file__, c.root())", cwd=tmp_path)
    file, root = map(Path, done.stdout.split())
    assert python.parent.parent in file.parents
    assert root == file.parent.parent / "shipped"


def test_the_console_command_is_the_door(python, tmp_path):
    code = (
        "import sys; from importlib.metadata import entry_points; "
        "(door,) = entry_points(group='console_scripts', name='lmjob'); sys.exit(door.load()())"
    )
    done = run(python, "-c", code, "plan", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python -m pipeline plan model=llama" in done.stdout


def test_help_and_a_config_error_answer_from_an_empty_folder(python, tmp_path):
    done = run(python, "-m", "pipeline", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nf4_single" in done.stdout
    done = run(python, "-m", "pipeline", "model=smolm2", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean smollm2?" in done.stderr


def test_a_job_runs_from_an_empty_folder(python, tiny_folder, tmp_path):
    job = [f"model.name={tiny_folder}", "prompts=jokes.jsonl", "limit=2", "generation.max_new_tokens=4"]
    done = run(python, "-m", "pipeline", *job, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "outputs" / "jokes").glob("*/outputs.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["error"] for row in rows] == [None, None]
    assert json.loads((written.parent / "manifest.json").read_text())["versions"]["transformers"]
