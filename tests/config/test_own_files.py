"""A user's own configs are found from where they stand; a mistake in one is told as what it is, with the file."""

from pathlib import Path

import pytest

from pipeline.commands.door import main
from pipeline.config.compose import options, read_config
from pipeline.config.quant import QuantMethod

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


def write_configs(folder: Path, **files: str) -> None:
    """Write conf/GROUP/mine.yaml, or jobs/mine.yaml, in a folder."""
    for group, text in files.items():
        path = folder / ("jobs" if group == "jobs" else f"conf/{group}") / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)


def test_ones_own_model_quantization_and_experiment_are_found_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = "defaults: [schema, _self_]\n"
    write_configs(
        tmp_path,
        model=f"{schema}name: ORG/NAME\n",
        quant=f"{schema}method: nf4\ndtype: float16\n",
        generation=f"{schema}max_new_tokens: 7\n",
        jobs=f"{GLOBAL}defaults: [override /model: mine, override /quant: mine, override /generation: mine]\n",
    )
    monkeypatch.chdir(tmp_path)
    for chosen in (["jobs=mine"], ["model=mine", "quant=mine", "generation=mine"]):
        config = read_config(chosen)
        assert config.model.name == "ORG/NAME"
        assert (config.quant.method, config.quant.dtype.value) == (QuantMethod.nf4, "float16")
        assert config.generation.max_new_tokens == 7
    assert {"mine", "smollm2"} <= set(options("model"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a/b\n\tcontext: 5\n", "conf/model/mine.yaml:2: found character '\\t'"),
        ("- name\n", "conf/model/mine.yaml: a list or a word"),
        ("name: a/b\nname: c/d\n", "conf/model/mine.yaml:2: found duplicate key name. Keep one."),
    ],
)
def test_a_mistake_in_a_model_of_ones_own_is_named(
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_configs(tmp_path, model=text)
    monkeypatch.chdir(tmp_path)
    assert main(["model=mine"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "report it" not in told
