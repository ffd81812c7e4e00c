"""One million short prompts through a tiny model: memory, rows per second, a kill half-way, and the exports.

    python benchmarks/million_rows.py --rows 1000000 --folder /tmp/million --format jsonl

Prints one JSON object, and leaves the resident set of each process, every two seconds, in FOLDER/NAME.rss.tsv.
The model is made here (one layer of 16), so that the machinery around it is what is measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GROUP_ROWS = 122_880  # of a Parquet file, as DuckDB writes them


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
    result |= run("killed", job, folder, kill_at_row=count // 2)
    result |= run("resumed", job, folder)
    outputs = next((folder / "outputs").rglob("outputs.jsonl"))
    stats = json.loads((outputs.parent / "stats.json").read_text())
    result["rows_per_sec"] = (count - stats["rows"]["done_before"]) / stats["run_sec"]
    result |= run("nothing_to_do", job, folder)
    result |= run("status", ["status", str(outputs.parent)], folder)
    ids = {"job": (json.loads(line)["id"] for line in outputs.open("rb"))}
    for to in ("openai", "parquet"):
        result |= run(f"export_{to}", ["export", str(outputs.parent), f"to={to}"], folder)
    exports = outputs.parent / "exports"
    ids["openai"] = (json.loads(line)["custom_id"] for line in (exports / "openai.jsonl").open("rb"))
    ids["parquet"] = parquet_ids(exports / "outputs.parquet")
    result["each_row_once"] = {name: each_once(found, count) for name, found in ids.items()}
    result["outputs_bytes"] = {
        path.name: path.stat().st_size for path in [outputs, *sorted(exports.iterdir())]
    }
    print(json.dumps(result, indent=2))


def write_prompts(path: Path, count: int) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        ids, texts = [f"r{i}" for i in range(count)], [f"Tell me joke number {i}." for i in range(count)]
        parquet.write_table(pa.table({"id": ids, "prompt": texts}), path, row_group_size=GROUP_ROWS)
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


def run(name: str, job: list[str], folder: Path, kill_at_row: int | None = None) -> dict[str, Any]:
    """Run a command; its seconds, those until it wrote a row, and the fullest that its memory was.

    Args:
        kill_at_row: when outputs.jsonl has so many, the command is killed by SIGKILL.
    """
    started, lines = time.perf_counter(), Lines(folder)
    before, first_row_sec, peak_bytes, sampled_sec = lines.count(), None, 0, -2.0
    with subprocess.Popen(**command(job)) as process, (folder / f"{name}.rss.tsv").open("w") as log:
        while process.poll() is None:
            seconds, rows = time.perf_counter() - started, lines.count()
            if first_row_sec is None and rows > before:
                first_row_sec = seconds
            peak_bytes, now_bytes = resident_bytes(process.pid) or (peak_bytes, 0)
            if seconds > sampled_sec + 2:
                sampled_sec = seconds
                print(f"{seconds:.0f}", rows, now_bytes, sep="\t", file=log, flush=True)
            if kill_at_row is not None and rows >= kill_at_row:
                process.kill()
                break
            time.sleep(0.1)
    if kill_at_row is None and process.returncode:
        raise SystemExit(f"{name}: ended with {process.returncode}")
    found = {"sec": time.perf_counter() - started, "first_row_sec": first_row_sec, "peak_bytes": peak_bytes}
    if (rows := Lines(folder).count()) > before:  # anew: a killed job's torn line is cut off
        found["rows"] = rows
    return {f"{name}_{key}": value for key, value in found.items() if value is not None}


class Lines:
    """Count the lines of a growing outputs.jsonl, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.offset = folder / "outputs", 0, 0

    def count(self) -> int:
        for path in self.folder.rglob("prompts/*/outputs.jsonl"):
            with path.open("rb") as file:
                file.seek(self.offset)
                while part := file.read(1 << 20):
                    self.lines += part.count(b"\n")
                self.offset = file.tell()
        return self.lines


def resident_bytes(pid: int) -> tuple[int, int] | None:
    """Read the most that a process ever held, and what it holds; None once it has ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmHWM" not in status:
        return None
    return int(status["VmHWM"].split()[0]) * 1024, int(status["VmRSS"].split()[0]) * 1024


def parquet_ids(path: Path) -> Iterator[str]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["id"]):
            yield from batch.column(0).to_pylist()


def each_once(ids: Iterable[str], count: int) -> bool:
    """Say whether r0, r1, … are there, each exactly once."""
    seen = bytearray(count)
    for row_id in ids:
        seen[int(row_id[1:])] += 1
    return seen == bytes([1]) * count


def command(job: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return {"args": [sys.executable, "-m", "pipeline", *job], "cwd": ROOT, "env": environment}


if __name__ == "__main__":
    main()
