"""Model folders whose files say what no model's do: each is refused in one sentence, at once, by every command."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from job_helper import arguments, run_job, write_rows

from pipeline.commands.door import main
from pipeline.common.errors import PipelineError
from pipeline.config.compose import job_folder, read_config
from pipeline.config.quant import QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.models.loading import load_model
from pipeline.views.machine import State
from pipeline.views.model import check_access, check_tokenizer
from pipeline.views.room import check_room

DEEP = "[" * 100_000 + "]" * 100_000
DEEPER_THAN_ANY: Any = []
for _ in range(200):
    DEEPER_THAN_ANY = [DEEPER_THAN_ANY]
CONFIGS = {  # what is changed in config.json, and what the message must name
    "model_type a list": ({"model_type": ["llama"]}, "model_type=['llama']"),
    "model_type an object": ({"model_type": {"a": 1}}, "model_type={'a': 1}"),
    "ten million layers": ({"num_hidden_layers": 10_000_000}, "num_hidden_layers=10000000"),
    "layers as text": ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
    "plain modules as a number": (
        {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": 5}},
        "llm_int8_skip_modules=5",
    ),
    "four bits of an unknown kind": (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "zz"}},
        "bnb_4bit_quant_type='zz': must be nf4 or fp4",
    ),
    "products in an unknown dtype": (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": ["float16"]}},
        "bnb_4bit_compute_dtype=['float16']: must be float32, float16 or bfloat16",
    ),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "a vocabulary below zero": ({"vocab_size": -1}, "vocab_size=-1"),
    "ends as text": ({"eos_token_id": "abc"}, "eos_token_id='abc'"),
    "nested deeply": ({"rope_scaling": DEEPER_THAN_ANY}, "nested more than"),
    "a text part that is none": ({"text_config": "llama"}, "text_config='llama'"),
}
FILES = {  # what a file holds instead of what it should
    ("config.json", "torn"): ('{"model_type": "lla', "config.json: not JSON"),
    ("config.json", "a list"): ("[]", "config.json: not a JSON object"),
    ("config.json", "a number"): ("7", "config.json: not a JSON object"),
    ("config.json", "nested without end"): (DEEP, "config.json: not JSON"),
    ("config.json", "not text"): ("\udcff", "config.json: not JSON"),
    ("generation_config.json", "torn"): ('{"eos_token', "generation_config.json: not JSON"),
    ("generation_config.json", "a list"): ("[]", "generation_config.json: not a JSON object"),
    ("generation_config.json", "ends as text"): ('{"eos_token_id": "abc"}', "eos_token_id='abc'"),
    ("generation_config.json", "ends in a list"): ('{"eos_token_id": [2, "b"]}', "eos_token_id=[2, 'b']"),
}
INDEXES = {
    "a number for a file": '{"weight_map": {"a": 5}}',
    "a list": '{"weight_map": ["a"]}',
    "nothing": "{}",
    "empty": '{"weight_map": {}}',
    "another folder's file": '{"weight_map": {"a": "../../etc/passwd"}}',
    "nested without end": DEEP,
    "torn": '{"weight_map": {"a',
}


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def edit(path: Path, **changes: Any) -> None:
    write(path, json.dumps({**json.loads(path.read_text()), **changes}))


def refused_by_all(
    folder: Path, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, *, tree: bool = True
) -> None:
    """Run, plan, doctor's checks and the tree each end in the message, within seconds."""
    started = time.monotonic()
    with pytest.raises(PipelineError) as caught:
        load_model(ModelConfig(str(folder)), QuantConfig(), "none")
    assert expected in caught.value.found
    assert caught.value.fix
    own = [f"model.name={folder}", f"outputs_dir={tmp_path / 'out'}"]
    prompts = write_rows(tmp_path / "p.jsonl", ["{}"])
    lines = [
        ["plan", *own, "memory=24GB", f"prompts={prompts}"],
        ["inspect", "view=tokens", "text=Hello", *own],
        ["inspect", "view=architecture", *own],
    ]
    for line in lines[: 2 + tree]:
        assert main(line) != 0
        said = capsys.readouterr().err
        assert expected in said
        assert "mistake of ours" not in said
    config = read_config(own)
    checks = [*check_access(config.model, config.models_dir), *check_tokenizer(config), *check_room(config)]
    assert any(check.state is State.red and expected in check.found for check in checks)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_no_model_has_is_refused_by_every_command(case, tiny_dir, tmp_path, capsys):
    changes, expected = CONFIGS[case]
    edit(tiny_dir / "config.json", **changes)
    refused_by_all(tiny_dir, expected, capsys, tmp_path)


