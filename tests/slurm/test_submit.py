"""What a submission would do, without a cluster. With one: tests/test_slurm.py."""

import gzip
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from job_helper import note_todo

from pipeline.commands.submit import main as submit
from pipeline.common.errors import ConfigError, PromptError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.request import BadRow, GenerationParams
from pipeline.config.schema import SubmitConfig
from pipeline.job.events import read_events
from pipeline.prompts.count import count_once, count_prompts
from pipeline.prompts.reader import read_prompts
from pipeline.slurm.cells import find_cells
from pipeline.slurm.memory import memory_warning, needed_bytes, parse_size
from pipeline.slurm.script import batch_script, cell_line

DRY = "submit.dry_run=true"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """A folder with prompts and a tiny model, on a machine without Slurm."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "Say {i}"}}\n' for i in range(10)))
    (tmp_path / "models").symlink_to(tiny_folder.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sh", "sed"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


JOB = ["model.name=models/tiny", "prompts=p.jsonl", DRY]


def finish(folder: Path, total: int, sha256: str, errors: int = 0) -> None:
    """Write what a finished job leaves."""
    folder.mkdir(parents=True)
    (folder / "outputs.jsonl").write_text('{"completion":"x"}\n' * total)
    note_todo(folder, [1] * 10, total, errors=errors, sha256=sha256)
    (folder / "stats.json").write_text(
        json.dumps({"rows": {"total": total, "done": total, "errors": errors}})
    )


def test_commas_and_shards_make_cells_with_a_folder_each(place: Path) -> None:
    cells, _ = find_cells([*JOB, "quant=none,nf4", "shards=4"])
    assert len(cells) == 8
    assert len({cell.folder for cell in cells}) == 8
    assert [cell.overrides[-1] for cell in cells[:4]] == ["shard=0/4", "shard=1/4", "shard=2/4", "shard=3/4"]
    assert [cell.total for cell in cells[:4]] == [3, 3, 2, 2]
    assert cells[1].folder.name == "shard-1-of-4"
    assert not any("submit" in word for cell in cells for word in cell.overrides)


def test_a_shard_lies_where_the_job_itself_would_write(place: Path) -> None:
    from pipeline.config.compose import job_folder

    (cell,), _ = find_cells([*JOB, "shard=2/4"])
    assert cell.folder == job_folder(cell.overrides).absolute()


def test_shards_equal_a_list_of_shard(place: Path) -> None:
    by_number = find_cells([*JOB, "shards=2"])[0]
    by_name = find_cells([*JOB, "shard=0/2,1/2"])[0]
    assert [cell.overrides for cell in by_number] == [cell.overrides for cell in by_name]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shards=0"], "shards=0: must be"),
        (["shards=11"], "more than the 10 rows"),
        (["shard=1/1"], "shard=1/1: must be I/N"),
        (["shard=0/2,1/3"], "different splits"),
        (["shards=2", "shard=0/2"], "once"),
        (["submit.partition=a,b"], "takes one value"),
        (["submit.partitoin=a"], "Did you mean submit.partition"),
        (["submit.time_min=2", "submit.signal_sec=120"], "submit.signal_sec=120: must be less"),
        (["submit.memory=lots"], "submit.memory='lots': must be"),
        (["resume=never"], "resume=never"),
        (["devices=2"], "one process"),
        (["submit.nodes=0"], "submit.nodes=0: must be at least 1"),
        (["submit.nodes=2"], "one job over several nodes needs engine=vllm"),
        (["submit.nodes=2", "engine=vllm"], "2 GPUs, and engine.tensor_parallel=1"),
        (["submit.nodes=2", "engine=vllm", "engine.tensor_parallel=2", "submit.gpus=0"], "0 GPUs, and"),
        (["prompts=-"], "prompts=-"),
        (["quant=nf5"], "quant=nf5: no such quant. Did you mean"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_it(
    place: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        find_cells([o for o in JOB if o.partition("=")[0] != overrides[0].partition("=")[0]] + overrides)
    assert message in str(error.value)


def test_a_complete_cell_is_left_out_until_its_prompts_or_its_errors_ask_for_more(place: Path) -> None:
    (cell,), _ = find_cells(JOB)
    sha256 = count_prompts("p.jsonl", GenerationParams(), limit=None, shards=1).sha256
    assert not cell.complete
    finish(cell.folder, 10, sha256, errors=1)
    assert find_cells(JOB)[0][0].complete
    assert not find_cells([*JOB, "retry_errors=true"])[0][0].complete
    with (place / "q.jsonl").open("w") as file:
        file.write((place / "p.jsonl").read_text().replace("Say 3", "Sing 3"))
    (place / "q.jsonl").replace(place / "p.jsonl")
    count_once.cache_clear()
    assert not find_cells(JOB)[0][0].complete, "an edited prompt"


def test_a_cell_with_rows_missing_is_not_complete(place: Path) -> None:
    (cell,), _ = find_cells(JOB)
    sha256 = count_prompts("p.jsonl", GenerationParams(), limit=None, shards=1).sha256
    finish(cell.folder, 9, sha256)
    assert not find_cells(JOB)[0][0].complete


def test_a_dry_run_prints_the_script_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit([*JOB, "shards=2", "submit.partition=gpu", "submit.gpu_type=a100", "submit.width=3"]) == 0
    script = capsys.readouterr().out
    for line in ("--partition=gpu", "--gres=gpu:a100:1", "--array=0-1%3", "--requeue", "--signal=B:USR1@120"):
        assert f"#SBATCH {line}\n" in script
    assert not (place / "outputs").exists()


def test_two_nodes_are_asked_for_with_a_task_and_the_gpus_on_each(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [*JOB, "engine=vllm", "engine.python=/opt/vllm/python", "engine.pipeline_parallel=2"]
    assert submit([*job, "engine.tensor_parallel=4", "submit.nodes=2", "submit.gpus=4", "submit.cpus=9"]) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:4", "--cpus-per-task=9"):
        assert f"#SBATCH {line}\n" in script
    assert "--num-cpus 9 --num-gpus 4" in script
    assert "vllm_python=/opt/vllm/python\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert submit([*job, "engine.tensor_parallel=4", "submit.gpus=4"]) == 0
    assert "srun" not in capsys.readouterr().out


def test_cells_over_several_nodes_have_one_python(place: Path) -> None:
    job = [*JOB, "engine=vllm", "engine.python=/a,/b", "engine.tensor_parallel=2", "submit.nodes=2"]
    with pytest.raises(ConfigError, match=r"engine\.python=/a,/b: Ray is started with one of them"):
        submit(job)


def test_a_ray_that_does_not_start_is_a_failed_job_that_says_where_to_look(place: Path) -> None:
    (place / "cells.txt").write_text(cell_line(place / "job", ["prompts=p"]) + "\n")
    script = batch_script(
        SubmitConfig(nodes=2), place, place, offset=0, count=1, width=None, vllm_python="/no/python"
    )
    environment = {
        "PATH": "/usr/bin:/bin", "SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
    }  # fmt: skip
    before = set(Path("/tmp").glob("ray-*"))
    done = subprocess.run(
        ["/bin/bash"], input=script, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ExitStatus.FAILED
    assert f"Error: Ray has not started on 2 nodes: {place}/7_0.ray.log has what it said" in done.stderr
    assert read_events(place / "job").ended["status"] == ExitStatus.FAILED
    assert set(Path("/tmp").glob("ray-*")) <= before


def test_the_script_is_bash(place: Path) -> None:
    config = SubmitConfig(setup=["module load 'a b'"], environment={"A": "it's"}, python="/my env/python")
    script = batch_script(config, place / "s", place, offset=1001, count=9, width=None)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "cell}" not in script.replace("${cell[0]}", "").replace("${cell[@]:1}", "")
    assert "export A='it'\"'\"'s'" in script


def test_overrides_reach_the_job_unchanged_whatever_is_in_them(place: Path) -> None:
    words = [
        "system='it''s \"so\" $HOME `ls` \\n'",
        "a=b c",
        "stop=[\"\n\",'x']",
        "한국어=;|&",
        "tab=\t*?[]~!",
    ]
    line = cell_line(Path("/some where"), words)
    assert "\n" not in line
    (place / "cells.txt").write_text(line + "\n")
    script = 'eval "cell=($(sed -n 1p cells.txt))"; printf "%s\\0" "${cell[@]}"'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\0")[:-1] == ["/some where", *words]


def test_memory_is_planned_and_too_little_is_said(place: Path) -> None:
    (cell,), _ = find_cells(JOB)
    need = needed_bytes(cell.config, gpus=1)
    assert need is not None
    small, large = SubmitConfig(gpu_memory="1K"), SubmitConfig(gpu_memory="80G")
    assert "tiny: needs at least" in (memory_warning("tiny", need, small) or "")
    assert memory_warning("tiny", need, large) is None
    assert memory_warning("tiny", need, SubmitConfig()) is None
    assert [parse_size(s) for s in ("2", "3G")] == [2 * 2**20, 3 * 2**30]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_counting_agrees_with_reading(tmp_path: Path, n: int, limit: int | None, suffix: str) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt": "a"}', b"", b'{"prompt": "b", "generation": {"n": 5}}', b"not json",
        b'{"prompt": "c"}', b"  ", b'{"x": 1}', b'{"prompt": "d"}',
    ]  # fmt: skip
    path = tmp_path / f"p{suffix}"
    with gzip.open(path, "wb") if suffix.endswith("gz") else path.open("wb") as file:
        file.write(b"\r\n".join(lines))
    params = GenerationParams(n=n)
    counted = count_prompts(str(path), params, limit=limit, shards=2)
    expected = [0, 0]
    for row in read_prompts(path, params, limit=limit):
        expected[row.index % 2] += 1 if isinstance(row, BadRow) else row.params.n
    assert list(counted.totals) == expected


def test_an_empty_prompt_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(PromptError, match="holds no rows"):
        count_prompts(str(tmp_path / "p.jsonl"), GenerationParams(), limit=None, shards=1)


HOSTILE = [
    "a b",
    "it's",
    'so "quoted"',
    "$(touch gone)",
    "`touch gone`",
    "a\nb",
    "a\\",
    "*;&|",
    "학",
    "%j",
    "odd\udcff",
]


@pytest.mark.parametrize("odd", HOSTILE)
def test_whatever_is_in_paths_setup_and_environment_reaches_the_job_and_nothing_else_runs(
    place: Path, odd: str
) -> None:
    home, work = place / odd / "submission", place / "work"
    home.mkdir(parents=True)
    work.mkdir()
    python = place / odd / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$VALUE" "$SAID" "$@" >"$RESULT"\nexit 0\n')
    python.chmod(0o755)
    config = SubmitConfig(
        setup=[f"SAID={shlex.quote(odd)}", "export SAID"], environment={"VALUE": odd}, python=str(python)
    )
    cell = [f"system={odd}", "prompts=p"]
    (home / "cells.txt").write_bytes(os.fsencode(cell_line(place / odd / "job", cell) + "\n"))
    try:
        script = batch_script(config, home, work, offset=0, count=1, width=None)
    except ConfigError:
        assert re.search(r'["\\\n]', odd), "sbatch's header can hold it"
        return
    assert not re.search(r'["\\\n]', odd)
    environment = {
        "PATH": "/usr/bin:/bin", "RESULT": str(place / "result"), "SLURM_CPUS_ON_NODE": "1",
        "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0",
    }  # fmt: skip
    subprocess.run(["bash", "-n"], input=os.fsencode(script), check=True, env=environment)
    subprocess.run(["/bin/bash"], input=os.fsencode(script), check=True, env=environment, cwd=work)
    said = os.fsdecode((place / "result").read_bytes()).split("\0")[:-1]
    assert said == [str(work), odd, odd, "-m", "pipeline", *cell]
    events = (place / odd / "job" / "slurm.jsonl").read_bytes().splitlines()
    assert [json.loads(event)["event"] for event in events] == ["started", "ended"]
    assert not list(place.rglob("gone"))


@pytest.mark.parametrize("name", ["partition", "account", "qos", "gpu_type"])
@pytest.mark.parametrize("odd", HOSTILE)
def test_an_option_is_one_word_of_the_header_or_refused(place: Path, name: str, odd: str) -> None:
    config = SubmitConfig(**{name: odd})
    try:
        script = batch_script(config, place, place, offset=0, count=1, width=None)
    except ConfigError:
        assert re.search(r'["\\\n]', odd)
        return
    head, _, body = script.partition("\n\n")
    assert all(line.startswith(("#SBATCH --", "#!")) for line in head.splitlines())
    assert sum(odd in line for line in head.splitlines()) == 1
    assert odd not in body or odd in ("a b", "%j")


def test_more_options_and_names_of_variables_are_checked(place: Path) -> None:
    for config in (
        SubmitConfig(options=["--hold\ntouch gone"]),
        SubmitConfig(environment={"A; touch gone": "1"}),
    ):
        with pytest.raises(ConfigError, match="gone"):
            batch_script(config, place, place, offset=0, count=1, width=None)


@pytest.mark.parametrize("prompts", ["/dev/stdin", "/dev/fd/0", "pipe"])
def test_prompts_that_come_once_are_no_clusters(place: Path, prompts: str) -> None:
    os.mkfifo(place / "pipe")
    with pytest.raises(ConfigError, match=f"prompts={prompts}: a cluster's node cannot read"):
        find_cells([f"prompts={prompts}" if word.startswith("prompts=") else word for word in JOB])
