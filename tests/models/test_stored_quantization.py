"""Checkpoints whose weights are quantized already: run as plain transformers runs them, or refused by name."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import tiny_tokenizer
from engine.test_every_architecture import config_of
from job_helper import arguments, run_job, texts, write_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from pipeline.commands.door import main
from pipeline.common.errors import LoadError
from pipeline.config import stored_format
from pipeline.config.compose import job_folder, read_config
from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.config.stored_format import as_quant
from pipeline.job.paths import read_json
from pipeline.memory import counted, counting
from pipeline.memory.architecture import has_formula
from pipeline.memory.measured import quantization_state_bytes
from pipeline.memory.plan import footprint_bytes, quant_state_bytes
from pipeline.memory.stored import plain_config
from pipeline.models.loading import load_model
from pipeline.report.jobs import precision, read_job
from pipeline.views.architecture import architecture_view
from pipeline.views.machine import State
from pipeline.views.room import check_room

EIGHT = BitsAndBytesConfig(load_in_8bit=True)
FOUR = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    """Let `change` edit the tensors of the folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def in_fp8(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].abs().max().float() / 448
        blocks = [-(-size // 64) for size in tensors[name].shape]
        tensors[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)


def refused(folder: Path, quant: QuantConfig | None = None) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(ModelConfig(str(folder)), quant or QuantConfig(), "none")
    return str(caught.value)


@pytest.fixture(params=["int8", "nf4", "fp8"])
def quantized(request, tiny_dir) -> tuple[str, Path]:
    if request.param == "fp8":
        rewrite(tiny_dir, in_fp8)
        edit(tiny_dir, quantization_config=FP8)
    else:
        settings = EIGHT if request.param == "int8" else FOUR
        model = AutoModelForCausalLM.from_pretrained(tiny_dir, quantization_config=settings)
        model.save_pretrained(tiny_dir)
    return request.param, tiny_dir


def test_its_text_is_that_of_plain_transformers_and_its_format_is_named(quantized, tmp_path):
    found, folder = quantized
    rows = [{"id": str(i), "prompt": "a word " * i} for i in (1, 3, 5)]
    job = arguments(folder, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out", "quant=none")
    job += ["system=null", "engine.max_rows=1"]  # an 8-bit product depends on the rows beside it
    assert run_job(job) == 0
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert texts(job) == generated(plain, folder, rows)
    name = f"{found} (checkpoint)"
    assert read_json(job_folder(job) / "manifest.json")["quantization"] == name
    memory = read_json(job_folder(job) / "stats.json")["memory"]
    for part in ("footprint_bytes", "quantization_state_bytes", "kv_cache_bytes"):
        assert memory["predicted"][part] == memory["measured"][part]
    assert memory["measured"]["footprint_bytes"] == plain.get_memory_footprint()
    report = read_job(job_folder(job))
    assert (report.quant, precision(report)) == (name, 4.0 if found == "nf4" else 8.0)
    assert f"-{found}_checkpoint-greedy-" in job_folder(job).name


def in_mxfp4(tensors: dict[str, torch.Tensor]) -> None:
    """Put random blocks of 32 and scales in place of the experts [E, in, out]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 127, shape, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore")  # transformers' of rope's factors
def test_experts_in_mxfp4_are_run_as_plain_transformers_runs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # In this process, which has torch already.
    monkeypatch.setattr(counted, "_ask", lambda config: counting.count(json.loads(config)))
    folder = tmp_path / "tiny-oss"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config_of("gpt_oss")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rewrite(folder, in_mxfp4)
    edit(
        folder,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    )
    rows = [{"id": str(i), "prompt": "a word " * i} for i in (1, 3)]
    job = arguments(
        folder, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out", "quant=none", "system=null"
    )
    assert run_job(job) == 0
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert texts(job) == generated(plain, folder, rows)
    memory = read_json(job_folder(job) / "stats.json")["memory"]
    for part in ("footprint_bytes", "kv_cache_bytes"):
        assert memory["predicted"][part] == memory["measured"][part]
    assert memory["measured"]["footprint_bytes"] == plain.get_memory_footprint()


def generated(model, folder: Path, rows: list[dict]) -> dict[tuple[str, int], str]:
    """What plain transformers makes of each row alone."""
    tokenizer, made = AutoTokenizer.from_pretrained(folder), {}
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        made[row["id"], 0] = tokenizer.decode(tokens, skip_special_tokens=True)
    return made


def in_compressed_tensors(folder: Path, preset: str) -> None:
    """Quantize a folder's model by the library itself, with the scales of its weights' own ranges."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.group_size = 32 if scheme.weights.strategy == "group" else None
    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen"
    )
    apply_quantization_config(model, settings)
    for layer in [layer for layer in model.modules() if hasattr(layer, "quantization_scheme")]:
        blocks = layer.weight.unflatten(-1, (-1, scheme.weights.group_size or layer.in_features))
        scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
        layer.weight_scale.data = scales.to(layer.weight_scale.dtype)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data = zeros.to(layer.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.mark.parametrize(("preset", "plain"), [("W4A16", True), ("W8A8", False)])
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_are_run_as_plain_transformers_runs_them(
    preset, plain, tiny_dir, tmp_path, capsys
):
    in_compressed_tensors(tiny_dir, preset)
    rows = [{"id": str(i), "prompt": "a word " * i} for i in (1, 3)]
    job = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out", "quant=none")
    job += ["system=null", "engine.max_rows=1"]
    assert run_job(job) == 0
    assert ("Nothing here computes in compressed-tensors" in capsys.readouterr().err) == plain
    network = AutoModelForCausalLM.from_pretrained(tiny_dir)
    assert texts(job) == generated(network, tiny_dir, rows)
    memory = read_json(job_folder(job) / "stats.json")["memory"]
    assert memory["predicted"]["footprint_bytes"] == memory["measured"]["footprint_bytes"]
    assert job_folder(job).name.startswith("tiny-compressed_tensors_checkpoint-greedy-")
    (found,) = plans_of(tiny_dir, capsys)
    assert found["footprint_bytes"] == memory["measured"]["footprint_bytes"]


def test_a_folder_that_was_named_otherwise_goes_on(quantized, tmp_path, capsys):
    _, folder = quantized
    job = [
        *arguments(folder, write_rows(tmp_path / "p.jsonl", [{"prompt": "one"}]), tmp_path / "out"),
        "quant=none",
    ]
    assert run_job(job) == 0
    made = job_folder(job)
    earlier = made.rename(made.with_name(f"{folder.name}-none-greedy-{made.name.rsplit('-', 1)[1]}"))
    assert job_folder(job) == earlier
    assert job_folder([*job, "shard=1/2"]) == earlier / "shard-1-of-2"
    assert run_job(job) == 0
    assert "Nothing to do" in capsys.readouterr().err
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("settings", ["magic", {"quant_method": "../a b"}, {"quant_method": ["x"]}])
def test_a_folders_name_holds_no_path_and_no_hyphen_of_a_format(settings, tiny_dir):
    edit(tiny_dir, quantization_config=settings)
    name = job_folder([f"model.name={tiny_dir}"]).name
    assert re.fullmatch(r"\w+-\w+_checkpoint-greedy-[0-9a-f]{8}", name)
    (tiny_dir / "config.json").write_text("[")
    assert job_folder([f"model.name={tiny_dir}"]).name.startswith(f"{tiny_dir.name}-none-")


def test_plan_tree_and_doctor_know_its_bytes(quantized, tmp_path, capsys):
    found, folder = quantized
    name = f"{found} (checkpoint)"
    capsys.readouterr()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (plan,) = plans_of(folder, capsys)  # on this machine, which has no GPU
    assert plan["quant"] == (f"{name}, dequantized" if found == "fp8" else name)
    assert (plan["refused"], plan["estimated"]) == (None, None)
    assert plan["footprint_bytes"] == model.get_memory_footprint()
    assert plan["quant_state_bytes"] == quantization_state_bytes(model)
    assert plan["parameters"] == 112_448
    config = read_config([f"model.name={folder}", f"outputs_dir={tmp_path}"])
    view = architecture_view(config.model, config.quant, config.models_dir)
    assert view.bytes == view.predicted_bytes == plan["footprint_bytes"]
    checks = {check.name: check for check in check_room(config)}
    assert (checks["quantization"].state, checks["quantization"].found) == (State.green, name)
    assert (checks["memory"].state, " of weights, " in checks["memory"].found) == (State.green, True)


def test_a_gpu_that_computes_in_fp8_holds_the_files_tensors(tiny_dir, capsys, monkeypatch):
    """As many bytes as the parameters of the layers that transformers puts in there, and the buffers."""
    rewrite(tiny_dir, in_fp8)
    edit(tiny_dir, quantization_config=FP8)
    (plain,) = plans_of(tiny_dir, capsys, "memory=24GB")
    assert plain["quant"] == "fp8 (checkpoint), dequantized", "without the package that has its kernels"
    monkeypatch.setattr(stored_format, "can_import", lambda name: name == "kernels")
    (plan,) = plans_of(tiny_dir, capsys, "memory=24GB")
    in_8_bits = sum(part["bytes"] for part in plan["parts"] if part["dtype"] == "f8_e4m3")
    assert in_8_bits == 73_728
    scales = sum(
        part["bytes"] for part in plan["parts"] if part["dtype"] == "float32" and part["part"] != "buffers"
    )
    config = AutoConfig.from_pretrained(tiny_dir)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
        network = replace_with_fp8_linear(network, ["lm_head"], FineGrainedFP8Config.from_dict(FP8), True)
    assert plan["footprint_bytes"] == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert "as they lie in the files (fp8)" in plan["estimated"]
    assert scales > 0


def test_bytes_that_no_file_tells_are_estimated_and_called_so(tiny_dir, capsys):
    edit(
        tiny_dir, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}, dtype="bfloat16"
    )
    (tiny_dir / "model.safetensors").unlink()
    (plan,) = plans_of(tiny_dir, capsys)
    assert "by 4 bits and a scale for each 128" in plan["estimated"]
    in_4_bits = sum(part["bytes"] for part in plan["parts"] if part["dtype"] == "gptq")
    assert 73_728 / 2 < in_4_bits < 1.1 * 73_728 / 2
    for quant in ("bf16", "nf4"):
        (plan,) = plans_of(tiny_dir, capsys, f"quant={quant}")
        assert "gptq (checkpoint)" in plan["refused"]


def test_modules_that_bitsandbytes_was_told_to_leave_out_are_planned_as_they_are(tiny_dir):
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, quantization_config=settings)
    model.save_pretrained(tiny_dir)
    config = json.loads((tiny_dir / "config.json").read_text())
    assert not has_formula(plain_config(config))
    arch = counted.read_answer(counting.count(plain_config(config)))
    quant = as_quant(config, QuantConfig())
    assert footprint_bytes(arch, quant) == model.get_memory_footprint()
    assert quant_state_bytes(arch, quant) == quantization_state_bytes(model)


def test_it_is_dequantized_where_that_is_asked(quantized, tmp_path, capsys):
    found, folder = quantized
    rows = [{"id": str(i), "prompt": "a word " * i} for i in (1, 3)]
    job = arguments(
        folder, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out", "system=null"
    )  # quant=fp32
    assert run_job(job) == 0
    assert "Nothing here computes in" not in capsys.readouterr().err
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = network if found == "fp8" else network.dequantize(torch.float32)
    assert texts(job) == generated(plain, folder, rows)
    memory = read_json(job_folder(job) / "stats.json")["memory"]
    assert memory["predicted"]["footprint_bytes"] == memory["measured"]["footprint_bytes"]
    assert memory["measured"]["footprint_bytes"] == plain.get_memory_footprint()
    assert "-fp32-greedy-" in job_folder(job).name


def plans_of(folder: Path, capsys, *more: str) -> list[dict]:
    """The plans of a folder, as JSON has them."""
    assert main(["plan", f"model.name={folder}", "json=-", *more]) == 0
    return json.loads(capsys.readouterr().out)["plans"]


def test_it_is_not_quantized_again(quantized):
    found, folder = quantized
    message = refused(folder, QuantConfig(QuantMethod.nf4))
    assert f"quantized already, {found} (checkpoint). Use quant=none" in message


@pytest.mark.parametrize(
    ("found", "package", "line"),
    [
        ("gptq", "optimum", "Run: pip install optimum gptqmodel; or choose"),
        ("awq", "gptqmodel", "Run: pip install gptqmodel; or choose"),
        ("aqlm", "aqlm", "Run: pip install aqlm; or choose"),
        ("hqq", "hqq", "Install the package that this names, or choose"),  # which would be of no use today
    ],
)
@pytest.mark.parametrize("method", [QuantMethod.none, QuantMethod.nf4])
def test_a_format_whose_package_is_missing_names_both(found, package, line, method, tiny_dir):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    edit(tiny_dir, quantization_config={"quant_method": found, "bits": 4, "group_size": 128})
    message = refused(tiny_dir, QuantConfig(method))
    assert f"{found} (checkpoint), and cannot be read here" in message
    assert package in message.partition("read here")[2].lower()
    assert f"{line} a copy of the model with plain weights" in message
    assert "quant=none" not in message
    config = read_config([f"model.name={tiny_dir}"])
    checks = {check.name: check for check in check_room(config)}
    assert checks["quantization"].state is State.red


def test_a_format_that_nobody_knows_is_refused(tiny_dir):
    edit(tiny_dir, quantization_config={"quant_method": "magic"})
    assert "magic (checkpoint), and cannot be read here: Unknown quantization type" in refused(tiny_dir)
    edit(tiny_dir, quantization_config="magic")
    assert "unknown (checkpoint), and cannot be read here" in refused(tiny_dir)


def test_quantized_weights_whose_config_does_not_say_so_are_refused(quantized):
    _, folder = quantized
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "do not belong together" in refused(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.qweight", "model.layers.2.mlp.up_proj.weight", "lm_head.SCB"]
)
def test_a_weight_that_a_layer_should_have_had_is_refused(name, tiny_dir):
    rewrite(tiny_dir, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert f"weights that the model does not use, as {name}" in refused(tiny_dir)


def test_a_config_with_fewer_layers_than_the_file_is_refused(tiny_dir):
    edit(tiny_dir, num_hidden_layers=1)
    assert "weights that the model does not use, as model.layers." in refused(tiny_dir)
    edit(tiny_dir, num_hidden_layers=-1)
    assert "num_hidden_layers=-1: a model's config needs a positive whole number" in refused(tiny_dir)
    edit(tiny_dir, num_hidden_layers=2, num_local_experts=-1)
    assert "num_local_experts=-1: a model's config needs a whole number" in refused(tiny_dir)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.k_scale",
        "model.layers.1.self_attn.masked_bias",
    ],
)
def test_a_tensor_that_nothing_depends_on_is_no_reason(name, tiny_dir, capsys):
    rewrite(tiny_dir, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none").model is not None
    assert capsys.readouterr().err == ""


def test_a_head_that_is_tied_may_be_in_the_file_too(tiny_dir):
    edit(tiny_dir, tie_word_embeddings=True)
    loaded = load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none")
    assert loaded.format is None


def test_layers_that_predict_ahead_are_no_reason(tiny_dir):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(tiny_dir, lambda tensors: tensors.update({name: torch.ones(4)}))
    edit(tiny_dir, num_nextn_predict_layers=1)
    assert load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none").model is not None


@pytest.mark.parametrize("name", ["visual.blocks.0.attn.weight", "model.mtp.norm.weight", "v_head.bias"])
def test_another_part_of_the_checkpoint_is_named_and_left_out(name, tiny_dir, capsys):
    rewrite(tiny_dir, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert load_model(ModelConfig(str(tiny_dir)), QuantConfig(), "none").model is not None
    part = "model.mtp" if "mtp" in name else name.partition(".")[0]
    assert f"Not used of the checkpoint's weights: {part}." in capsys.readouterr().err
