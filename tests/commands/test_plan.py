"""python -m pipeline plan: its figures, its verdicts, its errors and its time."""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job_helper import environment
from machines import H100
from rich.console import Console

from pipeline.commands.door import main
from pipeline.commands.plan import parse, plans, rank_plans
from pipeline.commands.plan_tables import print_plans, print_ranks
from pipeline.common.errors import ConfigError
from pipeline.common.units import parse_bytes
from pipeline.config.compose import options, read_config
from pipeline.config.quant import QUANTS, SUGGESTED
from pipeline.config.schema import ModelConfig, root
from pipeline.memory.devices import Device, given_device
from pipeline.memory.facts import find_facts
from pipeline.memory.fit import Settings, Workload, best_choice, make_plan, need, rows_that_fit
from pipeline.prompts.lengths import assumed_lengths, by_characters, by_tokenizer

NF4 = QUANTS["nf4"]


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, an empty hub cache, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def smollm2() -> Path:
    folder = Path(os.environ.get("PIPELINE_TEST_MODEL", root() / "models/SmolLM2-135M-Instruct")).resolve()
    if not folder.is_dir():
        pytest.fail(f"{folder}: no such folder. Set PIPELINE_TEST_MODEL to the model's folder.")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """40 rows, one of 1,000 words, and one that cannot be run."""
    rows = [{"prompt": f"Tell me something about {i}."} for i in range(39)] + [{"prompt": "word " * 1000}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot JSON\n")
    return str(path)


def planned(*arguments: str) -> list[dict[str, Any]]:
    """What json= holds after this command line."""
    assert main(["plan", *arguments, "json=plan.json"]) == 0
    plans: list[dict[str, Any]] = json.loads(Path("plan.json").read_text())["plans"]
    return plans


def test_llama_in_4_bits_is_explained_and_fits_a_24_gb_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = planned("model=llama", "quant=nf4", "memory=24GB")
    text = capsys.readouterr().out
    assert "Why 5,591.5 MB and not 4,015.1 MB" in text
    assert all(figure in text for figure in ("3,489.7", "2,101.3", "131,072 bytes (full)"))
    assert plan["footprint_bytes"] == sum(part["bytes"] for part in plan["parts"]) == 5_591_540_224
    assert plan["footprint_bytes"] == sum(reason["bytes"] for reason in plan["reasons"])
    assert plan["verdict"]["status"] == "fits"


def test_the_total_of_each_need_is_the_sum_of_its_parts_and_grows_with_the_rows() -> None:
    (plan,) = planned("model=gemma", "memory=24GB")
    totals = [row["total_bytes"] for row in plan["needs"]]
    assert [row["rows"] for row in plan["needs"]] == [1, 8, 32, 128]
    assert totals == [sum(row["peak"].values()) for row in plan["needs"]] == sorted(set(totals))


def job(model: str, gpu_bytes: int, host_bytes: int = 64 * 10**9) -> Workload:
    """Prompts of 512 tokens and 256 new ones, on a GPU of so much memory."""
    config = read_config([f"model={model}"])
    facts = find_facts(config.model, config.models_dir)
    settings = Settings(0.85, 2048, max_rows=None, max_tokens_in_flight=None)
    device = Device("a GPU", (H100,), gpu_bytes, host_bytes)
    return Workload(model, facts, assumed_lengths(256, 131_072, copies_logits=False), device, settings)


@pytest.mark.parametrize(
    ("gigabytes", "status", "best"),
    [
        (40, "fits", ("llama", "none")),
        (16, "fits with offload", ("llama", "int8")),
        (9, "fits with offload", ("llama", "nf4_single")),
        (7, "fits with offload", ("qwen", "int8")),
        (0.001, "does not fit", None),
    ],
)
def test_less_memory_turns_the_verdict_and_the_best_choice(
    gigabytes: float, status: str, best: tuple[str, str] | None
) -> None:
    memory = int(gigabytes * 10**9)
    llama = job("llama", memory)
    choice = best_choice(llama, SUGGESTED, lambda: [job(name, memory) for name in options("model")])
    assert make_plan(llama, "none", QUANTS["none"], choice).verdict.status == status
    assert (choice and (choice.model, choice.quant)) == best


def test_offload_needs_room_behind_the_gpu() -> None:
    plan = make_plan(job("llama", 9 * 10**9, host_bytes=10**9), "none", QUANTS["none"], None)
    assert plan.verdict.status == "does not fit"


def test_quantized_weights_are_never_said_to_fit_with_offload() -> None:
    (plan,) = planned("model=llama", "quant=nf4", "memory=5GB")
    assert plan["verdict"]["status"] == "does not fit"


def test_the_rows_that_fit_are_the_most_that_do() -> None:
    budget = 10 * 10**9
    rows = rows_that_fit(job("llama", budget), NF4, budget)
    fits, too_many = (need(job("llama", budget), NF4, n).total_bytes for n in (rows, rows + 1))
    assert fits <= budget < too_many


def test_max_rows_and_max_tokens_in_flight_bound_the_rows(prompts: str) -> None:
    base = ["model=smollm2", f"prompts={prompts}", "memory=24GB", "generation.max_new_tokens=50"]
    (rows,) = planned(*base, "engine.max_rows=7")
    (tokens,) = planned(*base, "engine.max_tokens_in_flight=2000")
    longest = tokens["prompts"]["longest_total_tokens"]
    assert rows["verdict"]["rows"] == 7
    assert 1 < tokens["verdict"]["rows"] < 1 + (2000 - longest) / 50


def test_rows_are_counted_by_the_models_own_tokenizer_as_transformers_does(
    smollm2: Path, prompts: str
) -> None:
    from transformers import AutoTokenizer

    system = "Be brief."
    (plan,) = planned(f"models_dir={smollm2.parent}", f"prompts={prompts}", f"system='{system}'")
    conversation = [{"role": "system", "content": system}, {"role": "user", "content": "word " * 1000}]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert plan["prompts"]["longest_prompt_tokens"] == len(ids)
    assert plan["prompts"]["counted_by"] == "the model's tokenizer"
    assert (plan["prompts"]["rows"], plan["prompts"]["bad_rows"]) == (41, 1)


def test_a_template_that_raises_is_estimated(smollm2: Path) -> None:
    count = by_tokenizer(smollm2, "{{ raise_exception('System role not supported') }}")
    assert count([[{"role": "user", "content": "one two three"}]]) == [3 + 8]


def test_without_a_tokenizer_four_characters_are_a_token(prompts: str) -> None:
    assert by_characters([[{"role": "user", "content": "x" * 400}]]) == [101 + 8]
    (plan,) = planned("model=llama", f"prompts={prompts}")
    assert plan["prompts"]["counted_by"] == "characters ÷ 4, an estimate"


def test_a_config_json_wins_over_the_facts_and_says_where_they_differ(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged = tmp_path / "models" / "SmolLM2-135M-Instruct"
    staged.mkdir(parents=True)
    config = json.loads((smollm2 / "config.json").read_text()) | {"intermediate_size": 1024}
    (staged / "config.json").write_text(json.dumps(config))
    (plan,) = planned("model=smollm2")
    assert plan["facts_differences"] == ["intermediate_size: 1536 in conf/model, 1024 in config.json"]
    assert plan["parameters"] == 134_515_008 - 30 * 3 * 576 * 512
    assert "intermediate_size: 1536" in capsys.readouterr().out


def test_a_config_json_in_the_hubs_cache_is_found(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache" / "models--org--new" / "snapshots" / "0"
    (tmp_path / "cache" / "models--org--new" / "refs").mkdir(parents=True)
    (tmp_path / "cache" / "models--org--new" / "refs" / "main").write_text("0")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((smollm2 / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    facts = find_facts(ModelConfig(name="org/new"), "models")
    assert facts.architecture.hidden_size == 576
    assert facts.source == str(snapshot / "config.json")


def test_facts_of_one_model_are_not_used_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=llama", "model.name=/nowhere/other"]) == 2
    assert "model.name=/nowhere/other: conf/model has no facts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model=lama", "Did you mean llama"),
        ("quant=nf5", "Did you mean"),
        ("engine.max_row=3", "engine.max_rows"),
        ("memory=lots", "memory=lots: not a size"),
        ("memory=", "memory=24GB"),
        ("json=/nowhere/plan.json", "json=/nowhere/plan.json: cannot be written"),
    ],
)
def test_a_wrong_argument_is_status_2_and_one_line(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", argument]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_prompt_file_that_is_not_there_is_status_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "prompts=/nowhere.jsonl"]) == 3
    assert "/nowhere.jsonl" in capsys.readouterr().err


def test_comma_lists_and_multirun_flags_give_every_combination() -> None:
    plans = planned("-m", "model=gemma,qwen", "quant=none,nf4")
    assert [(p["model"], p["quant"]) for p in plans] == [
        ("gemma", "none"),
        ("gemma", "nf4"),
        ("qwen", "none"),
        ("qwen", "nf4"),
    ]


def test_all_models_in_all_quantizations_answer_in_5_seconds_without_torch(prompts: str) -> None:
    code = (
        "import sys; from pipeline.commands.door import main; status = main();"
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "plan",
        "model=all",
        "quant=all",
        f"prompts={prompts}",
        "json=all.json",
    ]
    here = str(Path(__file__).resolve().parents[2])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": here})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, result.stderr) == (0, "")
    plans = json.loads(Path("all.json").read_text())["plans"]
    assert len({(p["model"], p["quant"]) for p in plans}) == 7 * 9
    # The processor's time, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_sizes_are_read_as_they_are_written() -> None:
    assert [parse_bytes(s) for s in ("24GB", "24GiB", "1.5 gb", "512MiB", "1000")] == [
        24 * 10**9,
        24 * 2**30,
        1_500_000_000,
        2**29,
        1000,
    ]
    with pytest.raises(ConfigError, match="24GB or 24GiB"):
        given_device("24 apples")


def test_any_list_of_models_is_answered_from_their_configs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of conf/, names on the hub and folders; what no job runs is never the best choice."""
    import transformers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    transformers.OlmoConfig(dtype="bfloat16").save_pretrained(tmp_path / "olmo")
    transformers.RecurrentGemmaConfig(dtype="bfloat16", num_hidden_layers=3).save_pretrained(
        tmp_path / "griffin"
    )
    file = io.StringIO()
    line = [f"model.name={tmp_path / 'olmo'},{tmp_path / 'griffin'}", "quant=none,nf4", "memory=8GB"]
    found = plans(parse(line))
    print_plans(found, Console(width=80, file=file, force_terminal=False))
    assert [(p.model, p.quant) for p in found] == [
        (m, q) for m in ("olmo", "griffin") for q in ("none", "nf4")
    ]
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    which = text[text.index("Which of these fits") :].splitlines()
    assert next(line.split()[:2] for line in which if "quant=" in line) == ["olmo", "quant=nf4_single"]
    assert found[2].best is None or found[2].best.model != "griffin"
    assert found[2].refused
    named = plans(parse(["model=llama,qwen", "quant=nf4", "memory=8GB"]))
    assert [(p.model, p.best.quant if p.best else None) for p in named] == [
        ("llama", "nf4"),
        ("qwen", "int8"),
    ]


def test_every_quantization_fits_80_columns_and_nothing_is_cut() -> None:
    file = io.StringIO()
    out = Console(width=80, file=file, force_terminal=False)
    print_plans(plans(parse(["model=llama,smollm2", "quant=all", "memory=24GB"])), out)
    text = file.getvalue()
    lines = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in QUANTS]
    assert len(lines) == 2 * len(QUANTS)
    assert all(line.rstrip().endswith(("fits", "fits with offload", "does not fit")) for line in lines)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_prompts_that_come_once_are_planned_with_for_every_model(tmp_path: Path) -> None:
    line = f"{sys.executable} -m pipeline plan model=smollm2,llama,phi memory=24GB json=- prompts="
    rows = "".join(json.dumps({"prompt": f"Row {i}"}) + "\\n" for i in range(5))
    for pipe in (f"<(printf '{rows}')", f"- < <(printf '{rows}')", f"/dev/stdin < <(printf '{rows}')"):
        done = subprocess.run(
            ["bash", "-c", line + pipe],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert [plan["prompts"]["rows"] for plan in json.loads(done.stdout)["plans"]] == [5, 5, 5]


def test_prompts_that_come_once_are_planned_with_for_every_model_on_vllm(monkeypatch, capsys):
    rows = "".join(json.dumps({"prompt": f"Row {i}"}) + "\n" for i in range(5))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
    assert main(["plan", "engine=vllm", "model=smollm2,phi", "memory=24GB", "json=-", "prompts=-"]) == 0
    assert [plan["rows"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [5, 5]


def test_vllms_ranks_hold_their_part_of_llama_and_of_its_keys_and_values():
    (plan,) = planned("engine=vllm", "model=llama", "gpus=4", "memory=24GB")
    norms, buffers = (2 * 32 + 1) * 4096, 2 * 64 * 4
    matrices = 8_030_261_248 - norms
    assert plan["weight_bytes"] == 2 * (matrices // 4 + norms) + buffers
    assert plan["kv_bytes_per_token"] == 2 * 8 * 128 * 2 * 32 // 4
    budget = int(24e9 * 0.85)
    assert plan["kv_cache_bytes"] == budget - plan["weight_bytes"] - plan["work_bytes"]
    assert plan["tokens"] == plan["kv_cache_bytes"] // plan["kv_bytes_per_token"]
    assert (plan["tensor_parallel"], plan["pipeline_parallel"], plan["refused"]) == (4, 1, None)
    (staged,) = planned("engine=vllm", "model=llama", "gpus=4", "memory=24GB", "engine.pipeline_parallel=2")
    assert (staged["tensor_parallel"], staged["pipeline_parallel"]) == (2, 2)
    assert staged["kv_bytes_per_token"] == plan["kv_bytes_per_token"]
    assert staged["weight_bytes"] < plan["weight_bytes"] + 2 * 128_256 * 4096 // 2


def test_a_plan_for_vllm_says_what_does_not_fit_and_why(capsys):
    made = rank_plans(parse(["engine=vllm", "model=llama,phi", "memory=12GB"]))
    assert [(plan.fits, plan.rows) for plan in made] == [(False, 0), (True, 8)]
    out = io.StringIO()
    print_ranks(made, Console(file=out, width=160))
    assert "does not fit" in out.getvalue()
    assert main(["plan", "engine=vllm", "model=llama", "gpus=5", "memory=24GB"]) == 0
    assert "its 32 attention heads cannot be parted by 5" in capsys.readouterr().out
    wrong = ("plan", "engine=vllm", "gpus=4", "engine.pipeline_parallel=3", "memory=24GB")
    assert main([*wrong]) == 2
    assert main(["plan", "gpus=4", "memory=24GB"]) == 2
    assert "is for engine=vllm" in capsys.readouterr().err
