"""Adapters that peft itself has made: run token for token as peft runs them, planned, named, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from job_helper import arguments, run_job, texts, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.compose import job_folder, read_config, sweep_cells
from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.packing import pack_weights
from pipeline.job.paths import read_json
from pipeline.memory.facts import find_facts
from pipeline.memory.measured import quantization_state_bytes
from pipeline.memory.plan import footprint_bytes, quant_state_bytes
from pipeline.models.formats import quantization
from pipeline.models.loading import load_model
from pipeline.report.jobs import read_job

ROWS = [{"id": str(i), "prompt": "a word " * i} for i in (1, 3, 5)]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": PROJECTIONS, "bias": "lora_only"},
    "all layers": {"target_modules": "all-linear"},
    "rslora": {"target_modules": PROJECTIONS, "use_rslora": True},
    "dora": {"target_modules": PROJECTIONS, "use_dora": True},
    "whole head": {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]},
    "whole norm": {"target_modules": PROJECTIONS, "modules_to_save": ["norm"]},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some tokens": {"target_modules": PROJECTIONS, "trainable_token_indices": [5, 40, 41, 42]},
}


def make_adapter(base: Path, folder: Path, tokens: int = 0, **settings: Any) -> Path:
    """Save a random adapter of peft's; with `tokens`, of a model that has so many more."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(
            [f"<new {i}>" for i in range(tokens + len(model.lm_head.weight) - len(tokenizer))]
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.save_pretrained(folder)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **settings)
    wrapped = peft.get_peft_model(model, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def made_by_peft(base: Path, adapter: Path, **options: Any) -> dict[tuple[str, int], str]:
    """Generate with peft's own model, a prompt alone at a time."""
    own = (adapter / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if own else base)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **options})
    if own:
        plain.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
    made = {}
    for row in ROWS:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        answer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        made[row["id"], 0] = tokenizer.decode(answer, skip_special_tokens=True)
    return made


def job(base: Path, adapter: Path | str, tmp_path: Path, *more: str) -> list[str]:
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    return arguments(base, prompts, tmp_path / "out", "system=null", f"model.adapter={adapter}", *more)


