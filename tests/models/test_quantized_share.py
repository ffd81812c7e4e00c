"""What a quantization passes over is said, before and after loading; what it cannot do at all is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, tiny_tokenizer
from job_helper import arguments, run_job, write_rows

from pipeline.commands.door import main
from pipeline.common.errors import LoadError
from pipeline.config.compose import job_folder, read_config
from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.engine.probe import choose_forward
from pipeline.job.paths import read_json
from pipeline.memory.architecture import known_architecture
from pipeline.memory.plan import quantized_share as planned_share
from pipeline.models.loading import load_model
from pipeline.models.quantized_share import quantized_share
from pipeline.views.architecture import architecture_view
from pipeline.views.machine import State
from pipeline.views.room import check_room

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {  # attention through a narrow latent space, which reads its weights as matrices
    "n_routed_experts": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_text": (
        "Llama4TextConfig",
        {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 16},
    ),
    "falcon": ("FalconConfig", {"ffn_hidden_size": 128, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**LATENT, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
         "first_k_dense_replace": 1},
    ),
    "longcat": (
        "LongcatFlashConfig",
        {**LATENT, "zero_expert_num": 1, "moe_topk": 2, "expert_ffn_hidden_size": 64, "ffn_hidden_size": 128,
         "num_layers": 1, "head_dim": 16},
    ),
}  # fmt: skip


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny random model of the architecture, with a tokenizer."""
    kind, changes = MODELS[request.param]
    path = tmp_path / request.param
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **changes})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("folder", ["llama4_text"], indirect=True)
@pytest.mark.parametrize(("quant", "bits"), [("nf4", 4), ("int8", 8)])
def test_experts_that_stay_plain_are_said_and_counted(folder, quant, bits, tmp_path, capsys):
    """Those whose pass is a class's own: nothing says how they lie."""
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    line = [
        *arguments(folder, prompts, tmp_path / "out")[:3],
        f"quant={quant}",
        "generation.max_new_tokens=2",
    ]
    words = f"24 % of the weights are in {bits} bits; experts stayed in float32"
    assert run_job(line) == 0
    assert capsys.readouterr().err.count(words) == 1
    share = read_json(job_folder(line) / "stats.json")["memory"]["quantized_share"]
    assert share == pytest.approx(0.238, abs=0.002)
    config = read_config(line)
    view = architecture_view(config.model, config.quant, config.models_dir)
    assert (view.quantized.share, view.quantized.words) == (share, words)
    found = next(check for check in check_room(config) if check.name == "quantization")
    assert (found.state, found.found) == (State.yellow, words)
    assert main(["inspect", "view=architecture", "depth=0", *line]) == 0
    assert words in " ".join(capsys.readouterr().out.split())  # which is folded to the terminal's width


@pytest.mark.parametrize("folder", ["falcon"], indirect=True)
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_model_of_which_nothing_is_quantized_is_refused(folder, quant, tmp_path):
    with pytest.raises(LoadError, match=f"quant={quant} quantizes none of its weights") as caught:
        load_model(ModelConfig(str(folder)), QUANTS[quant], "none")
    assert "query_key_value" in caught.value.found
    assert "quant=none" in caught.value.fix
    config = read_config([f"model.name={folder}", f"quant={quant}"])
    found = next(check for check in check_room(config) if check.name == "quantization")
    assert (found.state, found.found.partition(" of")[0]) == (State.red, "0 %")
    assert load_model(ModelConfig(str(folder)), QUANTS["none"], "none").model is not None


@pytest.mark.parametrize("folder", ["deepseek_v3", "longcat"], indirect=True)
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_latent_keys_are_quantized_or_refused_as_the_model_is_loaded(folder, quant, tmp_path):
    plain = load_model(ModelConfig(str(folder)), QUANTS["fp32"], "none").model
    assert choose_forward(plain)[1]["max_logit_difference"] is not None
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    line = [*arguments(folder, prompts, tmp_path / "out")[:3], f"quant={quant}"]
    if (folder.name, quant) != ("longcat", "nf4"):
        assert run_job([*line, "generation.max_new_tokens=4"]) == 0
        return
    with pytest.raises(LoadError, match="first pass failed") as caught:
        run_job(line)
    assert "quant=none or another quantization" in caught.value.fix
    assert "goes on from there" not in str(caught.value)


def test_the_plan_predicts_the_share_of_each_architecture_that_it_knows(each_tiny_model, tmp_path, capsys):
    each_tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path)), QUANTS["nf4"], "none")
    found = quantized_share(loaded.model, loaded.quant)
    assert found.passed_over == ()
    assert planned_share(known_architecture(each_tiny_model.config.to_dict())) == found.share
    assert capsys.readouterr().err == ""
    assert main(["plan", f"model.name={tmp_path}", "quant=nf4", "memory=24GB", "json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["quantized_share"] == found.share
