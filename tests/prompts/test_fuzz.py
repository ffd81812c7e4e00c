"""Anything at all in a prompt file or on the command line: never a traceback, never a lost row."""

import contextlib
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_helper import arguments

from pipeline.common.errors import ConfigError
from pipeline.common.fingerprint import row_key
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.config.compose import job_folder, read_config
from pipeline.config.schema import Config, Resume
from pipeline.job import runner
from pipeline.job.ledger import Ledger
from pipeline.models.own_settings import settle_generation
from pipeline.prompts.reader import read_prompts

CONTROL = [
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|endoftext|>",
    "<|eot_id|>",
    "{{ 7 * 7 }}",
    "{% raise %}",
    "\ufdd0",
]
ROLES = ["user", "assistant", "system", "tool", "developer", "root", "", None, 7]
texts = st.one_of(
    st.text(max_size=40), st.sampled_from([*CONTROL, "", " ", "\x00", "\x1b[2J", "\u202e", "a" * 3000])
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.one_of(texts, texts, anything)}),
    max_size=4,
)
numbers = st.one_of(
    st.sampled_from([0, -1, 1, 0.5, 1e308, -(2**70), 2**31, math.nan, math.inf, "1"]), anything
)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.sampled_from([1, 2, 5, 0, -1, 2**31 - 1, 2**31, 10**30, "5", 2.0, None]),
        "n": st.sampled_from([1, 2, 3, 0, -1, 2000, 10**30, "2", None]),
        "temperature": numbers, "top_p": numbers, "top_k": numbers, "min_p": numbers, "seed": numbers,
        "repetition_penalty": numbers, "stop": st.one_of(texts, st.lists(texts, max_size=3), anything),
        "no_such_key": scalars,
    },
)  # fmt: skip
bodies = st.fixed_dictionaries({"messages": st.one_of(messages, anything)}, optional={"max_tokens": numbers})
objects = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(texts, texts, texts, anything), "messages": st.one_of(messages, anything),
        "id": st.one_of(st.sampled_from(["a", "b", "row-0", "row-1", "", 3]), anything),
        "system": st.one_of(texts, anything), "generation": st.one_of(overrides, anything),
        "body": st.one_of(bodies, anything), "custom_id": texts, "other": anything,
    },
)  # fmt: skip
prompt_only = st.fixed_dictionaries({"prompt": texts}, optional={"generation": overrides, "system": texts})
as_json = st.one_of(prompt_only, objects, anything).map(lambda value: json.dumps(value).encode())
lines = st.one_of(
    as_json, as_json, as_json,
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
    st.sampled_from([b"", b" ", b"\r", b"\xef\xbb\xbf{}", b"[" * 5000, b'{"prompt": "\\ud800"}']),
    st.sampled_from([b'{"prompt": "x"', b"\0" * 9]),
)  # fmt: skip


def held_rows(raw):
    """How many lines of a file are rows: those that are not blank."""
    text = b"\n".join(raw).removeprefix(b"\xef\xbb\xbf")
    return sum(bool(line.strip()) for line in text.split(b"\n"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.lists(lines, min_size=1, max_size=12))
def test_every_line_that_is_not_blank_is_one_row_with_a_key_of_its_own(tmp_path, raw):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join([*raw, b'{"prompt": "last"}']))
    rows = list(read_prompts(path, GenerationParams()))
    assert [row.index for row in rows] == list(range(held_rows([*raw, b"x"])))
    assert len({row.id for row in rows}) == len(rows)
    ledger = Ledger()
    for row in rows:
        ledger.add(row_key(row), row.index, row.params.n if isinstance(row, PromptRow) else 1)
    for number, row in enumerate(rows):
        assert ledger.find(row_key(row)) == number
        for sample in ledger.missing_samples(number, row_key(row)):
            assert ledger.mark(number, sample, failed=False)
    assert ledger.missing == 0


@functools.cache
def composed(job: tuple[str, ...]) -> tuple[Config, Path]:
    """Read the config of a command line that is the same for every example, and name its folder."""
    return settle_generation(read_config(list(job))), job_folder(list(job))


@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(raw=st.lists(lines, min_size=1, max_size=16))
def test_a_job_over_any_lines_ends_with_every_row_written_once(tiny_folder, tmp_path, raw):
    """From the prompt file through a model to outputs.jsonl; then the same again has nothing to do."""
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"\n".join([*raw, b'{"prompt": "last"}']))
    config, folder = composed(
        tuple(arguments(tiny_folder, prompts, tmp_path / "outputs", "generation.max_new_tokens=4"))
    )
    status = runner.run_job(config, folder)
    path = folder / "outputs.jsonl"
    written = [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().splitlines()]
    places = [(row["index"], row["sample"]) for row in written]
    assert len(set(places)) == len(places)
    expected = list(read_prompts(prompts, GenerationParams(max_new_tokens=4)))
    samples = [
        (row.index, i) for row in expected for i in range(row.params.n if isinstance(row, PromptRow) else 1)
    ]
    assert sorted(places) == samples
    assert all((row["error"] is None) == isinstance(row["completion"], str) for row in written)
    assert status == int(any(row["error"] for row in written))
    before = path.read_bytes()
    assert runner.run_job(config, folder) == status
    assert path.read_bytes() == before


KEYS = [
    "model", "model.name", "quant", "quant.method", "generation", "generation.max_new_tokens", "engine.max_rows",
    "generation.temperature", "generation.stop", "prompts", "limit", "shard", "resume", "on_error", "system",
    "watchdog_sec", "model.chat_template_kwargs", "model.max_memory", "jobs", "engine", "outputs_dir", "prompt_set",
    "promts", "generation.top-k", "hydra.run.dir", "+new", "~quant", "++model.name", "", "a.b.c",
]  # fmt: skip
values = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["null", "-1", "1e999", "[]", "{a: 1}", "${oc.env:HOME}", "${model.name}", "???", "'", '"', "a,b"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)
one_override = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), values), st.text(max_size=20), st.sampled_from(KEYS)
)


@settings(max_examples=100, deadline=None)
@given(line=st.lists(one_override, max_size=3))
def test_any_command_line_is_a_config_or_a_config_error(line):
    """Composed and typed, and the job's folder named."""
    with contextlib.suppress(ConfigError):
        config = read_config(line)
        assert isinstance(config, Config)
        assert config.resume in Resume
        job_folder(line)
