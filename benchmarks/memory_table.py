"""Predicted beside measured memory: `python benchmarks/memory_table.py [MODEL_FOLDER]`

Runs a job for each quantization and number of rows, each in its own process, and prints what stats.json
says as a Markdown table. Growth is of the resident set over the bare process. --quants, --rows choose.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUANTS = ("none", "bf16", "int8", "nf4")
ROWS = (8, 64)
NEW_TOKENS = 8
WORDS = ("data", "model", "river", "stone", "light", "paper", "green", "window", "music", "garden")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    chosen = parser.parse_args()
    print("| quant | rows | weights | state | KV cache | load peak | run peak | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for quant in chosen.quants:
        for rows in chosen.rows:
            print(line(quant, rows, job(chosen.model, quant, rows)), flush=True)
    print("\nMB, predicted / measured (error)")


def job(model: str, quant: str, rows: int) -> dict[str, Any]:
    """stats.json of a job on `rows` prompts of about 100 tokens, all in flight at once."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt(i)}) + "\n" for i in range(rows)))
        arguments = [
            f"model.name={model}", f"quant={quant}", f"prompts={prompts}", f"outputs_dir={folder}/outputs",
            f"engine.max_rows={rows}", "generation.ignore_eos=true", f"generation.max_new_tokens={NEW_TOKENS}",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True, capture_output=True)
        (stats,) = Path(folder).glob("outputs/*/*/stats.json")
        return dict(json.loads(stats.read_text()))


def prompt(row: int) -> str:
    """Some 60 words that no other row begins with."""
    return f"{row}. " + " ".join(WORDS[(row * 7 + i * i) % len(WORDS)] for i in range(60))


def line(quant: str, rows: int, stats: dict[str, Any]) -> str:
    memory = stats["memory"]
    cells = [
        cell(*(memory[side][f"{part}_bytes"] for side in ("predicted", "measured")), error)
        for part, error in memory["error_percent"].items()
    ]
    return f"| {quant} | {rows} | {' | '.join(cells)} | {stats['tokens_per_sec']:.1f} |"


def cell(predicted: int | None, measured: int | None, error: float | None) -> str:
    sizes = " / ".join("-" if size is None else f"{size / 1e6:.1f}" for size in (predicted, measured))
    return sizes if error is None else f"{sizes} ({error:+.1f} %)"


if __name__ == "__main__":
    main()