@pytest.fixture
def lora(tiny_dir, tmp_path) -> Path:
    return make_adapter(tiny_dir, tmp_path / "jokes", **KINDS["lora"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_its_text_is_that_of_peft_token_for_token(kind, tiny_dir, tmp_path):
    adapter = make_adapter(tiny_dir, tmp_path / "jokes", **KINDS[kind])
    command = job(tiny_dir, adapter, tmp_path)
    assert run_job(command) == 0
    assert texts(command) == made_by_peft(tiny_dir, adapter)
    without = job(tiny_dir, "null", tmp_path)
    assert run_job(without) == 0
    assert texts(without) != texts(command)


@pytest.mark.parametrize("kind", ["lora", "embedding and head", "whole head", "whole embedding"])
@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_stays_as_peft_leaves_it(kind, tiny_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tiny_dir)
    whole = {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens"]}
    adapter = make_adapter(tiny_dir, tmp_path / "jokes", **{**KINDS, "whole embedding": whole}[kind])
    command = job(tiny_dir, adapter, tmp_path)
    assert run_job(command) == 0
    assert texts(command) == made_by_peft(tiny_dir, adapter)
    memory = read_json(job_folder(command) / "stats.json")["memory"]
    assert memory["predicted"]["footprint_bytes"] == memory["measured"]["footprint_bytes"]


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_the_adapter_resized_is_honoured(tiny_dir, tmp_path):
    adapter = make_adapter(tiny_dir, tmp_path / "jokes", tokens=7, **KINDS["lora"])
    command = job(tiny_dir, adapter, tmp_path)
    assert run_job(command) == 0
    assert texts(command) == made_by_peft(tiny_dir, adapter)
    memory = read_json(job_folder(command) / "stats.json")["memory"]
    assert memory["predicted"]["footprint_bytes"] == memory["measured"]["footprint_bytes"]
    file = adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "lora" in name or "bias" in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="has 307 tokens, the model 300"):
        load_model(ModelConfig(str(tiny_dir), adapter=str(adapter)), QUANTS["fp32"], "none")


@pytest.mark.parametrize(
    ("quant", "kind"), [("nf4", "lora"), ("nf4", "dora"), ("nf4", "whole head"), ("int8", "all layers")]
)
@pytest.mark.filterwarnings("ignore")
def test_beside_a_quantized_model_it_is_computed_as_peft_does(quant, kind, tiny_dir, tmp_path):
    settings = {key: value for key, value in KINDS[kind].items() if key != "bias"}
    adapter = make_adapter(tiny_dir, tmp_path / "jokes", **settings)
    command = job(tiny_dir, adapter, tmp_path, f"quant={quant}", "quant.dtype=float32", "engine.max_rows=1")
    command += ["quant.compute_dtype=float32"] if quant == "nf4" else []
    assert run_job(command) == 0
    config = read_config(command)
    assert texts(command) == made_by_peft(tiny_dir, adapter, quantization_config=quantization(config.quant))
    assert read_json(job_folder(command) / "manifest.json")["adapter"]["merged"] is False
    memory = read_json(job_folder(command) / "stats.json")["memory"]
    assert memory["predicted"]["footprint_bytes"] == memory["measured"]["footprint_bytes"]


@pytest.mark.filterwarnings("ignore")
def test_no_packed_layer_takes_the_place_of_one_with_an_adapter(tiny_dir, lora):
    model = ModelConfig(str(tiny_dir), adapter=str(lora))
    loaded = load_model(model, QUANTS["nf4"], "none")
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        expected = loaded.model(ids).logits
        pack_weights(loaded.model)
        assert torch.allclose(loaded.model(ids).logits.float(), expected.float(), atol=0.3, rtol=0.05)
        plain = load_model(ModelConfig(str(tiny_dir)), QUANTS["nf4"], "none").model
        assert not torch.allclose(plain(ids).logits.float(), expected.float(), atol=0.3, rtol=0.05)
    layer = loaded.model.model.layers[0]
    assert type(layer.self_attn.q_proj).__module__.startswith("peft.")


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_the_plan_knows_its_bytes(quant, tiny_dir, lora):
    model = ModelConfig(str(tiny_dir), adapter=str(lora))
    loaded, found = load_model(model, QUANTS[quant], "none"), find_facts(model, "none").architecture
    assert footprint_bytes(found, QUANTS[quant]) == loaded.model.get_memory_footprint()
    assert quant_state_bytes(found, QUANTS[quant]) == quantization_state_bytes(loaded.model)


@pytest.mark.filterwarnings("ignore")
def test_the_base_is_the_one_that_the_adapter_names(tiny_dir, lora, tmp_path):
    command = [a for a in job(tiny_dir, lora, tmp_path) if not a.startswith("model.name=")]
    assert read_config(command).model.name == str(tiny_dir)
    assert run_job(command) == 0
    assert texts(command) == made_by_peft(tiny_dir, lora)
    folder = job_folder(command)
    assert folder == job_folder(job(tiny_dir, lora, tmp_path))
    assert folder.name.startswith("tiny+jokes-fp32-greedy-")
    assert read_job(folder).model == "tiny+jokes"
    facts = read_json(folder / "manifest.json")
    assert facts["adapter"] == {"source": str(lora), "revision": None, "base": str(tiny_dir), "merged": True}
    assert "+" in facts["model_digest"]


@pytest.mark.filterwarnings("ignore")
def test_it_is_swept_like_anything(tiny_dir, lora, tmp_path):
    other = make_adapter(tiny_dir, tmp_path / "other", **KINDS["rslora"])
    cells = sweep_cells(job(tiny_dir, f"null,{lora},{other}", tmp_path))
    assert [run_job(cell) for cell in cells] == [0, 0, 0]
    made = [texts(job(tiny_dir, name, tmp_path)) for name in ("null", lora, other)]
    assert made[0] != made[1] != made[2] != made[0]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_changed_does_not_mix_its_rows(tiny_dir, lora, tmp_path):
    command = job(tiny_dir, lora, tmp_path)
    assert run_job([*command, "limit=1"]) == 0
    (lora / "adapter_config.json").write_text((lora / "adapter_config.json").read_text() + " ")
    with pytest.raises(Exception, match="files have changed since"):
        run_job(command)


@pytest.mark.filterwarnings("ignore")
class TestRefused:
    def settings(self, lora: Path, **changes: Any) -> None:
        path = lora / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def said(self, base: Path, lora: Path) -> str:
        with pytest.raises(LoadError) as caught:
            load_model(ModelConfig(str(base), adapter=str(lora)), QUANTS["fp32"], "none")
        return str(caught.value)

    def test_what_is_no_lora_of_a_language_model(self, tiny_dir, lora):
        self.settings(lora, task_type="SEQ_CLS")
        assert "task_type='SEQ_CLS': it is not for a causal language model" in self.said(tiny_dir, lora)
        self.settings(lora, peft_type="PREFIX_TUNING")
        assert "peft_type='PREFIX_TUNING': only LORA can be run" in self.said(tiny_dir, lora)

    def test_pickles_and_damaged_files(self, tiny_dir, lora):
        weights = lora / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "corrupt or cut short" in self.said(tiny_dir, lora)
        weights.rename(lora / "adapter_model.bin")
        assert "only pickle weights" in self.said(tiny_dir, lora)
        shutil.rmtree(lora)
        lora.mkdir()
        assert "no adapter_config.json, so this is not an adapter of peft" in self.said(tiny_dir, lora)

    def test_one_of_another_model(self, tiny_dir, lora, tmp_path, capsys):
        self.settings(lora, base_model_name_or_path="org/other")
        load_model(ModelConfig(str(tiny_dir), adapter=str(lora)), QUANTS["fp32"], "none")
        assert "was made for org/other, and runs with" in capsys.readouterr().err
        tensors = load_file(lora / "adapter_model.safetensors")
        renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
        save_file(renamed, lora / "adapter_model.safetensors", metadata={"format": "pt"})
        assert "Set model.name to the model that it was made for, org/other" in self.said(tiny_dir, lora)
        self.settings(lora, target_modules=["c_attn"])
        assert "peft cannot put this adapter into the model: Target modules" in self.said(tiny_dir, lora)

    def test_dora_beside_eight_bits_which_peft_cannot_compute(self, tiny_dir, tmp_path):
        adapter = make_adapter(tiny_dir, tmp_path / "jokes", **KINDS["dora"])
        with pytest.raises(LoadError, match="a DoRA, and peft cannot compute one beside weights in 8 bits"):
            load_model(ModelConfig(str(tiny_dir), adapter=str(adapter)), QUANTS["int8"], "none")

    def test_one_whose_base_cannot_be_told(self, lora, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        self.settings(lora, base_model_name_or_path=None)
        with pytest.raises(ConfigError, match="does not say which model the adapter is for"):
            read_config([f"model.adapter={lora}"])
        with pytest.raises(ConfigError, match=r"no adapter_config\.json there, nor on the hub"):
            read_config(["model.adapter=org/none-such"])


@pytest.mark.filterwarnings("ignore")
def test_the_real_model_with_an_adapter_says_what_peft_says(smollm2_dir, tmp_path):
    adapter = make_adapter(smollm2_dir, tmp_path / "jokes", target_modules=["q_proj", "v_proj"])
    command = job(smollm2_dir, adapter, tmp_path)
    assert run_job(command) == 0
    assert texts(command) == made_by_peft(smollm2_dir, adapter)


@pytest.mark.filterwarnings("ignore")
def test_vllm_computes_an_adapter_as_our_own_engine_does(smollm2_dir, tmp_path):
    adapter = make_adapter(smollm2_dir, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    own = [*arguments(smollm2_dir, prompts, tmp_path), f"model.adapter={adapter}"]
    by_vllm = [*own, "engine=vllm", "engine.extra={enforce_eager:true}"]
    assert run_job(own) == run_job(by_vllm) == run_job(own[:-1]) == 0
    assert texts(by_vllm) == texts(own) != texts(own[:-1])
    assert "+adapter-" in job_folder(by_vllm).name
