"""OpenVINO GenAI's continuous batching, on a model that `optimum-cli export openvino` converted before."""

import argparse
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Done, Row, cut, has_bf16, run


def load(args: argparse.Namespace, rows: list[Row]) -> tuple[Any, Any]:
    if args.avx2:  # see ../hold_to_avx2.py
        held = Path(sys.prefix, "avx2")
        ctypes.CDLL(str(held / "answer.so"))
        sys.path.insert(0, str(held))
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4  # GiB
    scheduler.max_num_seqs = 128
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    half = "bf16" if has_bf16(args) else "f32"  # its cache fails in bf16 where the CPU has none
    precision = {"bf16": half, "fp32": "f32", "int8": half}[args.dtype]
    hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipe = genai.ContinuousBatchingPipeline(str(args.converted), scheduler, "CPU", hints)
    return pipe, pipe.get_tokenizer()


def generate(args: argparse.Namespace, both: tuple[Any, Any], rows: list[Row]) -> Iterator[Done]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipe, tokenizer = both
    handles = []
    for i, row in enumerate(rows):
        config = genai.GenerationConfig(max_new_tokens=row["max_new_tokens"], ignore_eos=row["ignore_eos"])
        config.do_sample = False
        config.eos_token_id = tokenizer.get_eos_token_id()
        ids = ov.Tensor(np.array([row["prompt_token_ids"]], dtype=np.int64))
        handles.append((row, pipe.add_request(i, ids, config)))
    while handles:
        pipe.step()
        waiting = []
        for row, handle in handles:
            if handle.get_status() == genai.GenerationStatus.RUNNING:
                waiting.append((row, handle))
                continue
            made = cut(handle.read_all()[0].generated_ids, row, {tokenizer.get_eos_token_id()})
            yield row, tokenizer.decode(made), len(made)
        handles = waiting


if __name__ == "__main__":
    run("openvino-genai", load, generate)
