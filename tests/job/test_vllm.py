"""engine=vllm, with the real vLLM: the same rows, errors and texts as our own engine, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from job_helper import ROOT, environment, outputs, texts, write_rows

from pipeline.commands.door import main
from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import job_folder
from pipeline.job.counts import read_counts
from pipeline.job.paths import JobPaths

JOBS = ROOT / "jobs"
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
OWN = [
    {"id": "three", "prompt": "Tell a joke.", "generation": {"n": 3, "temperature": 0.9, "top_k": 40}},
    {"id": "stop", "prompt": "Count: one, two, three", "generation": {"stop": ["Two"]}},
    {"id": "end", "prompt": "Hello", "generation": {"stop": ["<|im_end|>"]}},
    {"id": "on", "prompt": "Hi", "generation": {"ignore_eos": True, "max_new_tokens": 30}},
    {"id": "logprobs", "prompt": "Why did the network cross the road?", "generation": {"logprobs": 2}},
    {"id": "penalty", "prompt": "Say ha ha ha", "generation": {"repetition_penalty": 1.3}},
    {"id": "json", "prompt": "A person as JSON", "generation": {"json_schema": PERSON}},
    {"id": "cut", "prompt": "A person as JSON", "generation": {"json_schema": PERSON, "max_new_tokens": 3}},
    {"id": "regex", "prompt": "A number?", "generation": {"regex": "[0-9]{3}"}},
    {"id": "choice", "prompt": "Is water wet?", "generation": {"choice": ["yes", "no"]}},
    {"id": "grammar", "prompt": "Is water wet?", "generation": {"grammar": 'start: "may" "be"'}},
    {"id": "hot", "prompt": "x", "generation": {"temperature": 5}},
    {"id": "orders", "prompt": "x", "generation": {"temperature": 1, "min_p": 0.1, "top_p": 0.5}},
    {"id": "long", "prompt": "x " * 9000},
]
REFUSED = {"hot": "vLLM takes 0 (greedy), or 0.01 to 2", "orders": "applies them in the other order"}
SAMPLED = {"three", "request-3", "good-overrides", *REFUSED}


def settings(model, prompts, out, *more):
    return [
        f"model.name={model}", f"prompts={prompts}", f"outputs_dir={out}", "quant=fp32", "token_ids=true",
        "generation.max_new_tokens=24", *more,
    ]  # fmt: skip


VLLM = ["engine=vllm", "engine.extra={enforce_eager:true}"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The jokes, OpenAI's batch, the bad rows, and rows with settings of their own."""
    files = ("jokes.jsonl", "openai_batch.jsonl", "bad_rows.jsonl")
    lines = [line for name in files for line in (JOBS / name).read_bytes().splitlines()]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [*lines, *OWN])


@pytest.fixture(scope="module")
def both(smollm2_dir, prompts, tmp_path_factory):
    """The command lines of a job by our own engine and of one by vLLM, both done."""
    out = tmp_path_factory.mktemp("out")
    own, other = settings(smollm2_dir, prompts, out), settings(smollm2_dir, prompts, out, *VLLM)
    for job in (own, other):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *job],
            capture_output=True, text=True, env=environment(), cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == ExitStatus.SOME_FAILED, done.stderr
    return own, other


def by_id(job):
    return {(row["id"], row["sample"]): row for row in outputs(job)}


def test_every_row_is_there_once_with_the_text_of_our_own_engine(both):
    own, other = map(by_id, both)
    assert own.keys() == other.keys()
    assert len(outputs(both[1])) == len(other)
    alike = [key for key in own if key[0] not in SAMPLED]
    kept = ("completion", "token_ids", "finish_reason", "usage", "complete", "error", "metadata", "key")
    assert [[other[key].get(k) for k in kept] for key in alike] == [
        [own[key].get(k) for k in kept] for key in alike
    ]
