"""The house: a file imports its own folder and earlier ones, stays small, and a light command stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from job_helper import environment, note_todo

from pipeline.commands.table import COMMANDS

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
FOLDERS = [
    "common",
    "config",
    "prompts",
    "engine",
    "models",
    "memory",
    "views",
    "job",
    "slurm",
    "report",
    "commands",
]
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_IMPORTS = 400, 50, 12


def name_of(path: Path) -> str:
    """`engine.batch` for pipeline/engine/batch.py; a package is called after its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def place_of(module: str) -> int:
    """The place of a module's folder among FOLDERS; the front door comes last."""
    folder = module.partition(".")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def imported(module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{MODULES[module]}:{node.lineno}: write the import in full, as pipeline.…"
            )
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own(name: str) -> str | None:
    """The module of ours that a dotted name lies in: `pipeline.common.request.Request` is in `request`."""
    package, _, rest = name.partition(".")
    while package == "pipeline" and rest:
        if rest in MODULES:
            return rest
        rest = rest.rpartition(".")[0]
    return None


def imports_of(module: str) -> Iterator[tuple[int, str]]:
    """Line and name of each module of ours that a module imports."""
    for line, name in imported(module):
        if (target := own(name)) is not None:
            yield line, target


def test_the_package_is_its_folders():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        FOLDERS
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_climb(module):
    climbs = [
        f"{MODULES[module]}:{line}: {module} imports {target}"
        for line, target in imports_of(module)
        if place_of(target) > place_of(module)
    ]
    assert not climbs, "\n".join(climbs)


def test_imports_make_no_cycle():
    graph = {module: {target for _, target in imports_of(module)} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a cycle of imports: " + " → ".join(error.args[1]), pytrace=False)


@pytest.mark.parametrize("module", MODULES)
def test_only_config_knows_hydra(module):
    strays = [
        f"{MODULES[module]}:{line}: {name}"
        for line, name in imported(module)
        if name.partition(".")[0] in ("hydra", "omegaconf", "hydra_plugins")
    ]
    assert not strays or module.partition(".")[0] == "config", "\n".join(strays)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_a_dozen_of_our_modules_at_most(module):
    targets = {target for _, target in imports_of(module)} - {module}
    assert len(targets) <= MAX_IMPORTS, (
        f"{MODULES[module]}: {len(targets)} of them: {', '.join(sorted(targets))}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines, at most {MAX_FILE_LINES}; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
            )


def test_no_two_files_of_tests_share_a_name():
    """They are imported by it alone."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_docstring_begins_as_half_a_sentence():
    strays = [
        f"{path}:{node.body[0].lineno}: {text.splitlines()[0]}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
        and text.split(maxsplit=1)[0] in ("Of", "From", "By", "So", "What")
    ]
    assert not strays, "\n".join(["begin with a verb:", *strays])


LIGHT = {
    "--help": 0,
    **{f"{command} --help": 0 for command in COMMANDS},
    "--cfg job": 0,
    "model=smolm2": 2,
    "-m quant=nf4,nf5": 2,
    "devices=all model.device_map=cpu": 2,
    "plan model=llama quant=nf4 memory=24GB": 0,
    "submit submit=cpu submit.dry_run=true": 0,
    "status {job}": 1,
    "merge {job}": 3,
    "report nowhere": 3,
    "export {job} to=csv": 3,
    "score nowhere": 2,
    "inspect view=nothing": 2,
    "doctor modle=smollm2": 2,
    "import-gguf nowhere.gguf": 2,
}


@pytest.mark.parametrize("line", LIGHT)
def test_a_light_command_does_not_import_torch(line, tmp_path):
    note_todo(tmp_path / "job", [1, 1], done=1)
    code = (
        "import sys; from pipeline.commands.door import main; status = main(); "
        "sys.exit(f'torch is there after {status}' if {'torch', 'transformers'} & set(sys.modules) else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.format(job=tmp_path / "job").split()],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent, env=environment(),
    )  # fmt: skip
    assert "torch is there" not in done.stderr
    assert done.returncode == LIGHT[line], done.stderr
