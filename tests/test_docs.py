"""What the pages say is so: links lead somewhere, commands can be typed, files copied; the reference is whole."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from job_helper import environment

import pipeline
from pipeline.commands.arguments import take_own
from pipeline.commands.door import choose
from pipeline.commands.run import FLAGS_OF_HYDRA
from pipeline.commands.table import module_of
from pipeline.config.compose import job_keys, read_config, sweep_cells

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOT_TYPED = "<!-- not typed: "  # before a block, with the reason
FILES = {"person.json": "{}"}  # that a command of the pages names


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchor of each title, as GitHub and the site make it."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def commands_of(text: str) -> list[str]:
    """Every command line in a block of a page, or between ` `; a line that ends in a backslash goes on."""
    text = re.sub(rf"{NOT_TYPED}.*?-->\n+(```.*?```|(?:    .*\n|\n)+)", "", text, flags=re.S)
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^(?:    )?(?:[A-Z_]+=\S+ )?((?:python -m pipeline|lmjob)\b.*)$", text, re.M)
    spans = re.findall(r"`((?:python -m pipeline|lmjob) [^`]+)`", text)
    return [line for line in (*lines, *spans) if "[" not in line.partition("'")[0]]  # [KEY=VALUE]: a shape


def files_of(text: str) -> dict[str, str]:
    """The files of a page: a block whose first line is their path in a comment."""
    found = {}
    for block in re.findall(r"(?:^(?:    .*)?\n)+", text, re.M):
        for part in re.split(r"\n\s*\n", block):
            lines = [line.removeprefix("    ") for line in part.strip("\n").splitlines()]
            if lines and (named := re.fullmatch(r"# ((?:conf|jobs)/\S+\.yaml)", lines[0])):
                found[named[1]] = "\n".join(lines[1:]) + "\n"
    return found


COMMANDS = [
    pytest.param(page, line, id=f"{name_of(page)}: {line[:60]}")
    for page in PAGES
    if page.name != "CHANGELOG.md"
    for line in dict.fromkeys(commands_of(text_of(page)))
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_of_the_pages_can_be_typed(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (FILES | files_of(text_of(page))).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    line = re.sub(r"\$\([^)]*\)", "x", line.replace("…", "x"))
    words = shlex.split(line, comments=True)[1:]
    words = words[2:] if words[:2] == ["-m", "pipeline"] else words
    words = words[: next((i for i, word in enumerate(words) if word in (">", "|", "2>&1")), len(words))]
    command, rest = choose(words)
    module = module_of(command)
    if {"--help", *FLAGS_OF_HYDRA} & set(rest):
        return
    if command in ("status", "merge", "report", "score", "export", "import-gguf"):
        _, folders = take_own(rest, getattr(module, "EXAMPLES", {}))
        assert all("=" not in word and not word.startswith("-") for word in folders)
        return
    swept = command in ("plan", "submit") or "-m" in rest
    _, rest = take_own([word for word in rest if word != "-m"], _own_keys(command), job_keys())
    rest = [
        word.replace("quant=all", "quant=nf4")
        for word in rest
        if not word.startswith(("shards=", "hydra/launcher="))
    ]
    for cell in sweep_cells(rest) if swept else [rest]:
        read_config(cell)


def _own_keys(command: str) -> dict[str, str]:
    """A command's own keys, without those that are a job's too."""
    examples = getattr(module_of(command), "EXAMPLES", {})
    return {key: value for key, value in examples.items() if key not in ("model", "model.name", "quant")}


def test_the_pages_have_commands_and_files_to_be_tested():
    assert len(COMMANDS) > 50
    assert set(files_of(text_of(ROOT / "README.md"))) == {
        "conf/model/mine.yaml",
        "conf/quant/half.yaml",
        "jobs/first.yaml",
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.S):
        ast.parse(block)


def test_a_make_target_of_the_pages_is_there():
    made = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        assert set(re.findall(r"^    make ([a-z]+)", text_of(page), re.M)) <= set(made), page


def test_the_reference_is_what_schema_help_and_statuses_say_today(tmp_path):
    code = "from scripts.reference import PAGE, page; import sys; sys.exit(PAGE.read_text('utf-8') != page())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, "python scripts/reference.py writes it\n" + done.stderr


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = name.parent if name.name == "index" else name
        assert (tmp_path / "site" / built / "index.html").is_file(), page
    told = re.findall(r'id="pipeline\.[\w.]*\.(\w+)"', text_of(tmp_path / "site" / "api" / "index.html"))
    assert set(pipeline.__all__) <= set(told)  # as their own docstrings say
