"""The floors: a module imports lower floors only (or its own, without a cycle), and stays small."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
FLOORS = {
    0: """energy errors request interrupt intervals merge_stats memory_limits gpu gpu_tools allocator
          engine.limits""",
    1: """checkpoint_format config prompts prompt_row prompt_count prompt_lengths results todo standing fingerprint
          display ledger watchdog devices architecture memory_plan memory_peaks cluster batch_script merge cell_state
          engine.scheduler""",
    2: """accelerators chat checkpoint capacity host_memory memory_compare model_facts fit engine.kv_cache engine.batch
          engine.attention engine.fused_model engine.sampling engine.stats engine.forward engine.probe engine.cpu
          engine.paged engine.rectangles engine.out_of_memory survey""",
    3: """engine.engine loading loading_checks memory_check memory_stats timeline gguf rows manifest scoring inside
          health model_health""",
    4: "generate progress job_stats report",
    5: """__main__ compose help multirun plan plan_tables inspect submit sweep_cells status doctor score
          import_gguf notebook runner""",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50


def name_of(path: Path) -> str:
    """`engine.batch` for pipeline/engine/batch.py; a package is called after its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def floor_of(module: str) -> int | None:
    """A module's own floor, else its package's; None if nobody has given it one."""
    packages = (module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1))
    return next((FLOOR[name] for name in packages if name in FLOOR), None)


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
    """The module of ours that a dotted name lies in: `pipeline.request.Request` is in `request`."""
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


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_every_module_has_a_floor(module):
    assert floor_of(module) is not None, (
        f"pipeline/{module.replace('.', '/')}.py has no floor: add it to FLOORS in tests/test_floors.py and to "
        "the table in CONTRIBUTING.md, one floor above the highest module that it imports"
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_climb(module):
    floor = floor_of(module)
    climbs = [
        f"{MODULES[module]}:{line}: {module} (floor {floor}) imports {target} (floor {floor_of(target)})"
        for line, target in imports_of(module)
        if floor is not None and (above := floor_of(target)) is not None and above > floor
    ]
    assert not climbs, "\n".join(climbs)


def test_imports_make_no_cycle():
    graph = {module: {target for _, target in imports_of(module)} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a cycle of imports: " + " → ".join(error.args[1]), pytrace=False)


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [
        ({"torch", "transformers", "accelerate", "bitsandbytes"}, {2, 3}),
        ({"hydra", "omegaconf", "hydra_plugins"}, {5}),
    ],
    ids=["torch", "hydra"],
)
def test_heavy_libraries_stay_on_their_floors(libraries, allowed):
    strays = [
        f"{path}:{line}: {name} belongs on floors {sorted(allowed)}"
        for module, path in MODULES.items()
        for line, name in imported(module)
        if name.partition(".")[0] in libraries and floor_of(module) not in allowed
        # The schema is Hydra's own.
        if not (module == "config" and "hydra" in libraries)
    ]
    assert not strays, "\n".join(strays)


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