@pytest.mark.parametrize("case", FILES, ids=" ".join)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_every_command(case, tiny_dir, tmp_path, capsys):
    text, expected = FILES[case]
    write(tiny_dir / case[0], text)
    refused_by_all(tiny_dir, expected, capsys, tmp_path)


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_is_none_is_refused(case, tiny_dir):
    (tiny_dir / "model.safetensors").unlink()
    write(tiny_dir / "model.safetensors.index.json", INDEXES[case])
    with pytest.raises(PipelineError, match="index") as caught:
        load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none")
    assert caught.value.fix
    config = read_config([f"model.name={tiny_dir}"])
    assert check_access(config.model, config.models_dir)[0].state is State.red


@pytest.mark.parametrize(
    "header", [b"\xff" * 8 + b"{}", b"\x00" * 8, b"\x04" + b"\x00" * 7 + b"{{{{", b"\x08"]
)
def test_weights_with_a_damaged_header_are_refused(header, tiny_dir):
    (tiny_dir / "model.safetensors").write_bytes(header)
    with pytest.raises(PipelineError, match="corrupt or cut short") as caught:
        load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none")
    assert caught.value.fix


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "I32", "shape": [1], "data_offsets": [0, 1e999]}',
        '{"dtype": "I32", "shape": [Infinity], "data_offsets": [0, 4]}',
        f'{{"dtype": "I32", "shape": [{10**200}, {10**200}], "data_offsets": [0, 4]}}',
        '{"dtype": "I32", "shape": [1], "data_offsets": [0, 4000000000]}',
        '{"dtype": 5, "shape": [-1, -1], "data_offsets": [0, 4]}',
    ],
)
def test_a_plan_of_a_quantized_checkpoint_believes_no_header_that_lies(entry, tiny_dir, capsys):
    edit(tiny_dir / "config.json", quantization_config={"quant_method": "\x1b[31mgptq" * 500, "bits": 4})
    header = f'{{"lm_head.weight": {entry}}}'.encode()
    (tiny_dir / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert main(["plan", f"model.name={tiny_dir}", "memory=24GB"]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors: corrupt or cut short" in said
    name = job_folder([f"model.name={tiny_dir}"]).name
    assert len(name) < 100
    assert "\x1b" not in said + name


VALUES: list[Any] = [None, True, -1, 10**30, 1.5, "abc", ["a"], {"a": 5}]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_whatever_a_key_holds_the_end_is_a_model_or_one_sentence(name, value, tiny_dir, tmp_path, capsys):
    """Every other key of each file in turn is planned; of every sixth the tree is made and the model loaded."""
    path, turn = tiny_dir / name, VALUES.index(value)
    before = path.read_text()
    own = [f"model.name={tiny_dir}", f"prompts={write_rows(tmp_path / 'p', ['{}'])}"]
    for number, key in enumerate(json.loads(before), turn):
        if number % 2:
            continue
        edit(path, **{key: value})
        lines = [["plan", "memory=24GB", *own], ["inspect", "view=architecture", *own]]
        chosen = number % 6 == 0
        for line in lines[: 1 + chosen]:
            main(line)
            assert "mistake of ours" not in capsys.readouterr().err, (key, line)
        if chosen:
            with contextlib.suppress(PipelineError):  # whose two parts are not optional
                load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none")
        write(path, before)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "magic"}}'])
def test_a_tokenizer_that_is_none_is_refused_by_every_command(text, tiny_dir, tmp_path, capsys):
    write(tiny_dir / "tokenizer.json", text)
    refused_by_all(tiny_dir, "tokenizer", capsys, tmp_path, tree=False)


class TestAdapters:
    def test_an_adapter_alone_names_its_base_and_what_to_do(self, tiny_dir, capsys):
        (tiny_dir / "config.json").unlink()
        write(
            tiny_dir / "adapter_config.json", '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
        )
        for line in (["plan", "memory=24GB"], ["inspect", "view=architecture"]):
            assert main([*line, f"model.name={tiny_dir}"]) != 0
            said = capsys.readouterr().err
            assert "an adapter of org/base" in said
            assert f"Run it as model.adapter={tiny_dir}, with model.name=org/base or without" in said
        with pytest.raises(PipelineError, match="an adapter of org/base"):
            load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none")

    def test_an_adapter_beside_full_weights_is_not_passed_over(self, tiny_dir, tmp_path):
        write(tiny_dir / "adapter_config.json", '{"base_model_name_or_path": "org/base"}')
        with pytest.raises(PipelineError, match="a model and an adapter of org/base"):
            run_job(
                arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "out")
            )
