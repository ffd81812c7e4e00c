"""vLLM's CPU build, offline: one LLM, all prompts at once; compiled unless --eager.

In one process, so that its peak memory is the process's; with an empty compile cache, as on a first run.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

from common import Done, Row, run


def load(args: argparse.Namespace, rows: list[Row]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    longest = max(len(row["prompt_token_ids"]) + row["max_new_tokens"] for row in rows)
    return LLM(
        model=str(args.model),
        dtype={"bf16": "bfloat16", "fp32": "float32"}[args.dtype],
        max_model_len=longest + 1,
        enforce_eager=args.eager,
        seed=0,
    )


def generate(args: argparse.Namespace, llm: Any, rows: list[Row]) -> Iterator[Done]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=row["max_new_tokens"], ignore_eos=row["ignore_eos"])
        for row in rows
    ]
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    for row, output in zip(rows, llm.generate(prompts, params, use_tqdm=False), strict=True):
        made = output.outputs[0]
        ended = made.finish_reason == "stop"  # its last token is the end of sequence
        yield row, made.text, len(made.token_ids) - ended


if __name__ == "__main__":
    with TemporaryDirectory(prefix="vllm-cache-") as cache:
        os.environ["VLLM_CACHE_ROOT"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        run("vllm-cpu", load, generate)
        sys.stdout.flush()
