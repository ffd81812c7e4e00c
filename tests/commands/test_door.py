"""The one door: every command is found, helps, and ends in one line and a status that says how."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from job_helper import ROOT, arguments, environment, write_rows

from pipeline.commands import door
from pipeline.commands.help import fit
from pipeline.commands.table import COMMANDS, module_of
from pipeline.common.exit_status import ExitStatus

PIPELINE = f"{sys.executable} -m pipeline"


def shell(line: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash, whose status is that of the first command of a pipe that failed."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, cwd=ROOT, env=environment()
    )


@pytest.mark.parametrize("arguments", [[], ["quant=nf4"], ["-m", "quant=nf4,int8"], ["+a=1"], ["~quant"]])
def test_a_line_of_overrides_is_a_job(arguments):
    assert door.choose(arguments) == ("run", arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_first_word_is_a_command(command):
    assert door.choose([command, "a", "b=c"]) == (command, ["a", "b=c"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("plam", "plan"),
        ("stats", "status"),
        ("import_gguf", "import-gguf"),
        ("submitt", "submit"),
        ("jokes.jsonl", "There are: run, demo, plan"),
    ],
)
def test_an_unknown_command_names_the_nearest(typed, meant, capsys):
    assert door.main([typed]) == ExitStatus.WRONG_CONFIG
    said = " ".join(capsys.readouterr().err.split())
    assert f"{typed}: no such command" in said
    assert meant in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_in_the_same_shape(command, capsys):
    assert door.main([command, "--help"]) == ExitStatus.DONE
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    if command != "run":
        assert text.startswith(f"{fit(COMMANDS[command] + '.')}\n  python -m pipeline {command}")
        assert all(
            f"  {key}=" in text or f" {key}=" in text for key in getattr(module_of(command), "EXAMPLES", ())
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_breaks_no_command(command, capsys):
    assert door.main([command, "--help"]) == ExitStatus.DONE
    said = capsys.readouterr().out
    for line in said.splitlines():
        assert len(line) <= 80 or line.lstrip().startswith("python -m pipeline"), line
    module = module_of(command)
    for whole in re.findall(r"^ *(python -m pipeline .*?)(?:   |$)", getattr(module, "HELP", ""), re.M):
        assert whole in said


def test_the_help_names_every_command_and_every_exit_status(capsys):
    assert door.main(["--help"]) == ExitStatus.DONE
    said = " ".join(capsys.readouterr().out.split())
    for word, meaning in [*COMMANDS.items(), *((str(int(s)), s.meaning) for s in ExitStatus)]:
        assert f" {word} {meaning} " in said


@pytest.mark.parametrize(
    "line",
    [
        "plan memory",
        "status a b",
        "status watch=yes",
        "status wach=true",
        "merge",
        "report --out=x",
        "score outputs",
        "import-gguf a.gguf",
        "import-gguf a.gguf to=b dtype=int3",
        "inspect view=all",
        "doctor jsn=a",
        "submit shards=0",
    ],
)
def test_a_wrong_command_line_is_status_2_and_one_line(line, capsys):
    assert door.main(line.split()) == ExitStatus.WRONG_CONFIG
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["--help", "plan memory=24GB", "inspect view=architecture json=-"])
def test_a_reader_that_leaves_gives_no_traceback(command):
    done = shell(f"{PIPELINE} {command} | head -c 1")
    assert len(done.stdout) == 1
    assert done.stderr == ""


def test_a_command_ends_as_it_would_when_nobody_reads_what_it_says(tmp_path):
    done = shell(f"{PIPELINE} status {tmp_path} 2>&1 | true")
    assert done.returncode == ExitStatus.WRONG_CONFIG


@pytest.mark.parametrize("command", ["--help", "plan memory=24GB"])
def test_a_full_disk_under_standard_output_is_said(command):
    done = shell(f"{PIPELINE} {command} > /dev/full")
    assert done.returncode == ExitStatus.FAILED
    assert done.stderr.startswith("Error: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_mistake_of_ours_is_one_line_that_says_where(monkeypatch, capsys):
    monkeypatch.setattr(door, "choose", lambda arguments: 1 // 0)
    assert door.main([]) == ExitStatus.FAILED
    said = capsys.readouterr().err
    assert said.startswith("Error: ZeroDivisionError: ")
    assert f"{Path(__file__).name}:" in said
    assert "please report it" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "address",
    [
        "https://user:TOKEN@hub.example/org/name",
        "http://TOKEN@hub.example",
        "https://hub.example/a?token=TOKEN",
    ],
)
@pytest.mark.parametrize(
    "line", [[], ["-m"], ["plan"], ["doctor"], ["submit"], ["inspect", "view=architecture"], ["--cfg", "job"]]
)
def test_a_token_in_an_address_is_refused_and_written_nowhere(address, line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *line, f"model.name={address}", f"outputs_dir={tmp_path / 'out'}"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == ExitStatus.WRONG_CONFIG
    assert "model.name: an address with a password or token in it" in done.stderr
    assert "TOKEN" not in done.stdout + done.stderr.replace("HF_TOKEN", "")
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_a_file_is_refused_without_being_shown(tmp_path):
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text(
        "defaults: [schema, _self_]\nname: https://user:TOKEN@hub.example/org/name\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "model=mine", f"outputs_dir={tmp_path / 'out'}"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment(), "PWD": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == ExitStatus.WRONG_CONFIG
    assert "model.name: is an address" in done.stderr
    assert "TOKEN" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_in_ascii(command):
    done = shell(f"PYTHONIOENCODING=ascii {PIPELINE} {command} --help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_a_job_its_status_and_its_report_are_said_in_ascii(tmp_path, tiny_dir):
    file = write_rows(tmp_path / "학.jsonl", [{"prompt": "Hello"}])
    words = [
        f'prompts="{file}"' if w.startswith("prompts=") else w for w in arguments(tiny_dir, file, tmp_path)
    ]
    for line in (
        [*words, "stream=true"],
        ["status", str(tmp_path)],
        ["report", str(tmp_path)],
        ["plan", "model=smollm2", "quant=all", "memory=24GB"],
        ["inspect", "view=architecture", "model=smollm2"],
        ["nonesuch-학"],
    ):
        done = shell(f"PYTHONIOENCODING=ascii {PIPELINE} {shlex.join(line)}")
        assert done.returncode == (2 if line == ["nonesuch-학"] else 0), done.stderr
        assert (done.stdout + done.stderr).isascii()
        assert "Traceback" not in done.stderr
