"""What has no formula is counted, to the byte, in a process of its own that no config can make hang or run code."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from engine.test_every_architecture import PATHS, build, config_of
from job_helper import arguments, command, job_folder, run_job, write_rows
from machines import H100
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pipeline.commands.door import main
from pipeline.common.cache import cache_folder
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.request import GenerationParams, Request
from pipeline.config.quant import QUANTS
from pipeline.engine.limits import own_cache_limits
from pipeline.engine.rectangles.forward import FlatForward, PaddedForward
from pipeline.engine.rectangles.own_cache import CacheForward
from pipeline.engine.scheduler import Sample
from pipeline.memory import counted, counting
from pipeline.memory.architecture import Architecture
from pipeline.memory.capacity import Place, rows_for_states, tokens_on_all
from pipeline.memory.counted import architecture_of, count_architecture
from pipeline.memory.measured import quantization_state_bytes
from pipeline.memory.peaks import activation_bytes
from pipeline.memory.plan import (
    footprint_bytes,
    kv_cache_bytes,
    parameters,
    quant_state_bytes,
    quantized_share,
    row_state_bytes,
)
from pipeline.models.formats import quantization

CHECKED = ("none", "fp32", "int8", "nf4")
# A pass without values cannot tell how many tokens an expert has: keys and values are those of the config's sizes.
ESTIMATED = ("jetmoe",)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what was counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counted._counted.cache_clear()
    return cache_folder() / "architectures"


def count_here(config: dict[str, Any]) -> Architecture:
    """Count in this process, through the writer and the reader of what is kept."""
    return counted.read_answer(json.loads(json.dumps(counting.count(config))))


def load(folder: str, name: str) -> Any:
    quant = QUANTS[name]
    dtype = "auto" if quant.dtype.value == "auto" else getattr(torch, quant.dtype.value)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization(quant), device_map="cpu"
    )


def held_by_the_engine(model: Any, path: str) -> int:
    """The bytes of the keys and values of one row of five tokens, in the way that a job takes."""
    forward = FlatForward(model) if path == "rectangles" else PaddedForward(model)
    with torch.inference_mode():
        rectangle, _ = forward.prefill([Sample(Request("r", (1,) * 5, GenerationParams()), 0)], None, 100)
    return rectangle.nbytes


@pytest.mark.parametrize("kind", sorted(PATHS))
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_takes_the_bytes_that_were_counted(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        network = build(kind).to(torch.bfloat16)
        network.save_pretrained(folder)
        if type(config_of(kind)) is not type(network.config):  # a checkpoint says all that its model is
            whole = config_of(kind)
            whole.dtype = torch.bfloat16
            whole.save_pretrained(folder)
        arch = count_here(json.loads((Path(folder) / "config.json").read_text()))
        for name in CHECKED:
            model = load(folder, name)
            assert footprint_bytes(arch, QUANTS[name]) == model.get_memory_footprint(), name
            assert quant_state_bytes(arch, QUANTS[name]) == quantization_state_bytes(model), name
            if name == "none" and kind not in ESTIMATED:
                assert parameters(arch) == model.num_parameters()
                held = kv_cache_bytes(arch, QUANTS[name], [(1, 5)], prefilling=True)
                assert held == held_by_the_engine(model, PATHS[kind])
    assert (arch.counted.note is None) == (kind not in ESTIMATED)
    assert arch.counted.refused is None


@pytest.mark.parametrize(
    "kind", ["bamba", "deepseek_v32", "falcon_mamba", "jamba", "lfm3", "qwen3_next", "zamba2"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore")
def test_the_cache_of_a_recurrent_model_takes_the_bytes_that_were_counted(
    kind: str, dtype: torch.dtype
) -> None:
    """In prefill and while it grows: states that keep their size, keys and values that do not."""
    network = build(kind).to(dtype)
    config = {**network.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    arch, quant = count_here(config), QUANTS["none"]
    assert (arch.own_cache, arch.counted.note) == (True, None)
    assert (row_state_bytes(arch, quant) > 0) == (kind != "deepseek_v32")
    forward = CacheForward(network)
    rows = [Sample(Request(str(i), (1,) * 5, GenerationParams()), 0) for i in range(3)]
    with torch.inference_mode():
        group, _ = forward.prefill(rows, None, 100)
        for tokens in (5, 6, 7):
            assert group.nbytes == kv_cache_bytes(arch, quant, [(3, tokens)], limits=forward.limits)
            for row in rows:
                row.token_ids.append(1)
            forward.decode([group])
            group.head += 1


def test_rows_in_flight_come_from_their_states_too() -> None:
    arch = count_here(config_of("bamba").to_dict())
    quant, place = QUANTS["none"], Place("the CPU", 0, (0, 1), ())
    state_bytes = row_state_bytes(arch, quant)
    assert rows_for_states(arch, quant, [place], [20 * state_bytes], 128) == 10
    assert rows_for_states(arch, quant, [place], [state_bytes], 128) == 1
    assert rows_for_states(arch, quant, [place], [1 << 40], 128) == 128
    recurrent = count_here(config_of("falcon_mamba").to_dict())
    state_bytes = row_state_bytes(recurrent, quant)
    assert rows_for_states(recurrent, quant, [place], [20 * state_bytes], 128) == 20
    tokens = tokens_on_all(recurrent, quant, [place], [20 * state_bytes], 20, own_cache_limits("cpu"))
    assert tokens > 20 * 1000  # its rows may be of any length


@pytest.mark.parametrize(
    ("kind", "columns"), [("bamba", 256), ("granitemoehybrid", 256), ("qwen3_next", 64), ("mamba", 1)]
)
def test_what_a_pass_holds_is_counted_by_the_columns_that_its_scan_pads_a_row_to(
    kind: str, columns: int
) -> None:
    arch = count_here(config_of(kind).to_dict())
    assert arch.pass_columns == columns
    half, wide = arch.pass_bytes
    assert half < wide < 2 * half  # a scan is in float32 in both
    for quant, size in (("bf16", half), ("fp32", wide)):
        held = {
            n: activation_bytes(arch, QUANTS[quant], n, 1, (H100,))
            for n in (columns, columns + 1, 2 * columns)
        }
        assert held == {columns: size, columns + 1: 2 * size, 2 * columns: 2 * size}
        on_cpu = activation_bytes(arch, QUANTS[quant], columns, 1)
        assert size < on_cpu < 1.3 * size, "and holes in the heap"
    assert activation_bytes(arch, QUANTS["bf16"], columns, 5 * columns, (H100,)) == 5 * half, "no row is cut"


def test_many_short_rows_of_a_hybrid_take_what_was_predicted(tmp_path: Path) -> None:
    """Its scan pads each row to 256 columns: all at once, these would take 1.2 GB. It has no experts, as Granite 4."""
    sizes = {"mamba_n_heads": 48, "mamba_d_head": 16, "mamba_d_state": 64, "hidden_size": 384}
    config = {**config_of("granitemoehybrid").to_dict(), **sizes, "num_local_experts": 0, "dtype": "float32"}
    made = CONFIG_MAPPING["granitemoehybrid"](**config)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"data cat {i % 10}{i // 10}"} for i in range(30)])
    job = [*arguments(tmp_path / "hybrid", rows, tmp_path / "outputs"), "quant=fp32"]
    done = command(job)
    assert done.returncode == 0, done.stderr
    memory = json.loads((job_folder(job) / "stats.json").read_text())["memory"]
    assert memory["measured"]["run_peak_bytes"] < 700e6
    assert abs(memory["error_percent"]["run_peak"]) < 20


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"])
def test_a_familys_formula_says_what_counting_says(kind: str) -> None:
    config = CONFIG_MAPPING[kind](dtype="bfloat16").to_dict()
    by_formula, by_count = architecture_of(config), count_here(config)
    assert by_formula.counted is None
    assert (by_formula.windows, by_formula.layer_keys) == (by_count.windows, by_count.layer_keys)
    assert quantized_share(by_formula) == quantized_share(by_count)
    for quant in QUANTS.values():
        assert footprint_bytes(by_formula, quant) == footprint_bytes(by_count, quant)
        assert quant_state_bytes(by_formula, quant) == quant_state_bytes(by_count, quant)


def test_a_large_mixture_is_planned_from_its_config_alone(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """671 billion weights, whose attention makes 128 heads of keys and values from a latent vector."""
    transformers.DeepseekV3Config(dtype="bfloat16").save_pretrained(tmp_path / "large")
    line = ["plan", f"model.name={tmp_path / 'large'}", "memory=80GB", "json=-"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "Counting the weights" in said.err
    (plan,) = json.loads(said.out)["plans"]
    assert plan["parameters"] == 671_026_404_352
    assert plan["kv_bytes_per_token"] == {"full": 61 * 128 * (192 + 128) * 2}
    assert (plan["verdict"]["status"], plan["refused"], plan["estimated"]) == ("does not fit", None, None)
    counted._counted.cache_clear()  # as another process
    assert main(line) == 0
    again = capsys.readouterr()
    assert (json.loads(again.out)["plans"][0]["parts"], again.err) == (plan["parts"], "")


def test_a_damaged_cache_is_made_anew(own_cache: Path) -> None:
    config = transformers.OlmoConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128).to_dict()
    first = count_architecture(config)
    (kept,) = own_cache.iterdir()
    kept.write_text(kept.read_text()[:1000])
    counted._counted.cache_clear()
    assert count_architecture(config).counted.weights == first.counted.weights
    assert json.loads(kept.read_text())["model_type"] == "olmo"


def test_a_model_that_no_job_runs_is_planned_and_said_to_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers.RecurrentGemmaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    assert main(["plan", f"model.name={tmp_path}", "memory=24GB"]) == 0
    assert "A job would be refused: recurrent, and keeps its state" in " ".join(
        capsys.readouterr().out.split()
    )


SIZES = {"model_type": "olmo2", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SIZES | {"hidden_size": 1 << 23, "intermediate_size": 1 << 30, "vocab_size": 1 << 39},
            "cannot make a model",
        ),
        (SIZES | {"num_hidden_layers": "many"}, "num_hidden_layers"),
        (SIZES | {"model_type": "nobody_knows"}, "'nobody_knows': this transformers does not know it"),
        (SIZES | {"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}, "needs Python code"),
        ({"model_type": "t5"}, "not a causal language model"),
    ],
)
def test_what_no_model_can_be_made_of_is_an_error_that_says_so(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as refused:
        counting.count(config)
    assert refused.value.fix


def test_a_config_of_ten_million_layers_is_left_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "LIMIT_SEC", 10)
    with pytest.raises(ConfigError, match="not made within 10 s, even without its weights") as refused:
        count_architecture(SIZES | {"num_hidden_layers": 10_000_000, "layer_types": None})
    assert refused.value.fix


def test_a_config_of_ten_million_layers_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    less = "from pipeline.memory import counting; counting.LIMIT_BYTES = 700 << 20; counting.main()"
    monkeypatch.setattr(counted, "COMMAND", ("-c", less))
    with pytest.raises(ConfigError, match="of this config") as refused:
        count_architecture(SIZES | {"num_hidden_layers": 10_000_000, "layer_types": None})
    assert refused.value.fix


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """Neither the code that a config names beside an architecture of transformers, nor a kernel from the hub."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = SIZES | {
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "_name_or_path": str(tmp_path),
    }
    plain = count_architecture(SIZES)
    assert count_architecture(config).counted.weights == plain.counted.weights
    assert not (tmp_path / "ran").exists()


def test_counting_leaves_the_plan_itself_without_torch(tmp_path: Path) -> None:
    transformers.OlmoConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128).save_pretrained(
        tmp_path
    )
    code = (
        "import sys; from pipeline.commands.door import main;"
        f"status = main(['plan', 'model.name={tmp_path}', 'memory=1GB']);"
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Counting the weights" in done.stderr


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma4_text", "gpt2", "olmoe"])
@pytest.mark.filterwarnings("ignore")
def test_a_job_on_a_counted_architecture_predicts_its_bytes(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / kind)
    tiny_tokenizer().save_pretrained(tmp_path / kind)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "data cat " * (2 * i + 1)} for i in range(5)])
    job = arguments(tmp_path / kind, rows, tmp_path / "outputs")
    assert run_job(job) == 0
    memory = json.loads((job_folder(job) / "stats.json").read_text())["memory"]
    for part in ("footprint", "kv_cache"):
        assert memory["predicted"][f"{part}_bytes"] == memory["measured"][f"{part}_bytes"], part
