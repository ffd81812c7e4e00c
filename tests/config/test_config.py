"""Every config file composes; what is misspelt is named beside what was meant, at once."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.common.errors import ConfigError
from pipeline.common.request import PromptRow
from pipeline.config.compose import (
    SYNONYMS,
    compose_config,
    job_folder,
    job_keys,
    options,
    read_config,
    sweep_cells,
)
from pipeline.config.quant import Dtype, QuantMethod
from pipeline.config.schema import Config, root
from pipeline.prompts.reader import find_prompts, open_prompts

ROOT = Path(__file__).resolve().parents[2]
GROUP_FILES = sorted(f"{path.parent.name}={path.stem}" for path in (ROOT / "conf").glob("*/*.yaml"))
JOB_FILES = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml"))
PROMPT_FILES = sorted(path.name for path in (ROOT / "jobs").glob("*.jsonl*"))


def child(*arguments: str, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python -m pipeline` in a process of its own, and the processor seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd or ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PWD": str(cwd or ROOT)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("choice", GROUP_FILES)
def test_every_file_of_conf_composes(choice):
    assert isinstance(read_config([choice]), Config)
    group, name = choice.split("=")
    assert name in options(group)


@pytest.mark.parametrize("name", JOB_FILES)
def test_every_job_file_composes_and_its_prompts_can_be_read(name):
    config = read_config([f"jobs={name}"])
    rows = list(open_prompts(config))
    assert rows
    assert all(isinstance(row, PromptRow) for row in rows)


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_every_prompt_file_is_found_by_its_name(name):
    assert Path(find_prompts(name, ROOT / "jobs")) == ROOT / "jobs" / name


def test_the_defaults_are_the_smallest_model_its_own_dtype_and_greedy_text():
    config = read_config([])
    assert config.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config.quant.method, config.quant.dtype) == (QuantMethod.none, Dtype.auto)
    assert config.generation.greedy
    assert config.prompts == "jokes.jsonl"


@pytest.mark.parametrize(
    ("choice", "method", "double", "dtype"),
    [
        ("none", QuantMethod.none, False, Dtype.auto),
        ("fp32", QuantMethod.none, False, Dtype.float32),
        ("fp16", QuantMethod.none, False, Dtype.float16),
        ("bf16", QuantMethod.none, False, Dtype.bfloat16),
        ("int8", QuantMethod.int8, False, Dtype.auto),
        ("nf4", QuantMethod.nf4, True, Dtype.auto),
        ("nf4_single", QuantMethod.nf4, False, Dtype.auto),
        ("fp4", QuantMethod.fp4, False, Dtype.auto),
        ("fp4_double", QuantMethod.fp4, True, Dtype.auto),
    ],
)
def test_a_quantization_is_what_its_name_says(choice, method, double, dtype):
    quant = read_config([f"quant={choice}"]).quant
    assert (quant.method, quant.double_quant, quant.dtype) == (method, double, dtype)


def test_a_later_choice_wins_over_a_job_file():
    assert read_config(["jobs=korean_sampled"]).generation.n == 3
    assert read_config(["jobs=korean_sampled", "generation.n=5"]).generation.n == 5


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("generation.max_new_token=5", ["generation.max_new_token", "generation.max_new_tokens?"]),
        ("generation.temprature=1", ["generation.temprature", "generation.temperature?"]),
        ("promts=jokes.jsonl", ["promts", "prompts?"]),
        ("modle=smollm2", ["modle", "model?"]),
        ("quant=[]", ["quant=[]", "choose one quant. There are: bf16"]),
        ("~quant", ["~quant", "choose one"]),
        ("model=smolm2", ["model=smolm2", "smollm2?"]),
        ("quant=nf5", ["quant=nf5", "nf4?"]),
        ("generation=gredy", ["generation=gredy", "greedy?"]),
        ("jobs=korean_sample", ["jobs=korean_sample", "korean_sampled?"]),
        ("quant=eight", ["quant=eight", "int8"]),
        ("quant.method=nf5", ["quant.method=nf5", "nf4"]),
        ("engine.attention=plane", ["engine.attention=plane", "plain"]),
        ("on_error=stop", ["on_error=stop", "fail"]),
        ("generation.max_new_tokens=many", ["generation.max_new_tokens=many", "Integer"]),
        ("generation.temperature=-1", ["temperature=-1", "between 0 (greedy) and 100"]),
        ("generation.top_p=0", ["top_p=0", "above 0 and at most 1"]),
        ("generation.n=0", ["n=0", "between 1 and 1024"]),
        ("stream=maybe", ["stream=maybe", "bool"]),
        ("prompts", ["prompts", "KEY=VALUE"]),
        ("prompts=", ["prompts=", "is empty"]),
        ("model.name=", ["model.name=", "is empty"]),
        ("+promts=jokes.jsonl", ["+promts", "prompts?"]),
        ("+generation.seeds=1", ["seeds", "seed?"]),
        ("memory_check=no", ["memory_check=no", "refuse, warn"]),
        ("hydra/launcher=slrum", ["hydra/launcher=slrum"]),
    ],
)
def test_an_error_names_what_was_typed_and_what_was_meant(override, names):
    message = error_of(override)
    for name in names:
        assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override",
    ["engine.max_rows=0", "engine.max_rows=-3", "engine.max_tokens_in_flight=0", "engine.memory_fraction=7",
     "engine.memory_fraction=0", "engine.prefill_tokens=0"],
)  # fmt: skip
def test_a_setting_of_the_engine_outside_its_range_is_an_error(override):
    assert override.split(".")[1].split("=")[0] in error_of(override)


def test_a_misspelt_key_in_a_file_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "mine.yaml").write_text("# @package _global_\ngeneration:\n  temprature: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    message = error_of("jobs=mine")
    assert "jobs/mine" in message
    assert "generation.temperature?" in message


def test_a_sweep_is_every_combination_in_order():
    cells = sweep_cells(["model=smollm2,qwen", "quant=nf4", "generation.seed=1,2"])
    assert cells == [
        ["model=smollm2", "quant=nf4", "generation.seed=1"],
        ["model=smollm2", "quant=nf4", "generation.seed=2"],
        ["model=qwen", "quant=nf4", "generation.seed=1"],
        ["model=qwen", "quant=nf4", "generation.seed=2"],
    ]


def test_a_sweep_over_a_range_says_to_list_the_values():
    with pytest.raises(ConfigError, match="List the values"):
        sweep_cells(["generation.temperature=interval(0,1)"])


@pytest.mark.parametrize(
    "changed", ["quant=nf4", "generation.seed=1", "system=Hi", "model.revision=abc", "prompt_field=text"]
)
def test_what_decides_the_text_decides_the_folder(changed):
    assert job_folder([changed]) != job_folder([])


@pytest.mark.parametrize(
    "changed",
    [
        "engine.max_rows=3",
        "limit=2",
        "stream=true",
        "model.device_map=cpu",
        "retry_errors=true",
        "memory_check=warn",
    ],
)
def test_what_does_not_decide_the_text_leaves_the_folder(changed):
    assert job_folder([changed]) == job_folder([])


def test_folders_from_before_compute_dtype_had_an_auto_are_found_again():
    """The name is the one that this command line had when bfloat16 was the default."""
    job = ["model=llama", "quant=nf4", "prompts=somewhere.jsonl"]
    assert job_folder(job) == job_folder([*job, "quant.compute_dtype=bfloat16"])
    assert job_folder(job).name == "llama-nf4-greedy-a9b7577d"
    assert job_folder(job) != job_folder([*job, "quant.compute_dtype=float16"])


def test_a_jobs_folder_says_prompts_model_quantization_and_generation(tmp_path):
    folder = job_folder(
        ["model=qwen", "quant=nf4", "generation=sample", f"outputs_dir={tmp_path}", "shard=1/4"]
    )
    assert folder.parent.parent == tmp_path / "jokes"
    assert folder.parent.name.startswith("qwen-nf4-sample-")
    assert folder.name == "shard-1-of-4"
    assert job_folder(["prompts=-"]).parent.name == "stdin"
    assert job_folder(["model.name=org/Some-Model"]).name.startswith("Some-Model-none-greedy-")


@pytest.mark.parametrize(
    ("arguments", "status", "names"),
    [
        (["--help"], 0, ["python -m pipeline model=smollm2 quant=nf4 prompts=jokes.jsonl", "nf4_single"]),
        (["model=smolm2"], 2, ["Did you mean smollm2?"]),
        (["generation.max_new_token=5"], 2, ["Did you mean generation.max_new_tokens?"]),
        (["-m", "quant=nf4,nf5"], 2, ["quant=nf5", "Did you mean nf4?"]),
        (["--cfg", "job"], 0, ["SmolLM2-135M-Instruct", "max_new_tokens: 256"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_answer_takes_less_than_two_seconds_and_has_no_traceback(arguments, status, names, tmp_path):
    done, cpu_sec = child(*arguments, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    for name in names:
        assert name in said
    if status:
        assert said.count(names[-1]) == 1, "an error is said once"
    assert "Traceback" not in said
    assert cpu_sec < 2
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("quantization=nf4", "quant"),
        ("models=phi", "model"),
        ("prompt=jokes.jsonl", "prompts"),
        ("batch_size=8", "engine.max_rows"),
        ("max_tokens=8", "generation.max_new_tokens"),
        ("temperature=1", "generation.temperature"),
        ("device=cpu", "model.device_map"),
    ],
)
def test_another_tools_word_names_ours(typed, meant):
    assert f"Did you mean {meant}?" in error_of(typed)


def test_every_synonym_is_of_a_key_that_there_is():
    assert set(SYNONYMS.values()) <= set(job_keys())
    assert not set(SYNONYMS) & set(job_keys())


def test_conf_and_jobs_are_found_beside_the_package():
    assert (root() / "conf" / "config.yaml").is_file()
    assert compose_config([]).prompts == "jokes.jsonl"
