"""Damaged files in a job's folder: what is readable is read, what is not is named, and nothing ends in a traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_helper import note_todo
from synthetic_jobs import many_rows, scores, write_job

from pipeline.commands.door import main
from pipeline.common.exit_status import ExitStatus
from pipeline.job.events import append_event
from pipeline.job.paths import JobPaths
from pipeline.report.jobs import find_jobs

ODD: list[Any] = [None, True, -1, 1e999, 10**400, "x", "", [], [1, "x", None], {}, {"a": {"b": []}}]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job with every file that is read back, and a second one beside it that is whole."""
    for quant in ("fp32", "nf4"):
        folder = write_job(tmp_path, quant, many_rows(4, quant, words=5))
        (folder / "scores.json").write_text(json.dumps(scores(0.1)))
        (folder / "pipeline.log").write_text("nothing\n")
        note_todo(folder, [1] * 4, 4)
        (folder / ".holder").write_text(
            json.dumps({"pid": 2**22 + 1, "started_sec": 1.5, "host": "x"}) + "\n"
        )
        append_event(folder, "submitted", job="1_0", log="none", total=4, prompts_sha256=None, limit=None)
        append_event(folder, "started", job="1_0", node="n1", rows=0, restarts=0)
        append_event(folder, "ended", job="1_0", status=3)
    return folder


FILES = ["stats", "manifest", "scores", "todo", "events", "rows", "config", "hydra_config", "holder"]


def shaken(value: Any, draw: random.Random) -> Any:
    """The same with one entry, however deep, that is something odd or gone."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        changed = {**value, key: shaken(value[key], draw)}
        if draw.random() < 0.15:
            del changed[key]
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], shaken(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def mutated(name: str, text: str, draw: random.Random) -> bytes:
    """A file's text, cut, with bytes flipped, or with an odd value in it."""
    kind = draw.randrange(6)
    if kind == 0:
        return text.encode()[: draw.randrange(len(text))]
    if kind == 1:
        data = bytearray(text.encode())
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    if name in ("config", "hydra_config"):
        return yaml.safe_dump(shaken(yaml.safe_load(text), draw)).encode()
    if name in ("events", "rows"):
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(shaken(json.loads(lines[at]), draw))
        return "".join(line + "\n" for line in lines).encode()
    return (json.dumps(shaken(json.loads(text), draw)) + "\n").encode()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("name", FILES)
def test_no_damage_to_a_file_is_a_traceback(job: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path: Path = getattr(JobPaths(job), name)
    whole = path.read_text()
    seed = random.randrange(1 << 32)
    for number in range(16):
        draw = random.Random(seed + number)
        path.write_bytes(mutated(name, whole, draw))
        for line in (["status", str(job.parent)], ["report", str(job.parent)], ["merge", str(job)]):
            status = main(line)
            said = capsys.readouterr().err
            assert "report it" not in said, f"seed {seed + number}: {line[0]}: {said}\n{path.read_bytes()!r}"
            assert "Error" not in said or line[0] == "merge", said
            assert status != ExitStatus.FAILED or line[0] == "merge", said


@pytest.mark.parametrize(
    ("name", "odd", "named"),
    [
        ("stats", {"rows": None, "memory": {"footprint_bytes": "x"}}, "stats.json: memory.footprint_bytes"),
        ("stats", {"timeline": [[0, 1, 2], [1]]}, "stats.json: timeline[1]"),
        ("scores", {"nll": {"value": 1}}, "scores.json: nll"),
        ("manifest", {"command": 5}, "manifest.json: command"),
        ("manifest", [], "manifest.json"),
        ("todo", {"total": "4"}, "todo.json"),
        ("hydra_config", {"hydra": [1]}, "hydra.yaml: hydra"),
        ("config", "{", "config.yaml"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(
    job: Path, name: str, odd: Any, named: str,
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if name not in ("stats", "scores"):  # the others are in no plot
        request.getfixturevalue("no_plots")
    getattr(JobPaths(job), name).write_text(odd if isinstance(odd, str) else json.dumps(odd))
    for command in ("status", "report"):
        assert main([command, str(job.parent)]) in (0, 1)
        said = capsys.readouterr().err.replace("\n", "")
        assert named in said
        assert "4" in said or command == "report"
    report = json.loads((job.parent / "report" / "report.json").read_text())
    assert [record["rows"]["done"] for record in report["jobs"]] == [4, 4]


@pytest.mark.usefixtures("no_plots")
def test_every_line_that_is_left_out_of_a_report_is_named(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = JobPaths(job).rows
    lines = rows.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"sample":0', '"sample":"x"').replace('"sample": 0', '"sample": "x"')
    lines[2] = lines[2][:20] + "\n"
    rows.write_text("".join(lines))
    (found,) = (one for one in find_jobs([job.parent]) if one.folder == job)
    assert [row["index"] for row in found.rows()] == [0, 3]
    assert found.damaged == [f"{rows}:2", f"{rows}:3"]
    assert main(["report", str(job)]) == 0
    assert f"{rows}:2" in capsys.readouterr().err.replace("\n", "")
