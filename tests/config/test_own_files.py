"""A user's own job files: an ordinary mistake is told as what it is, with the file, and never as one of ours."""

from pathlib import Path

import pytest

from pipeline.commands.door import main

GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limit: 2\n", "own.yaml: does not begin with # @package _global_. Make that its first line."),
        ("", "own.yaml: does not begin with"),
        (f"{GLOBAL}limit:\t2\n\tseed: 1\n", "own.yaml:2: found character '\\t'"),
        (f"{GLOBAL}limit: 2\nlimit: 3\n", "own.yaml:3: found duplicate key limit. Keep one."),
        (f'{GLOBAL}system: "2\n', "own.yaml:3: found unexpected end of stream"),
        (f"{GLOBAL}system: !!python/name:os.x\n", "own.yaml:2: could not determine a constructor"),
        (f"{GLOBAL}- limit\n- 2\n", "own.yaml: a list or a word, and no lines of KEY: VALUE"),
        (f"{GLOBAL}5\n", "own.yaml: "),
        (b"\xff\xfe\x00", "own.yaml: not UTF-8 text"),
        (f"{GLOBAL}generation: [1, 2]\n", "jobs/own.yaml: "),
        (f"{GLOBAL}limit: two\n", "jobs/own.yaml: limit: Value 'two'"),
        (f"{GLOBAL}limt: 2\n", "limt: no such key in jobs/own.yaml. Did you mean limit?"),
        (f"{GLOBAL}limit:2\n", "own.yaml"),
        (f"{GLOBAL}system: &a [*a]\n", "own.yaml: "),
        (f"{GLOBAL}defaults: 5\n", "defaults must be a list"),
        (f"{GLOBAL}defaults:\n  - model: gemma\n", "Write it as `- override /model: NAME`."),
        (f"{GLOBAL}defaults:\n  - nonesuch: a\n", "defaults: nonesuch: no such group. There are: model"),
        (f"{GLOBAL}defaults:\n  - override /modell: gemma\n", "modell: no such key. Did you mean model?"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named(
    text: str | bytes,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n')
    assert main(["jobs=own", "prompts=p.jsonl"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "report it" not in told
    assert told.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
