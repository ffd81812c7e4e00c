"""One million short prompts through a tiny model: memory, rows per second, and the time to resume.

    python benchmarks/million_rows.py --rows 1000000 --folder /tmp/million --format jsonl

Prints one JSON object. The model is made here (one layer of 16), so that the machinery around it is what
is measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("jsonl", "csv", "parquet"), default="jsonl")
    parser.add_argument("--folder", type=Path, required=True, help="holds some GB; made anew")
    options = parser.parse_args()
    folder, count = options.folder.resolve(), options.rows
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = write_prompts(folder / f"prompts.{options.format}", count)
    build_model(folder / "model")
    result: dict[str, Any] = {
        "rows": count,
        "format": options.format,
        "prompt_file_bytes": prompts.stat().st_size,
    }
    result["read_rows_per_sec"] = count / timed(read_all, prompts)
    result["write_rows_per_sec"] = count / timed(write_all, folder / "written", count)
    job = [
        f"model.name={folder / 'model'}", "quant=fp32", f"prompts={prompts}", f"outputs_dir={folder / 'outputs'}",
        "generation.max_new_tokens=1", "token_ids=false",
    ]  # fmt: skip
    result["job_sec"] = run(job)
    outputs = next((folder / "outputs").rglob("outputs.jsonl"))
    stats = json.loads((outputs.parent / "stats.json").read_text())
    result["load_peak_bytes"] = stats["memory"]["load_peak"]["host_bytes"]
    result["run_peak_bytes"] = stats["memory"]["run_peak"]["host_bytes"]
    result["job_rows_per_sec"] = count / stats["run_sec"]
    result["nothing_to_do_sec"] = run(job)
    keep_lines(outputs, int(count * 0.9))
    result["resume_at_90_percent_sec"] = seconds_until_loading(job)
    result["resumed_job_sec"] = run(job)
    with outputs.open("rb") as file:
        result["rows_at_the_end"] = sum(1 for _ in file)
    print(json.dumps(result, indent=2))


def write_prompts(path: Path, count: int) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        ids, texts = [f"r{i}" for i in range(count)], [f"Tell me joke number {i}." for i in range(count)]
        parquet.write_table(pa.table({"id": ids, "prompt": texts}), path)
        return path
    csv = path.suffix == ".csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("id,prompt\n" if csv else "")
        for i in range(count):
            text = f"Tell me joke number {i}."
            file.write(f"r{i},{text}\n" if csv else f'{{"id": "r{i}", "prompt": "{text}"}}\n')
    return path


def build_model(folder: Path) -> None:
    """A Llama of one layer, and a byte-level tokenizer without merges."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=256, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def timed(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def read_all(prompts: Path) -> None:
    """Every line parsed, checked and keyed."""
    from pipeline.common.fingerprint import row_key
    from pipeline.common.request import GenerationParams
    from pipeline.prompts.reader import read_prompts

    for row in read_prompts(prompts, GenerationParams()):
        row_key(row)


def write_all(folder: Path, count: int) -> None:
    """A row of a usual size each, in a file that is brought to the disk as in a job."""
    from pipeline.job.folder import JobFolder

    row = {
        "id": "r", "index": 0, "prompt": "Tell me joke number 0.", "sample": 0, "completion": "word " * 60,
        "finish_reason": "stop", "usage": {"prompt_tokens": 40, "completion_tokens": 60}, "error": None,
        "metadata": {}, "key": "0123456789abcdef",
    }  # fmt: skip
    with JobFolder(folder) as results:
        for _ in range(count):
            results.append(row)
    shutil.rmtree(folder)


def command(job: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return {"args": [sys.executable, "-m", "pipeline", *job], "cwd": ROOT, "env": environment}


def run(job: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(**command(job), check=True)
    return time.perf_counter() - started


def keep_lines(path: Path, count: int) -> None:
    """As if the job had been killed after so many rows."""
    with path.open("rb+") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())


def seconds_until_loading(job: list[str]) -> float:
    """What finding out what is missing takes, before the model loads."""
    started = time.perf_counter()
    with subprocess.Popen(**command(job), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Loading"):
                break
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


if __name__ == "__main__":
    main()
