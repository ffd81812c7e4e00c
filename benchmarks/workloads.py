"""The benchmark's prompt files: mixed lengths, from a fixed seed.

    python benchmarks/workloads.py W V --rows 128 --out benchmarks/.cache --model DIR   # writes and counts

W: every row makes its own number of tokens (16-256, median 64), the end-of-sequence token ignored.
V: every row makes at most 128 tokens and stops at the end of its answer.
Both have the same prompts. Lengths are quantiles of a log-normal distribution in a shuffled order, so
that files of 128, 512 and 2,048 rows have the same mix.
"""

import argparse
import json
import math
from pathlib import Path
from random import Random
from statistics import NormalDist, mean, median
from typing import Any

from texts import make_prompt

SEED = 20261
WORDS = {"median": 45.0, "sigma": 1.02, "low": 8, "high": 362}  # of a prompt
NEW_TOKENS = {"median": 64.0, "sigma": 0.79, "low": 16, "high": 256}
V_NEW_TOKENS = 128
WORKLOADS = {  # what is passed to the job besides the file
    "W": ["generation=greedy", "generation.ignore_eos=true"],
    "V": ["generation=greedy", f"generation.max_new_tokens={V_NEW_TOKENS}"],
}


def lengths(rows: int, median: float, sigma: float, low: int, high: int) -> list[int]:
    """`rows` quantiles of a log-normal distribution, shortest first, held between low and high."""
    normal = NormalDist(math.log(median), sigma)
    quantiles = (math.exp(normal.inv_cdf((i + 0.5) / rows)) for i in range(rows))
    return [round(min(max(q, low), high)) for q in quantiles]


def make_rows(workload: str, rows: int) -> list[dict[str, Any]]:
    """The workload as rows of a prompt file; no two prompts are the same."""
    rng = Random(SEED)
    words, new_tokens = lengths(rows, **WORDS), lengths(rows, **NEW_TOKENS)
    rng.shuffle(words)
    rng.shuffle(new_tokens)
    made, seen = [], set()
    for i in range(rows):
        prompt = make_prompt(rng, words[i])
        while prompt in seen:
            prompt = make_prompt(rng, words[i])
        seen.add(prompt)
        row: dict[str, Any] = {"id": f"{workload}-{i:04d}", "prompt": prompt}
        if workload == "W":
            row["generation"] = {"max_new_tokens": new_tokens[i]}
        made.append(row)
    return made


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of any prompt file: `prompt`, `messages` or an OpenAI batch line; ids are made where missing.

    Raises:
        ValueError: a row has no prompt; the message names file and line.
    """
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        row = json.loads(line)
        body = row.get("body", row)
        if "messages" not in body and "prompt" not in body:
            raise ValueError(f"{path}:{i + 1}: no 'prompt' or 'messages'; this row has {sorted(row)}")
        messages = body.get("messages") or [{"role": "user", "content": body["prompt"]}]
        if body.get("system"):
            messages = [{"role": "system", "content": body["system"]}, *messages]
        limit = row.get("generation", {}).get("max_new_tokens", body.get("max_tokens"))
        rows.append({"id": row.get("id", row.get("custom_id", str(i))), "messages": messages, "limit": limit})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenize(prompts: Path, model: str, max_new_tokens: int, ignore_eos: bool) -> list[dict[str, Any]]:
    """The rows as peers read them: token ids of the chat template, and how far to go on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        {
            "id": row["id"],
            "messages": row["messages"],
            "prompt_token_ids": tokenizer.apply_chat_template(
                row["messages"], add_generation_prompt=True, return_dict=False
            ),
            "max_new_tokens": row["limit"] or max_new_tokens,
            "ignore_eos": ignore_eos,
        }
        for row in read_prompts(prompts)
    ]


def describe(rows: list[dict[str, Any]]) -> str:
    """Token counts of tokenized rows, in one line."""
    prompts = [row["prompt_token_ids"] for row in rows]
    sizes = [len(ids) for ids in prompts]
    shared = next((i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), 0)
    limits = [row["max_new_tokens"] for row in rows]
    return (
        f"{len(rows)} prompts, {sum(sizes):,} tokens (mean {mean(sizes):.0f}, median {median(sizes):.0f}, "
        f"{min(sizes)}-{max(sizes)}), {shared} shared by all; max_new_tokens {min(limits)}-{max(limits)}, "
        f"median {median(limits):.0f}, total {sum(limits):,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--model", help="count tokens with this model's tokenizer")
    args = parser.parse_args()
    for workload in args.workloads:
        path = args.out / f"{workload}-{args.rows}.jsonl"
        write_jsonl(path, make_rows(workload, args.rows))
        print(path)
        if args.model:
            print(" ", describe(tokenize(path, args.model, V_NEW_TOKENS, workload == "W")))


if __name__ == "__main__":
    main()
