"""The doctor: findings with a next step, an exit status for scripts, never a token."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from machines import H100, MI300, MIG_SLICE, T4, UNREADABLE

from pipeline.commands.door import main
from pipeline.config.compose import read_config
from pipeline.engine.cpu import load_kernels
from pipeline.models.loading import load_tokenizer
from pipeline.prompts.chat import prepare_chat
from pipeline.views import machine as health
from pipeline.views.machine import State, check_bitsandbytes, check_gpu, check_kernels, check_version
from pipeline.views.model import check_access, check_tokenizer
from pipeline.views.room import check_room

SECRET = "hf_ThisMustNeverBePrinted"


@pytest.fixture
def config(tiny_dir, tmp_path):
    return read_config([f'model.name="{tiny_dir}"', "quant=nf4", f"outputs_dir={tmp_path}/out"])


def states(checks):
    return {check.name: check.state for check in checks}


def test_a_good_machine_and_model_pass_with_status_0(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    file = tmp_path / "doctor.json"
    status = main(
        ["doctor", f'model.name="{tiny_dir}"', "quant=nf4", f"outputs_dir={tmp_path}/out", f"json={file}"]
    )
    out = capsys.readouterr().out
    checks = json.loads(file.read_text())["checks"]
    assert [check for check in checks if check["state"] == "red"] == []
    assert status == 0
    assert "A job can run here." in out
    names = {check["name"] for check in checks}
    assert {
        "torch",
        "cpu",
        "cpu kernels",
        "bitsandbytes nf4 on cpu",
        "hub login",
        "model files",
        "BOS",
        "slurm",
    } <= names
    assert SECRET not in out + file.read_text()
    assert "\x1b" not in out


def test_a_model_that_cannot_be_had_is_red_with_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["doctor", "model=qwen", f"models_dir={tmp_path}"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "HF_HUB_OFFLINE is set, and the weights are not on this machine" in out
    assert "hf download Qwen/Qwen3-4B-Instruct-2507" in out


def test_a_misspelt_key_is_status_2(capsys):
    assert main(["doctor", "modle=smollm2"]) == 2
    assert "Did you mean model?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.49.2", State.red), ("0.50.2", State.green), (None, State.red), ("0.51.0+cu130", State.green)],
)
def test_versions_known_to_be_bad_are_red(version, state):
    check = check_version("bitsandbytes", ">=0.50", "slow", version)
    assert check.state is state
    assert bool(check.next_step) == (state is State.red)


def test_without_numba_the_kernels_are_yellow(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # with a GPU nobody asks
    (found,) = check_kernels()
    assert found.state is (State.green if importlib.util.find_spec("numba") else State.yellow)
    if (kernels := load_kernels()) and kernels.products:
        assert found.found == f"compiled; products of {kernels.MULTIPLIES}"
    monkeypatch.setattr("pipeline.views.machine.load_kernels", load_kernels.__wrapped__)  # asks again
    monkeypatch.delitem(sys.modules, "pipeline.engine.cpu.kernels.operators", raising=False)
    for name in ("operators", "loops"):
        monkeypatch.delattr(f"pipeline.engine.cpu.kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pipeline.engine.cpu.kernels.loops", None)
    (missing,) = check_kernels()
    assert missing.state is State.yellow
    assert "[cpu]" in missing.next_step


def test_bitsandbytes_is_judged_by_its_product(monkeypatch):
    device = torch.device("cpu")
    assert [check.state for check in check_bitsandbytes(device)] == [State.green, State.green]
    monkeypatch.setattr(health, "TOLERANCE", 0.0)
    monkeypatch.setattr(health, "INT8_TOLERANCE", 0.0)
    assert [check.state for check in check_bitsandbytes(device)] == [State.red, State.red]


def test_a_device_that_bitsandbytes_cannot_use_is_red_and_not_a_traceback():
    checks = check_bitsandbytes(torch.device("meta"))
    assert {check.state for check in checks} == {State.red}
    assert all(check.next_step for check in checks)


@pytest.mark.parametrize(
    ("gpu", "state", "words"),
    [
        (T4, State.green, "Tesla T4, compute capability 7.5, 15.5 GB of 15.8 GB free, no bfloat16 of its own"),
        (H100, State.green, "NVIDIA H100 80GB HBM3, compute capability 9.0, 84.0 GB of 84.9 GB free, bfloat16"),
        (replace(H100, free_bytes=10**10), State.yellow, "10.0 GB of 84.9 GB free"),
        (replace(H100, capability=(12, 0)), State.red, "compute capability 12.0"),
        (MIG_SLICE, State.green, "1g.10gb, a MIG slice, compute capability 9.0, an unknown part of 10.0 GB free"),
        (MI300, State.green, "AMD Instinct MI300X, 205.8 GB of 206.1 GB free, bfloat16"),
        (UNREADABLE, State.green, "an NVIDIA GPU, an unknown part of an unknown size free, bfloat16"),
    ],
)  # fmt: skip
def test_a_gpu_is_shown_with_what_decides(gpu, state, words):
    check = check_gpu("cuda:0", gpu, ["sm_75", "sm_80", "sm_86", "sm_90"])
    assert (check.state, bool(check.next_step)) == (state, state is not State.green)
    assert words in check.found


def test_a_gpu_that_cannot_be_read_leaves_the_memory_open(config, monkeypatch):
    monkeypatch.setattr("pipeline.memory.devices.visible_gpus", lambda: (UNREADABLE,))
    found = {check.name: check for check in check_room(config)}
    assert found["memory"].state is State.yellow
    assert "The memory of an NVIDIA GPU cannot be read here" in found["memory"].found
    assert "memory=24GB" in found["memory"].next_step


def test_missing_weights_are_red(config, tiny_dir):
    (tiny_dir / "model.safetensors").unlink()
    assert states(check_access(config.model, config.models_dir)) == {"model files": State.red}


def test_a_config_without_a_layer_is_red(config, tiny_dir):
    path = tiny_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": -1}))
    found = {check.name: check for check in check_room(config)}["model config"]
    assert found.state is State.red
    assert "num_hidden_layers=-1" in found.found


def test_a_second_bos_is_red_and_a_base_model_yellow(config):
    config.model.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    assert states(check_tokenizer(config))["BOS"] is State.red


def test_a_turns_end_that_does_not_end_a_completion_is_named(config, tiny_dir):
    assert "turn's end" not in states(check_tokenizer(config))
    path, tokenizer = tiny_dir / "generation_config.json", load_tokenizer(config.model, config.models_dir)
    end = prepare_chat(tokenizer, config).turn_end
    assert end == tokenizer.eos_token
    other = next(token for token in tokenizer.all_special_tokens if token != end)
    config.model.chat_template = tokenizer.chat_template.replace(end, other)
    found = {check.name: check for check in check_tokenizer(config)}["turn's end"]
    assert (found.state, other in found.found) == (State.yellow, True)
    before = path.read_text()
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(other)]
    path.write_text(json.dumps({"eos_token_id": ids}))
    assert "turn's end" not in states(check_tokenizer(config))
    path.write_text(before)
    config.generation.stop = [other]  # as it advises
    assert "turn's end" not in states(check_tokenizer(config))


def test_a_date_and_a_thinking_switch_are_named(config):
    config.model.chat_template = (
        "{{ bos_token }}{{ strftime_now('%d') }}{{ messages[0]['content'] }}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    found = {check.name: check for check in check_tokenizer(config)}
    assert found["template's date"].state is State.yellow
    config.model.template_date = "2024-07-26"  # as it advises
    assert "template's date" not in states(check_tokenizer(config))
    config.model.chat_template_kwargs = {"enable_thinkin": False}
    assert states(check_tokenizer(config))["template's arguments"] is State.yellow
    assert "the prompt opens it" in found["thinking"].found


def test_a_model_that_does_not_fit_is_red_before_a_weight_is_read(config, tmp_path):
    (tmp_path / "huge").mkdir()
    facts = json.loads((tmp_path / "models" / "tiny" / "config.json").read_text())
    (tmp_path / "huge" / "config.json").write_text(json.dumps({**facts, "vocab_size": 10**11}))
    config.model.name = str(tmp_path / "huge")
    found = {check.name: check for check in check_room(config)}
    assert found["memory"].state is State.red
    assert "does not fit" in found["memory"].found
    assert found["disk for outputs"].state is State.green
