"""Experts of mixtures are quantized as they are loaded, one by one, and computed as transformers computes them."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands.test_score import write_config
from conftest import SMALL, tiny_tokenizer
from engine.test_every_architecture import alone, build, requests
from engine_runs import run
from job_helper import arguments, job_folder, run_job, write_rows
from models.test_adapters import make_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.commands.door import main
from pipeline.common.errors import JobError, LoadError
from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import read_config
from pipeline.config.quant import QUANTS, Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.probe import choose_forward
from pipeline.job.paths import read_json
from pipeline.memory.architecture import Architecture, Counted, Weight
from pipeline.memory.peaks import assembling_bytes, load_peak, scratch_bytes
from pipeline.models import quantized_experts
from pipeline.models.formats import quantization
from pipeline.models.loading import load_model
from pipeline.models.quantized_experts import QuantizedExperts, held_experts
from pipeline.views.room import check_room

# Of each way to hold experts and to send tokens through them: gated or not, with biases, the other way round, with
# weights in float32 for the tokens, with experts that do nothing, in layers beside recurrent ones.
KINDS = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe",
    "phimoe", "hunyuan_v1_moe", "ernie4_5_moe", "minimax_m2", "nemotron_h", "jamba", "qwen3_next", "zaya",
]  # fmt: skip
EXACT = QuantConfig(QuantMethod.nf4, Dtype.float32, double_quant=True, compute_dtype=Dtype.float32)
PROMPT = [{"id": "a", "prompt": "a word"}, {"id": "b", "prompt": "another word or two"}]


def experts_of(network: Any) -> list[Any]:
    return [module for module in network.modules() if held_experts(module)]


def as_transformers(module: Any) -> Any:
    """Give transformers' own experts, of the weights that ours dequantize."""
    plain = copy.copy(module)
    plain.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    plain._parameters = dict(module._parameters)
    for name, held in held_experts(module).items():
        packed = getattr(module, name)
        whole = torch.stack([held.dequantize(packed, expert) for expert in range(held.shape[0])])
        whole = whole.mT.contiguous() if held.transposed else whole
        plain._parameters[name] = nn.Parameter(whole, requires_grad=False)
    return plain


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A folder with a tiny Mixtral of random weights in bfloat16."""
    return saved(tmp_path / "mixture", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2})


def saved(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_pass_is_that_of_transformers_over_the_dequantized_weights(kind):
    found = []
    for module in build(kind).modules():
        quantized_experts.prepare_experts(module, quantization(EXACT))
        for name, held in held_experts(module).items():
            setattr(module, name, held.pack(getattr(module, name).data))
        found += [module] if held_experts(module) else []
    assert found
    experts = found[-1]
    count, hidden, _ = held_experts(experts)["down_proj"].shape
    rows = torch.randn(11, hidden)
    chosen = torch.rand(11, count).topk(min(2, count), dim=-1).indices
    weights = torch.rand(chosen.shape)
    with torch.inference_mode():
        plain = as_transformers(experts)
        plain.config._experts_implementation = "eager"
        expected = plain(rows, chosen, weights)
        assert torch.allclose(experts(rows, chosen, weights), expected, rtol=1e-4, atol=1e-5)
        assert experts(rows[:0], chosen[:0], weights[:0]).shape == (0, hidden)
        if kind == "mixtral":  # what a router gives to skip adds nothing
            beyond = chosen.clone()
            beyond[3] = count
            alone_skipped = experts(rows, beyond, weights)
            assert not alone_skipped[3].any()
            assert torch.equal(alone_skipped[:3], experts(rows, chosen, weights)[:3])


@pytest.mark.parametrize(("kind", "attention"), [
    ("mixtral", "rectangles"), ("mixtral", "pages"), ("mixtral", "plain"), ("gpt_oss", "rectangles"),
    ("qwen3_next", "rectangles"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_rows_are_those_of_a_plain_model_of_the_dequantized_weights(kind, attention, tmp_path):
    """Batched and alone, where nothing but the experts is quantized."""
    build(kind).save_pretrained(tmp_path)
    settings = quantization(EXACT)
    network = build(kind)
    settings.llm_int8_skip_modules = [n for n, m in network.named_modules() if type(m) is nn.Linear]
    ours, plain = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu").eval()
        for _ in range(2)
    )
    assert experts_of(ours)
    for module in experts_of(plain):
        own = as_transformers(module)
        del module.forward
        module._parameters = own._parameters
    forward, report = choose_forward(ours, attention)
    assert report["path"] != "refused"
    some = requests()[:4]
    found = {key: made.token_ids for key, made in run(forward, some, max_rows=3, max_tokens=600).items()}
    assert found == {
        (request.id, 0): alone(plain, request, use_cache=kind == "qwen3_next") for request in some
    }


def test_only_experts_that_are_met_are_dequantized_and_one_at_a_time(mixture, monkeypatch):
    loaded = load_model(ModelConfig(str(mixture)), QUANTS["nf4"], "none")
    met: list[int] = []
    dequantize = QuantizedExperts.dequantize

    def noted(self: QuantizedExperts, packed: torch.Tensor, expert: int) -> torch.Tensor:
        met.append(expert)
        made = dequantize(self, packed, expert)
        assert made.shape == self.shape[1:]
        return made

    monkeypatch.setattr(QuantizedExperts, "dequantize", noted)
    (experts, *_) = experts_of(loaded.model)
    chosen = torch.tensor([[1, 3], [3, 1], [1, 3]])
    with torch.inference_mode():
        experts(torch.randn(3, 64).bfloat16(), chosen, torch.rand(3, 2).bfloat16())
    assert met == [1, 1, 3, 3]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_experts_are_quantized_as_they_are_read(quant, mixture, monkeypatch):
    """No weight of experts is there in 16 bits but the one that is being quantized."""
    pack, networks, seen = QuantizedExperts.pack, list[Any](), []
    prepare = quantized_experts.prepare_experts

    def prepared(module: Any, settings: Any) -> None:
        prepare(module, settings)
        networks.append(module)

    def noted(self: QuantizedExperts, weight: torch.Tensor) -> nn.Parameter:
        held = [getattr(module, name) for module in networks for name in held_experts(module)]
        seen.append([w.dtype for w in held if w.device.type != "meta"])
        return pack(self, weight)

    monkeypatch.setattr(quantized_experts, "prepare_experts", prepared)
    monkeypatch.setattr(QuantizedExperts, "pack", noted)
    load_model(ModelConfig(str(mixture)), QUANTS[quant], "none")
    packed = torch.int8 if quant == "int8" else torch.uint8
    assert seen == [[packed] * i for i in range(4)]


@pytest.mark.parametrize(("kind", "changes", "share", "quant"), [
    ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 0.85, "nf4"),
    ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 0.85, "int8"),
    ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}, 0.76, "nf4"),
    ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, 0.85, "int8"),
])  # fmt: skip
def test_a_job_and_its_plan_say_that_experts_are_quantized(kind, changes, share, quant, tmp_path, capsys):
    folder = saved(tmp_path / "model", kind, changes)
    prompts = write_rows(tmp_path / "p.jsonl", PROMPT)
    line = [
        *arguments(folder, prompts, tmp_path / "out")[:3],
        f"quant={quant}",
        "generation.max_new_tokens=3",
    ]
    assert run_job(line) == 0
    assert "stayed" not in capsys.readouterr().err
    memory = read_json(job_folder(line) / "stats.json")["memory"]
    measured = memory["measured"]
    assert memory["quantized_share"] == pytest.approx(share, abs=0.02)
    assert memory["predicted"]["footprint_bytes"] == measured["footprint_bytes"]
    assert main(["plan", f"model.name={folder}", f"quant={quant}", "memory=24GB", "json=-"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["quantized_share"] == memory["quantized_share"]
    assert plan["footprint_bytes"] == measured["footprint_bytes"]
    assert plan["quant_state_bytes"] == measured["quantization_state_bytes"]
    assert plan["parameters"] == memory["parameters"]
    assert "quantization" not in {check.name for check in check_room(read_config(line))}
    loaded = load_model(ModelConfig(str(folder)), QUANTS[quant], "none").model
    routers = [p for n, p in loaded.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    assert {router.dtype for router in routers} == {torch.bfloat16}


def test_each_expert_has_blocks_of_its_own(mixture):
    """Its codes and scales are those of its matrix alone."""
    from bitsandbytes import functional

    plain = load_model(ModelConfig(str(mixture)), QUANTS["none"], "none").model
    (experts, *_) = experts_of(load_model(ModelConfig(str(mixture)), QUANTS["nf4"], "none").model)
    held = held_experts(experts)["gate_up_proj"]
    weight = plain.model.layers[0].mlp.experts.gate_up_proj
    for expert in range(4):
        codes, state = functional.quantize_4bit(
            weight[expert].data, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(experts.gate_up_proj[expert], codes)
        assert torch.equal(
            held.dequantize(experts.gate_up_proj, expert), functional.dequantize_4bit(codes, state)
        )


def test_the_plan_counts_what_experts_take_beside_them():
    """While they are put together, and while one is dequantized: never all of them."""
    experts = Weight("experts.down_proj", "mlp", (8, 1024, 2048), quantizable=True)
    other = Weight("q_proj.weight", "attention", (1024, 1024), quantizable=True)
    known = Architecture.read(transformers.LlamaConfig(**SMALL, dtype="bfloat16").to_dict())
    arch = replace(known, counted=Counted((experts, other), None, None))
    assert assembling_bytes(arch, QUANTS["nf4"]) == 2 * 2 * 8 * 1024 * 2048
    assert assembling_bytes(arch, QUANTS["bf16"]) == 0
    assert (
        scratch_bytes(arch, QUANTS["int8"], ()) == scratch_bytes(arch, QUANTS["nf4"], ()) == 8 * 1024 * 2048
    )
    assert load_peak(arch, QUANTS["nf4"], gpus=()).held > assembling_bytes(arch, QUANTS["nf4"])


def test_experts_of_a_checkpoint_that_came_quantized_stay_as_they_are(mixture, tmp_path, capsys):
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(mixture, quantization_config=settings)
    assert experts_of(model) == []  # nobody has asked for ours
    model.save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    loaded = load_model(ModelConfig(str(tmp_path / "quantized")), QUANTS["none"], "none")
    assert experts_of(loaded.model) == []
    assert "experts stayed in bfloat16" in capsys.readouterr().err
    assert main(["plan", f"model.name={tmp_path / 'quantized'}", "json=-"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["footprint_bytes"] == loaded.model.get_memory_footprint()
    assert plan["quantized_share"] == pytest.approx(loaded.quantized_share)


def test_a_job_that_began_with_plain_experts_is_neither_gone_on_with_nor_scored(mixture, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", PROMPT)
    line = [*arguments(mixture, prompts, tmp_path / "out")[:3], "quant=nf4", "generation.max_new_tokens=3"]
    assert run_job([*line, "limit=1"]) == 0
    manifest = job_folder(line) / "manifest.json"
    noted = read_json(manifest)
    assert noted["quantized_experts"] is True
    del noted["quantized_experts"]  # as versions before wrote it
    manifest.write_text(json.dumps(noted))
    with pytest.raises(JobError, match="made while the experts of this mixture stayed plain") as caught:
        run_job(line)
    assert "resume=never" in caught.value.fix
    folder = str(job_folder(line))
    write_config(read_config(line), job_folder(line))
    assert main(["score", folder, f"baseline={folder}"]) == ExitStatus.FAILED
    assert "its rows were made while the experts of this mixture stayed plain" in capsys.readouterr().err
    assert run_job([*line, "resume=never"]) == 0
    assert main(["score", folder, f"baseline={folder}"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_attention_runs_beside_them_and_one_of_experts_is_refused(mixture, tmp_path):
    attention = make_adapter(mixture, tmp_path / "attention", target_modules=["q_proj", "v_proj"])
    ids = torch.arange(20, 40)[None]
    for adapter in (None, str(attention)):
        loaded = load_model(ModelConfig(str(mixture), adapter=adapter), QUANTS["nf4"], "none")
        assert len(experts_of(loaded.model)) == 2
        with torch.inference_mode():
            assert loaded.model(ids).logits.isfinite().all()
    whole = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    for name, settings in {
        "model.layers.0.mlp.experts.down_proj": whole,
        "model.layers.0.mlp.experts": {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    }.items():
        model = ModelConfig(str(mixture), adapter=str(make_adapter(mixture, tmp_path / name, **settings)))
        for quant in ("nf4", "int8"):
            with pytest.raises(LoadError, match=f": it changes {name}, and") as caught:
                load_model(model, QUANTS[quant], "none")
            assert "quant=none" in caught.value.fix
        assert load_model(model, QUANTS["none"], "none").adapter.merged


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_an_older_adapter_of_each_expert_is_refused_too(quant, mixture, tmp_path):
    """As made before the experts of a layer were one weight: peft turns it into one of that weight."""
    folder = make_adapter(mixture, tmp_path / "older", target_modules=["q_proj"])
    settings = read_json(folder / "adapter_config.json")
    settings["target_modules"] = ["q_proj", "w2"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "adapter_model.safetensors")
    for layer, expert in itertools.product(range(2), range(4)):
        name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.lora"
        weights |= {f"{name}_A.weight": torch.ones(4, 128), f"{name}_B.weight": torch.ones(64, 4)}
    save_file(weights, folder / "adapter_model.safetensors")
    model = ModelConfig(str(mixture), adapter=str(folder))
    with pytest.raises(LoadError, match=r"it changes model\.layers\.0\.mlp\.experts\.down_proj"):
        load_model(model, QUANTS[quant], "none")
    assert load_model(model, QUANTS["none"], "none").adapter.merged


def test_a_latent_of_four_dimensions_is_multiplied_in_8_bits(tmp_path):
    """DeepSeek's keys, which bitsandbytes' own product would refuse."""
    build("deepseek_v2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path)), QUANTS["int8"], "none").model
    layer = model.model.layers[0].self_attn.kv_b_proj
    rows = torch.randn(2, 1, 5, 16)
    with torch.inference_mode():
        assert torch.equal(layer(rows)[1, 0], type(layer).forward(layer, rows[1, 0]))
        assert model(torch.arange(20, 40)[None]).logits.isfinite().all()
