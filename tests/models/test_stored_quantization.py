"""Checkpoints whose weights are quantized already: run as plain transformers runs them, or refused by name."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from job_helper import arguments, run_job, texts, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError, LoadError
from pipeline.config.compose import job_folder, read_config
from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.job.paths import read_json
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
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = texts(job)
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        made = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert written[row["id"], 0] == tokenizer.decode(made, skip_special_tokens=True)
    name = f"{found} (checkpoint)"
    assert read_json(job_folder(job) / "manifest.json")["quantization"] == name
    memory = read_json(job_folder(job) / "stats.json")["memory"]
    assert set(memory["predicted"].values()) == {None}
    assert memory["measured"]["footprint_bytes"] == plain.get_memory_footprint()
    report = read_job(job_folder(job))
    assert (report.quant, precision(report)) == (name, 4.0 if found == "nf4" else 8.0)
    assert f"-{found}_checkpoint-greedy-" in job_folder(job).name


def test_a_folder_that_was_named_otherwise_goes_on(quantized, tmp_path, capsys):
    _, folder = quantized
    job = arguments(folder, write_rows(tmp_path / "p.jsonl", [{"prompt": "one"}]), tmp_path / "out")
    assert run_job(job) == 0
    made = job_folder(job)
    earlier = made.rename(made.with_name(f"{folder.name}-fp32-greedy-{made.name.rsplit('-', 1)[1]}"))
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


def test_plan_and_tree_refuse_to_count_it_and_doctor_names_it(quantized, tmp_path, capsys):
    found, folder = quantized
    name = f"{found} (checkpoint)"
    assert main(["plan", f"model.name={folder}", "memory=24GB"]) == 2
    assert f"quantized already, {name}" in capsys.readouterr().err
    config = read_config([f"model.name={folder}", f"outputs_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=re.escape(name)):
        architecture_view(config.model, config.quant, config.models_dir)
    checks = {check.name: check for check in check_room(config)}
    assert (checks["quantization"].state, checks["quantization"].found) == (State.green, name)
    assert (checks["memory"].state, "known once" in checks["memory"].found) == (State.yellow, True)


def test_it_is_not_quantized_again(quantized):
    found, folder = quantized
    message = refused(folder, QuantConfig(QuantMethod.nf4))
    assert f"quantized already, {found} (checkpoint). Use quant=none" in message


@pytest.mark.parametrize(
    ("found", "package"),
    [("gptq", "optimum"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("hqq", "hqq")],
)
@pytest.mark.parametrize("method", [QuantMethod.none, QuantMethod.nf4])
def test_a_format_whose_package_is_missing_names_both(found, package, method, tiny_dir):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    edit(tiny_dir, quantization_config={"quant_method": found, "bits": 4, "group_size": 128})
    message = refused(tiny_dir, QuantConfig(method))
    assert f"{found} (checkpoint), and cannot be read here" in message
    assert package in message.partition("read here")[2].lower()
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
